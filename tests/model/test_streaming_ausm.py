"""Prompts that the network makes masks of, many objects over a life, several streams at once, and saved streams."""

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scripted import FRAME, NOTHING, SIZE, A, B, C, ScriptedModel, Seen, frame_mask, play

from ausm_hf import AusmImageProcessor, AusmProcessor, read_video
from ausm_hf.model import identities_ausm, session_ausm, streaming_ausm
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.model.session_ausm import AusmInferenceSession
from ausm_hf.model.streaming_ausm import preview_prompts, step_session, step_sessions

VIDEO_SIZE = (16, 24)


class RefiningModel(ScriptedModel):
    """Makes of the signals of each frame in turn the objects of `refined`; keeps the signals."""

    def __init__(self, script, refined):
        super().__init__(script)
        self.refined = refined
        self.signals = []

    def step(self, pixel_values, history, label_set="a refinement"):
        if label_set != "a refinement":
            return super().step(pixel_values, history, label_set)
        assert history.steps == 0  # a fresh past
        self.signals.append(history.masks[0])
        found = self.refined[len(self.signals) - 1]
        return SimpleNamespace(masks_queries_logits=torch.stack([torch.where(x.mask, 5.0, -5.0) for x in found])[None])


def started(script, refined, find_new_objects=True):
    model = RefiningModel(script, refined)
    model.session = AusmInferenceSession(seed=0, find_new_objects=find_new_objects)
    return model, model.session


def prompt(session, frame_idx=None, **prompts):
    """`prompts`: `o3=ObjectPrompt(...)` for object 3."""
    session.add_prompts(frame_idx, [int(name[1:]) for name in prompts], [*prompts.values()], VIDEO_SIZE)


@pytest.fixture
def warnings(caplog):
    logging.getLogger("ausm_hf.model.session_ausm").propagate = True
    with caplog.at_level("WARNING"):
        yield caplog


def test_box_becomes_a_mask_before_the_first_frame(warnings):
    model, session = started([({4: A}, [])], [[C]])
    prompt(session, o4=ObjectPrompt(box=(8, 0, 24, 12)))
    output = step_session(model, session, FRAME)
    assert model.signals[0].equal(Seen((0, 3, 2, 6)).mask[None].float())
    assert model.histories[0].masks[0].equal(C.mask[None].float())  # M_0
    assert session.history.masks[0].equal(C.mask[None].float())  # M_1
    assert output.object_ids == [4] and output.pred_masks.shape == (1, 1, *VIDEO_SIZE)
    assert (output.pred_masks[0, 0] > 0).float().mean() == pytest.approx(C.mask.float().mean().item(), abs=0.1)
    assert not session.prompts and not warnings.messages


@pytest.mark.parametrize("refined", [NOTHING, B], ids=["nothing", "elsewhere"])
def test_where_the_network_finds_nothing_the_signal_is_the_mask_and_a_warning_says_so_once(refined, warnings):
    model, session = started([({4: A}, []), ({4: A}, [])], [[refined]] * 4)  # twice each
    for object_id in (4, 5):
        prompt(session, **{f"o{object_id}": ObjectPrompt(points=((22, 2),), labels=(1,))})
        output = step_session(model, session, FRAME)
        marked = (output.pred_masks[output.object_ids.index(object_id), 0] > 0).nonzero()
        assert marked.tolist() == [[1, 21], [1, 22], [2, 21], [2, 22]]
    for object_id, message in zip((4, 5), warnings.messages, strict=True):  # once for each
        assert message.startswith(f"The network finds no object where object {object_id} is marked")
    session.remove_object(4)
    assert session.warnings_given == {"signal itself 5"}  # a stream of any length keeps none of who is gone


def test_a_box_needs_no_pixel_at_any_point(warnings):
    model, session = started([({4: A}, [])], [[B]])
    prompt(session, o4=ObjectPrompt(box=(0, 7, 8, 16)))
    step_session(model, session, FRAME)
    assert session.history.masks[0].equal(B.mask[None].float()) and not warnings.messages


def test_what_lies_far_from_the_box_is_not_the_object():
    model, session = started([({4: A}, [])], [[Seen((0, 4, 0, 4))]] * 2)
    prompt(session, o4=ObjectPrompt(box=(0, 0, 8, 8), points=((14, 14),), labels=(1,)))
    output = step_session(model, session, FRAME)
    mask = output.pred_masks[0, 0] > 0
    assert mask.nonzero().tolist() == [
        [y, x] for y in range(16) for x in range(24) if (y < 9 and x < 9) or (y in (13, 14) and x in (13, 14))
    ]


def test_points_correct_the_mask_that_the_network_sees():
    model, session = started(
        [({}, [A]), ({1: A}, []), ({1: B}, []), ({1: NOTHING}, [])], [*[[NOTHING]] * 7, [C], [C], [B], [B]]
    )
    step_session(model, session, FRAME)
    # Discs of 2 x 2 pixels here: four fill a pixel of the network's masks.
    add, take = [(17, 5), (19, 5), (17, 7), (19, 7)], [(1, 1), (3, 1), (1, 3), (3, 3)]
    prompt(session, o1=ObjectPrompt(points=(*add, *take), labels=(1,) * 4 + (0,) * 4))
    output = step_session(model, session, FRAME)
    # Of the first seven the network makes nothing, so they stay as they are.
    assert model.signals[0][0].equal(A.mask.float())
    assert model.signals[7][0].nonzero().tolist() == [[0, 1], [1, 0], [1, 1], [1, 4]]
    assert output.object_ids == [1] and output.prompted == [True]
    assert session.history.masks[0].equal(C.mask[None].float())
    # With a box it starts anew.
    prompt(session, o1=ObjectPrompt(box=(16, 0, 24, 8)))
    step_session(model, session, FRAME)
    assert model.signals[8][0].equal(C.mask.float())
    # So it does for an object that is not followed.
    prompt(session, o9=ObjectPrompt(points=((2, 10),), labels=(1,)))
    step_session(model, session, FRAME)
    assert model.signals[9][0].sum() == 1
    # Points alone correct what the network makes of them once more.
    assert len(model.signals) == 11 and model.signals[10].equal(B.mask[None].float())


def test_negative_points_that_leave_nothing_are_not_followed(warnings):
    dot = Seen((0, 1, 0, 1))
    model, session = started([({}, [dot]), ({1: NOTHING}, []), ({1: A}, [A])], [])
    step_session(model, session, FRAME)
    prompt(session, o1=ObjectPrompt(points=((2, 2),), labels=(0,)))  # but the object is not there any more
    assert step_session(model, session, FRAME).object_ids == []
    assert step_session(model, session, FRAME).object_ids == [1] and not model.signals
    (message,) = warnings.messages
    assert message.startswith("Negative points leave nothing of object 1")


def test_preview_is_what_the_step_then_gives_and_moves_nothing(tiny_model, moving_square):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    session = processor.init_video_session(seed=0, find_new_objects=True)
    pixels = [processor(images=frame)["pixel_values"] for frame in frames]
    boxes = {0: [8, 12, 26, 30], 2: [16, 12, 34, 30]}
    for t in range(4):
        if t in boxes:
            processor.add_inputs_to_inference_session(session, t, t + 1, input_boxes=boxes[t], original_size=(48, 64))
        if t == 3:
            processor.add_inputs_to_inference_session(session, None, 1, input_points=[40, 20])
        before = copy.deepcopy(session).__getstate__()
        preview = tiny_model.preview_prompts(session, pixels[t])
        assert set(preview) == set(session.prompts.get(t, {}))
        apart = {"generator": None, "warnings_given": None}
        assert str(before | apart) == str(session.__getstate__() | apart)
        assert before["warnings_given"] == session.warnings_given
        assert before["generator"].get_state().equal(session.generator.get_state())
        output = tiny_model(inference_session=session, frame=pixels[t])
        for object_id, mask in preview.items():
            assert mask.any() and mask.shape == (48, 64) and mask.dtype == torch.bool
            assert mask.equal(output.pred_masks[output.object_ids.index(object_id), 0] > 0)
    assert preview_prompts(tiny_model, session, pixels[4]) == {}


def test_what_a_preview_warns_of_is_said_again_when_it_is_followed(warnings):
    model, session = started([({4: A}, [])], [[NOTHING]] * 4)
    prompt(session, o4=ObjectPrompt(points=((22, 2),), labels=(1,)))
    preview_prompts(model, session, FRAME)
    assert len(warnings.messages) == 1
    step_session(model, session, FRAME)
    assert len(warnings.messages) == 2 and warnings.messages[0] == warnings.messages[1]


def test_removed_objects_leave_the_history_and_others_stay():
    model = ScriptedModel([({}, [A, B, C]), ({1: A, 3: C}, []), ({1: A, 3: C}, [B])])
    model.session = session = AusmInferenceSession(seed=0)
    step_session(model, session, FRAME)
    slots = [x.slot for x in session.objects]
    prompt(session, 1, o2=ObjectPrompt(box=(0, 0, 9, 9)))
    prompt(session, 5, o2=ObjectPrompt(box=(0, 0, 9, 9)), o8=ObjectPrompt(box=(0, 0, 9, 9)))
    session.remove_object(2)
    assert session.obj_ids == [1, 3, 8] and list(session.prompts) == [5] and list(session.prompts[5]) == [8]
    assert session.get_obj_num() == 3
    assert [step_session(model, session, FRAME).object_ids for _ in range(2)] == [[1, 3], [1, 3, 9]]  # a new id
    assert model.histories[1].slots.tolist() == [[slots[0], slots[2]]] and model.histories[1].taken.tolist() == [
        [1, 1]
    ]
    assert model.histories[1].masks[0].equal(torch.stack([A.mask, C.mask]).float())
    session.remove_object(8)
    assert not session.prompts
    with pytest.raises(ValueError, match=r"one of the objects followed now, \[1, 3, 9\], got 2"):
        session.remove_object(2)
    for object_id in (1, 3, 9):
        session.remove_object(object_id)
    model.script.append(({}, [A]))
    assert step_session(model, session, FRAME).object_ids == [10]


def test_the_trace_of_an_object_that_is_let_go_is_cleared(tiny_model, clips, monkeypatch):
    """Where it alone marked pixels they begin anew; all others go on as they were."""
    monkeypatch.setattr(identities_ausm, "BYSTANDER_THRESHOLD", 1.0)
    processor, videos = clips
    size, frames = videos[0]
    session = processor.init_video_session(seed=0, find_new_objects=False, foreground_threshold=1.0)
    masks = np.zeros((2, *size), bool)
    masks[0, : size[0] // 2, : size[1] // 2] = True
    masks[1, : size[0] // 2, size[1] // 4 :] = True
    masks[0] &= ~masks[1]
    processor.add_inputs_to_inference_session(session, None, [1, 2], input_masks=masks, original_size=size)
    for frame in frames[:2]:
        tiny_model(inference_session=session, frame=frame)
    # The masks of an untrained network may be anywhere: those of the user stand for them.
    small = F.interpolate(torch.from_numpy(masks)[None].float(), session.history.masks.shape[-2:], mode="area")
    session.history = replace(session.history, masks=small.gt(0.5).float())
    before = session.history
    assert all(state.flatten(1).any(1).all() for layer in before.states for state in layer)
    first, second = (F.max_pool2d(mask[None, None], 4).flatten() > 0 for mask in before.masks[0])
    assert (first & ~second).any() and (~first).any()
    for followed in session.objects:
        assert before.slots[0].tolist()[followed.object_id - 1] == followed.slot
    gone, staying = before.slots[0].tolist()
    width = tiny_model.config.hidden_size + 1
    assert before.appearance[0, :, [width + gone, width + staying, -1]].any(dim=-1).all()
    session.remove_object(1)
    kept = [row for row in range(width, before.appearance.shape[2]) if row != width + gone]
    assert not session.history.appearance[0, :, width + gone].any()
    assert session.history.appearance[:, :, kept].equal(before.appearance[:, :, kept])
    # Of the products of all pixels' looks those of its mean look, as often as it was seen (the last number is 0.5).
    for now, was in zip(session.history.appearance[0], before.appearance[0], strict=True):
        times = 2 * was[width + gone, -1]
        look = was[width + gone] / times
        torch.testing.assert_close(now[:width], was[:width] - times * torch.outer(look, look))
    for old, new in zip(before.states, session.history.states, strict=True):
        for was, now in zip(old, new, strict=True):
            assert not now[first & ~second].any() and now[~first | second].equal(was[~first | second])
    assert session.history.features.equal(before.features) and session.history.masks.equal(before.masks[:, 1:])


def test_what_is_marked_again_is_looked_at_anew(tiny_model, clips, monkeypatch):
    monkeypatch.setattr(identities_ausm, "BYSTANDER_THRESHOLD", 1.0)
    processor, videos = clips
    size, frames = videos[0]
    session = processor.init_video_session(seed=0, find_new_objects=False, foreground_threshold=1.0)
    masks = np.zeros((2, *size), bool)
    masks[0, : size[0] // 2, : size[1] // 2] = masks[1, size[0] // 2 :] = True
    processor.add_inputs_to_inference_session(session, None, [1, 2], input_masks=masks, original_size=size)
    for frame in frames[:3]:
        before = session.history
        tiny_model(inference_session=session, frame=frame)
    rows = session.history.slots[0] + tiny_model.config.hidden_size + 1
    assert session.history.appearance[0, :, rows].any(dim=-1).all() and before.appearance[0, :, rows].any()
    processor.add_inputs_to_inference_session(session, None, [2], input_masks=masks[:1], original_size=size)
    tiny_model(inference_session=session, frame=frames[3])
    assert session.history.appearance[0, :, rows].any(dim=-1).tolist() == [[True, False]] * 2


@pytest.mark.parametrize("last, forgotten", [({1: Seen((0, 2, 0, 3)), 2: B}, (1,)), ({2: NOTHING}, ())])
def test_a_correction_keeps_what_an_object_looks_like(last, forgotten):
    """Marked again where it was followed, or when it was away, it looks as it did; not so where something else was."""
    marks = {0: {1: frame_mask(A), 2: frame_mask(B)}, 2: {1: frame_mask(A), 2: frame_mask(C)}}
    _, session, _ = play([({1: A, 2: B}, []), ({1: A, 2: B}, []), (last, [])], prompts=marks)
    assert [x.object_id for x in session.objects] == [1, 2]
    assert session.history.forgotten == forgotten


def test_a_bystander_leaves_no_trace_to_the_next(monkeypatch):
    """Though the next one, found in the frame in which it has gone, has its number."""
    gone = []
    monkeypatch.setattr(identities_ausm, "without_trace", lambda history, columns: gone.append(columns) or history)
    script = [({1: A}, [B]), ({1: A}, [C])]
    _, session, _ = play(script, prompts={0: {1: frame_mask(A)}})
    assert [x.object_id for x in session.objects] == [1, -1] and gone[1] == [1]


def test_a_session_goes_on_with_other_labels():
    """As one that was saved, with a network that was trained on them since."""
    model, session, outputs = play([({}, [A])] + [({1: A}, [])] * 3)
    for label_set in ("pet", "birds", None):
        session.label_set = label_set
        model.script[session.history.steps :] = [({1: A}, [])]
        outputs.append(streaming_ausm.step_session(model, session, FRAME))
    assert [output.labels for output in outputs[-3:]] == [["pet"], ["cat"], ["cat"]]


def test_who_gives_way_leaves_no_trace(tiny_model, clips, monkeypatch):
    processor, videos = clips
    cleared = []
    monkeypatch.setattr(identities_ausm, "without_trace", lambda history, columns: cleared.append(columns) or history)
    session = processor.init_video_session(seed=0, find_new_objects=True, foreground_threshold=0.0)
    tiny_model(inference_session=session, frame=videos[0][1][0])
    ids = session.obj_ids
    assert cleared == [[]] and ids
    for object_id in range(50, 54):  # all four slots
        box = [20 * (object_id - 50), 5, 20 * (object_id - 50) + 18, 40]
        processor.add_inputs_to_inference_session(
            session, None, object_id, input_boxes=box, original_size=videos[0][0]
        )
    tiny_model(inference_session=session, frame=videos[0][1][1])
    assert cleared[1:] == [list(range(len(ids)))] and session.obj_ids == [50, 51, 52, 53]


class Parade:
    """
    A stand-in for the network: a world where one object enters and one leaves with every frame, eight at a time.
    Object `i` (from 1) is there in eight frames, in a cell of its own, and the network knows it by its ID vector.
    """

    device, dtype = torch.device("cpu"), torch.float32
    alive = 8

    def __init__(self, num_id_vectors):
        self.config = SimpleNamespace(
            num_id_vectors=num_id_vectors,
            foreground_threshold=0.5,
            mask_propagation_radius=0,
            likeness_scale=0,
            duplicate_overlap=0.5,
            max_age=5,
            label_sets={"things": ["thing"]},
            default_label_set="things",
        )
        self.cell_of_slot = {}

    init_history, encode_frames = ScriptedModel.init_history, staticmethod(ScriptedModel.encode_frames)

    def step(self, pixel_values, history, label_set=None):
        t = history.steps
        there = {i % 24 for i in range(t + 1, t + 1 + self.alive)}  # cells
        for column, slot in enumerate(history.slots[0].tolist()):
            (cells,) = history.masks[0, column].flatten().nonzero(as_tuple=True)
            if len(cells):
                self.cell_of_slot[slot] = int(cells[0])
        tracked = [self.cell_of_slot[slot] for slot in history.slots[0].tolist()]
        cells = tracked + sorted(there - set(tracked))
        masks = torch.full((len(cells), 24), -5.0)
        masks[range(len(cells)), cells] = 5.0
        return SimpleNamespace(
            masks_queries_logits=masks.view(1, len(cells), *SIZE),
            foreground_queries_logits=torch.tensor([[5.0 if cell in there else -5.0 for cell in cells]]),
            class_queries_logits=torch.zeros(1, len(cells), 2),
            history=replace(history, steps=t + 1),
        )


def test_a_thousand_objects_in_thirty_two_slots(warnings):
    """Eight at a time: ids never change or repeat, and a slot rests as long as it can between two objects."""
    model, session = Parade(32), AusmInferenceSession(seed=0)
    slot_of, last_held, rests = {}, {}, []
    for t in range(993):
        output = step_session(model, session, FRAME)
        assert output.object_ids == list(range(t + 1, t + 9))
        cells = (output.pred_masks[:, 0] > 0).flatten(1).nonzero()
        assert cells[:, 1].tolist() == [object_id % 24 for object_id in output.object_ids]
        for followed in session.objects:
            if slot_of.setdefault(followed.object_id, followed.slot) == followed.slot and followed.slot in last_held:
                if followed.absent_frames == 0 and t - last_held[followed.slot] > 1:
                    rests.append(t - last_held[followed.slot])
            assert slot_of[followed.object_id] == followed.slot
            last_held[followed.slot] = t
        assert len({x.slot for x in session.objects}) == len(session.objects) <= 13
    assert len(slot_of) == 1000 and session.next_object_id == 1001 and not warnings.messages
    # 32 slots, of which 12 or 13 are held, one given back with each frame.
    assert len(rests) == 1000 - 32 and min(rests) >= 18
    assert len(str(session.slots_held_until)) < 500  # nothing grows


def test_slots_that_nobody_has_held_come_first_and_then_the_longest_unused():
    session = AusmInferenceSession(seed=0)
    session.slots_held_until = {0: 7, 1: 3, 4: 9}
    assert {tuple(sorted(session.draw_slots(2, 5, [])[:2])) for _ in range(9)} == {(2, 3)}
    assert session.draw_slots(5, 5, [])[2:] == [1, 0, 4]


@pytest.fixture(scope="module")
def clips(shared_data):
    """The first frames of two real videos, as the network takes them, and their own size."""
    processor = AusmProcessor(AusmImageProcessor(size={"height": 64, "width": 96}))
    paths = sorted((shared_data / "clips").glob("*.mp4"))[:2]
    videos = []
    for path in paths:
        source = read_video(path)
        frames = [frame for frame, _ in zip(source, range(7))]
        videos.append((source.size, [processor(images=frame)["pixel_values"] for frame in frames]))
    return processor, videos


def same_outputs(a, b, exactly):
    assert a.object_ids == b.object_ids and a.frame_idx == b.frame_idx and a.prompted == b.prompted
    assert a.labels == b.labels
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(a.pred_masks, b.pred_masks, **tolerance)
    torch.testing.assert_close(a.scores, b.scores, **tolerance)


def test_streams_together_are_what_they_are_alone(tiny_model, clips):
    """Real frames; different numbers of objects, found and prompted ones, one stream a frame later than the others."""
    processor, videos = clips

    def sessions():
        made = [processor.init_video_session(seed=i, foreground_threshold=t) for i, t in enumerate((0.99, 0.3, 0.3))]
        size = videos[0][0]
        processor.add_inputs_to_inference_session(made[0], 2, 5, input_boxes=[9, 9, 90, 90], original_size=size)
        return made

    frames = [videos[0][1], videos[1][1], videos[1][1]]
    together, alone = sessions(), sessions()
    numbers = set()
    for t in range(6):
        several = [0, 1] if t == 0 else [0, 1, 2]
        outputs = tiny_model.step_sessions([together[i] for i in several], [frames[i][t] for i in several])
        for i, output in zip(several, outputs, strict=True):
            same_outputs(output, tiny_model(inference_session=alone[i], frame=frames[i][t]), exactly=False)
            for name, tensor in together[i].history.tensors().items():
                torch.testing.assert_close(tensor, alone[i].history.tensors()[name], rtol=1e-4, atol=1e-4)
        numbers.add(tuple(session.get_obj_num() for session in together))
    assert any(len(set(number)) > 1 for number in numbers)  # so there was padding
    assert together[0].obj_ids and 5 in together[0].obj_ids


def test_streams_that_went_together_keep_nothing_of_each_other(tiny_model):
    """What is kept of a stream is its own memory, not a view of all that went with it."""
    sessions = [AusmInferenceSession(seed=i) for i in range(4)]
    for number in (4, 3, 2, 1):  # one after the other falls silent
        tiny_model.step_sessions(sessions[:number], [torch.randn(3, 64, 96) for _ in range(number)])
    for session in sessions[1:]:
        assert session.history.num_bytes > 0
        for name, tensor in session.history.tensors().items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_wrong_streams_together(tiny_model):
    sessions = [AusmInferenceSession(), AusmInferenceSession()]
    frame = torch.zeros(3, 64, 96)
    for wrong, frames, message in [
        ([], [], "one or more"),
        (sessions, [frame], "2 sessions .* and 1 frames"),
        ([sessions[0]] * 2, [frame] * 2, r"\(1 different\)"),
        (sessions, [frame, torch.zeros(3, 96, 64)], r"session 1 of 2: .*of one size .*\(64, 96\).*got \(96, 64\)"),
        (sessions, [frame, frame.byte()], "session 1 of 2: .*floating point"),
        ([sessions[0], AusmInferenceSession(label_set="pet")], [frame] * 2, r"session 1 of 2: label_set .*\['pets'\]"),
        ([AusmInferenceSession(video=[frame]), sessions[0]], [frame] * 2, "session 0 of 2: .*made with a video"),
    ]:
        with pytest.raises(ValueError, match=message):
            step_sessions(tiny_model, wrong, frames)
    assert all(session.next_frame_idx == 0 and session.history is None for session in sessions)


@pytest.mark.parametrize("after", [0, 3])
def test_a_saved_stream_goes_on_bit_for_bit(tiny_model, clips, tmp_path, after):
    """With found, prompted and absent objects, slots given back, and prompts of every kind still to come."""
    processor, videos = clips
    size, frames = videos[0]
    session = processor.init_video_session(foreground_threshold=0.3, find_new_objects=True, label_set="pets")
    mask = np.zeros(size, bool)
    mask[20:90, 30:80] = True
    processor.add_inputs_to_inference_session(session, 1, 30, input_masks=mask, original_size=size)
    for frame in frames[:after]:
        tiny_model(inference_session=session, frame=frame)
    processor.add_inputs_to_inference_session(session, 4, 31, input_boxes=[10.3, 10, 50, 1 / 3 + 60])
    points = {"input_points": [[30, 30.7], [50, 60]], "input_labels": [1, 0], "input_scribbles": [[9, 9], [30, 9]]}
    processor.add_inputs_to_inference_session(session, 5, 32, **points)
    session.save(tmp_path / "stream.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]
    torch.rand(3)  # the stream draws from a generator of its own
    loaded = AusmInferenceSession.load(str(tmp_path / "stream.safetensors"))
    assert loaded.obj_ids == session.obj_ids and loaded.next_frame_idx == after and loaded.results is None
    for frame in frames[after:]:
        same_outputs(
            tiny_model(inference_session=loaded, frame=frame),
            tiny_model(inference_session=session, frame=frame),
            exactly=True,
        )
    assert loaded.generator.get_state().equal(session.generator.get_state())
    state, expected = vars(loaded), vars(session)
    for name in expected.keys() - {"generator", "history", "objects", "lock"}:
        assert state[name] == expected[name], name
    assert str(loaded.objects) == str(session.objects) and any(x.looks is not None for x in session.objects)
    for name, tensor in session.history.tensors().items():
        assert loaded.history.tensors()[name].equal(tensor), name


def test_looks_of_another_network_are_refused(tiny_model, tmp_path):
    session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [1], [ObjectPrompt(mask=torch.ones(64, 96, dtype=torch.bool))], (64, 96))
    step_session(tiny_model, session, torch.zeros(3, 64, 96))
    assert session.objects[0].looks.shape == (1, tiny_model.config.hidden_size)
    for looks in (session.objects[0].looks[:, 1:], session.objects[0].looks[0]):
        session.objects[0].looks = looks
        session.save(tmp_path / "stream")
        with pytest.raises(ValueError, match="what its objects look like is not of its network"):
            AusmInferenceSession.load(tmp_path / "stream")


def test_files_that_are_no_saved_session(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*missing"):
        AusmInferenceSession.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="path must be a saved session"):
        AusmInferenceSession.load(tmp_path / "text")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another kind of safetensors file"):
        AusmInferenceSession.load(tmp_path / "weights")


def test_saving_leaves_a_whole_file_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "stream"
    AusmInferenceSession(label_set="old").save(path)

    def broken(tensors, name, **kwargs):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(session_ausm, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        AusmInferenceSession(label_set="new").save(path)
    assert AusmInferenceSession.load(path).label_set == "old" and [*tmp_path.iterdir()] == [path]


def test_what_was_seen_in_a_frame_stands_for_the_frame(tiny_model, clips):
    """Encoded ahead, with other streams or alone: the same stream."""
    processor, videos = clips
    size, frames = videos[0]
    streams = []
    for _ in range(3):
        session = processor.init_video_session(seed=0)
        processor.add_inputs_to_inference_session(session, None, 7, input_boxes=[3, 3, 30, 40], original_size=size)
        streams.append(session)
    for frame in frames:
        with torch.no_grad():
            encoded = tiny_model.encode_frames(frame.reshape(1, *frame.shape[-3:]))
        assert encoded.size == frame.shape[-2:]
        plain = tiny_model(inference_session=streams[0], frame=frame)
        ahead = tiny_model(inference_session=streams[1], frame=encoded)
        assert ahead.object_ids == plain.object_ids and ahead.pred_masks.equal(plain.pred_masks)
        (beside,) = tiny_model.step_sessions([streams[2]], [encoded])
        assert beside.pred_masks.equal(plain.pred_masks)
    with torch.no_grad():
        two = tiny_model.encode_frames(torch.zeros(2, 3, *frame.shape[-2:]))
        other_size = tiny_model.encode_frames(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="frame must hold what is seen in one frame, got 2 frames"):
        tiny_model(inference_session=streams[0], frame=two)
    with pytest.raises(ValueError, match=r"frame must have the size of the frames before it, .* got \(32, 32\)"):
        tiny_model(inference_session=streams[0], frame=other_size)
    with pytest.raises(ValueError, match="multiples of 32"):
        tiny_model.encode_frames(torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match="Give either `pixel_values_videos` or `frame_features`"):
        tiny_model.model()


def test_a_frame_that_can_not_be_prepared_is_passed_over(tiny_model, clips):
    processor, videos = clips
    size, _ = videos[0]
    frames = [np.full((*size, 3), 0.1 * t, np.float32) for t in range(6)]
    frames[2] = np.full((*size, 3), np.nan, np.float32)
    session = processor.init_video_session(video=frames, seed=0)
    seen = []
    with pytest.raises(ValueError, match="nan to nan"):
        seen.extend(output.frame_idx for output in tiny_model.propagate_in_video_iterator(session))
    assert seen == [0, 1]
    later = tiny_model.propagate_in_video_iterator(session, start_frame_idx=3)
    assert [output.frame_idx for output in later] == [3, 4, 5]


def test_prompts_beyond_the_end_of_a_video_are_told_of(tiny_model, clips):
    processor, videos = clips
    size, _ = videos[0]
    session = processor.init_video_session(video=iter([np.zeros((*size, 3), np.uint8)] * 3), seed=0)
    processor.add_inputs_to_inference_session(session, 5, obj_ids=1, input_masks=np.ones(size), original_size=size)
    frames = tiny_model.propagate_in_video_iterator(session, start_frame_idx=0)
    assert [next(frames).frame_idx for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="below 3, the length of the video, got prompts for frame 5"):
        next(frames)
    tiny_model.propagate_in_video_iterator(session, np.int64(3), np.int64(0))
    for name in ("start_frame_idx", "max_frame_num_to_track"):
        with pytest.raises(ValueError, match=f"{name} must be an integer, got 0.5"):
            tiny_model.propagate_in_video_iterator(session, **{name: 0.5})


def test_a_history_of_another_size_is_refused(tiny_model):
    history = tiny_model.step(torch.zeros(1, 3, 64, 64)).history
    with pytest.raises(ValueError, match=r"maps have the size \(8, 8\); theirs is \(8, 12\)"):
        tiny_model.step(torch.zeros(1, 3, 64, 96), history)


def test_the_stream_whose_frame_is_wrong_is_named(tiny_model):
    sessions = [AusmInferenceSession(seed=0) for _ in range(3)]
    frames = [torch.zeros(3, 64, 64) for _ in sessions]
    frames[1] = frames[1] + torch.nan
    with pytest.raises(ValueError, match="session 1 of 3: frame must hold finite values"):
        tiny_model.step_sessions(sessions, frames)
    assert all(session.history is None for session in sessions)
