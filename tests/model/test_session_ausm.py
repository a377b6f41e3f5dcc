"""Who is who in a stream, to the last bit: a network that answers from a script, then a tiny real one."""

import copy
import logging
import math
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scripted import FRAME, NOTHING, SIZE, A, B, C, ScriptedModel, Seen, frame_mask, play

from ausm_hf import AusmForUniversalSegmentation, AusmImageProcessor, AusmProcessor
from ausm_hf.model import identities_ausm
from ausm_hf.model.history_ausm import AusmHistory
from ausm_hf.model.identities_ausm import PROMPT_LOGIT
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.model.session_ausm import AusmInferenceSession, FollowedObject
from ausm_hf.model.streaming_ausm import propagate_in_video_iterator, step_session


def test_detections_become_objects_best_first_and_are_followed():
    weak = Seen((0, 2, 4, 6), foreground=0.4)
    model, session, outputs = play([({}, [B, weak, Seen(A.box, 0.95)]), ({1: A, 2: B}, [])])
    assert [output.object_ids for output in outputs] == [[1, 2], [1, 2]]
    assert [output.frame_idx for output in outputs] == [0, 1]
    assert outputs[0].prompted == [False, False]
    torch.testing.assert_close(outputs[0].pred_masks[:, 0] > 0, torch.stack([A.mask, B.mask]))
    assert outputs[0].pred_masks.shape == (2, 1, *SIZE)
    # What the second step was given: the first one's history, with A and M filled in.
    assert model.histories[0].slots.shape == (1, 0)
    history = model.histories[1]
    assert history.steps == 1 and history.taken.all()
    assert history.slots[0].tolist() == [followed.slot for followed in session.objects]
    torch.testing.assert_close(history.masks[0], torch.stack([A.mask, B.mask]).float())


def test_session_threshold_replaces_the_configured_one():
    _, _, outputs = play([({}, [Seen(A.box, 0.6), Seen(B.box, 0.8)])], AusmInferenceSession(foreground_threshold=0.7))
    assert (outputs[0].pred_masks[:, 0] > 0).equal(B.mask[None])


def test_foreground_exactly_at_the_threshold():
    """Above it a detection is an object; at it a followed one still counts as seen."""
    at, above = Seen(A.box, 0.5), Seen(A.box, 0.51)
    _, _, outputs = play([({}, [at]), ({}, [above]), ({1: at}, [])])
    assert [output.object_ids for output in outputs] == [[], [1], [1]]


def test_absent_object_is_left_out_keeps_its_id_and_comes_back():
    gone = Seen(A.box, foreground=0.2)
    model, session, outputs = play([({}, [A]), ({1: gone}, []), ({1: A}, [A]), ({1: A}, [])])
    assert [output.object_ids for output in outputs] == [[1], [], [1], [1]]
    assert outputs[1].pred_masks.shape == (0, 1, *SIZE) and outputs[1].scores.shape == (0,)
    assert [history.masks.sum().item() for history in model.histories[1:]] == [4, 0, 4]
    assert [history.slots.tolist() for history in model.histories[1:]] == [[[session.objects[0].slot]]] * 3
    assert session.objects[0].absent_frames == 0


def test_object_without_a_mask_counts_as_absent():
    empty = Seen((0, 0, 0, 0), foreground=0.9)
    _, session, outputs = play([({}, [A]), ({1: empty}, [empty])])
    assert outputs[1].object_ids == [] and session.obj_ids == [1]
    assert session.objects[0].absent_frames == 1


def test_slot_is_given_back_after_max_age_and_the_id_never_returns():
    script = [({}, [A]), ({}, []), ({}, []), ({}, [A])]
    model, session, outputs = play(script, max_age=2)
    assert [history.slots.shape[1] for history in model.histories] == [0, 1, 1, 0]
    assert outputs[3].object_ids == [2]

    _, session, _ = play(script, max_age=None)
    assert session.obj_ids == [1, 2]


def test_reappearing_resets_the_age():
    script = [({}, [A]), ({}, []), ({1: A}, [A]), ({}, []), ({1: A}, [A])]
    assert play(script, max_age=2)[2][-1].object_ids == [1]


def test_duplicates_of_followed_objects_and_of_better_detections_are_dropped():
    half = Seen((0, 2, 1, 3), foreground=0.8)  # half of it lies on A
    around = Seen((0, 4, 0, 6), foreground=0.7)  # holds all of A, B and `half`, which cover 10/24 of it
    inside = Seen((0, 1, 0, 2), foreground=0.6)  # a part of A
    _, _, outputs = play(
        [
            ({}, [A, Seen(A.box, 0.8), Seen(B.box, 0.7), Seen((2, 4, 0, 3), 0.6)]),  # the last: 2/3 of it on B
            ({1: A, 2: B}, [A, half, around, inside]),
        ]
    )
    assert outputs[0].object_ids == [1, 2]
    assert outputs[1].object_ids == [1, 2, 3, 4]


def test_found_objects_that_become_one_are_followed_once():
    """The older one stays, and its id: two ids on one object would tear its mask into patches."""
    nearly = Seen((0, 2, 0, 3), foreground=0.99)  # IoU with A is 2/3
    apart = Seen((0, 2, 1, 3), foreground=0.99)  # IoU with A is 1/3
    _, session, outputs = play([({}, [A, B, C]), ({1: A, 2: apart, 3: C}, []), ({1: A, 2: nearly, 3: C}, [])])
    assert [output.object_ids for output in outputs] == [[1, 2, 3], [1, 2, 3], [1, 3]]
    assert session.obj_ids == [1, 3]


def test_prompted_objects_are_never_let_go_as_twins():
    session = AusmInferenceSession(seed=0, find_new_objects=True)
    prompts = {0: {8: frame_mask(B), 9: frame_mask(C)}}
    script = [({8: B, 9: C}, [A]), ({8: A, 9: A, 10: A}, [])]
    _, session, outputs = play(script, session, prompts)
    assert [output.object_ids for output in outputs] == [[8, 9, 10], [8, 9]]


def test_masks_in_the_history_are_exclusive_and_the_output_keeps_the_logits():
    left, right = Seen((0, 4, 0, 4), logit=3.0), Seen((0, 4, 2, 6), 0.8, logit=7.0)
    model, _, outputs = play([({}, [left, right]), ({}, [])])
    masks = model.histories[1].masks[0]
    assert masks[0].sum() == 8 and masks[1].sum() == 16 and masks.sum(0).max() == 1
    assert masks[0, :, :2].all() and masks[1, :, 2:].all()
    assert (outputs[0].pred_masks > 0).sum((1, 2, 3)).tolist() == [16, 16]


def test_marks_may_overlap_in_the_history():
    """They are what the user says they are; only what the network says is shared out."""
    both = Seen((0, 4, 0, 6), logit=9.0)
    prompts = {0: {8: frame_mask(both), 9: frame_mask(A)}}
    session = AusmInferenceSession(seed=0, find_new_objects=False)
    model, _, _ = play([({8: both, 9: A}, []), ({}, [])], session, prompts)
    masks = model.histories[1].masks[0] > 0
    assert torch.equal(masks, torch.stack([both.mask, A.mask])) and (both.mask & A.mask).any()


def test_specks_are_shown_to_nobody_and_stay_in_the_history(monkeypatch):
    """What follows is as the network has it; what is told of an object is without what is far from it."""
    cleaned = lambda logits, prompted: torch.where(logits > 5, logits, -logits.abs())  # noqa: E731
    monkeypatch.setattr(identities_ausm, "without_specks", cleaned)
    model, _, outputs = play([({}, [Seen(A.box, logit=3.0), Seen(C.box, logit=7.0)]), ({}, [])])
    assert ((outputs[0].pred_masks > 0).flatten(1).any(1)).tolist() == [False, True]
    torch.testing.assert_close(model.histories[1].masks[0] > 0, torch.stack([A.mask, C.mask]))


def test_detection_that_is_left_without_a_pixel_is_none():
    inside = Seen((0, 1, 0, 1), 0.8, logit=1.0)
    _, session, outputs = play([({}, [Seen((0, 4, 0, 4), logit=9.0), inside, C])])
    assert outputs[0].object_ids == [1, 2] and session.next_object_id == 3
    assert (outputs[0].pred_masks[1, 0] > 0).equal(C.mask)


def test_when_all_slots_are_taken_the_best_win_and_a_warning_says_so_once(caplog):
    script = [({}, [Seen(A.box, 0.7), Seen(B.box, 0.8), Seen(C.box, 0.9)]), ({1: C, 2: B}, [A]), ({1: C, 2: B}, [A])]
    logging.getLogger("ausm_hf.model.session_ausm").propagate = True
    with caplog.at_level("WARNING"):
        model, _, outputs = play(script, num_id_vectors=2)
    assert [output.object_ids for output in outputs] == [[1, 2]] * 3
    torch.testing.assert_close(outputs[0].pred_masks[:, 0] > 0, torch.stack([C.mask, B.mask]))
    assert [record.message.startswith("All 2 ID vectors are taken") for record in caplog.records] == [True]
    assert sorted(model.histories[1].slots[0].tolist()) == [0, 1]


def test_who_was_found_and_is_away_makes_room_for_who_is_found(caplog):
    """The longest away first; not who is there, nor who was marked."""
    script = [({1: A}, []), ({1: NOTHING}, [B, C]), ({2: NOTHING, 3: C}, []), ({3: NOTHING}, [B]), ({4: B}, [])]
    logging.getLogger("ausm_hf.model.session_ausm").propagate = True
    session = AusmInferenceSession(seed=0, find_new_objects=True)
    with caplog.at_level("WARNING"):
        _, _, outputs = play(script, session, {0: {1: frame_mask(A)}}, num_id_vectors=3)
    assert [output.object_ids for output in outputs] == [[1], [1, 2, 3], [1, 3], [1, 4], [1, 4]]
    assert [x.object_id for x in session.objects] == [1, 3, 4] and not caplog.records


def test_what_is_not_followed_takes_neither_slots_nor_pixels():
    empty, beaten = Seen((0, 0, 0, 0), 0.95), Seen((0, 2, 3, 5), 0.6, logit=9.0)  # IoU with C is 1/3
    model, _, outputs = play([({}, [C, empty, B, beaten]), ({}, [])], num_id_vectors=2)
    torch.testing.assert_close(outputs[0].pred_masks[:, 0] > 0, torch.stack([C.mask, B.mask]))
    torch.testing.assert_close(model.histories[1].masks[0], torch.stack([C.mask, B.mask]).float())


def test_slots_are_drawn_without_replacement_and_repeat_with_the_seed():
    def slots(seed):
        return [x.slot for x in play([({}, [A, B]), ({1: A, 2: B}, [C])], AusmInferenceSession(seed=seed))[1].objects]

    drawn = [slots(seed) for seed in range(8)]
    assert drawn == [slots(seed) for seed in range(8)] and len({tuple(x) for x in drawn}) > 1
    assert all(len(set(x)) == 3 and set(x) <= set(range(4)) for x in drawn)


def test_slots_are_drawn_uniformly():
    held = [FollowedObject(1, slot=1, prompted=False)]
    drawn = [AusmInferenceSession(seed=seed).draw_slots(2, 5, held) for seed in range(400)]
    for column in range(2):
        counts = {slot: [x[column] for x in drawn].count(slot) for slot in range(5)}
        assert counts[1] == 0 and min(counts[slot] for slot in (0, 2, 3, 4)) > 65  # 100 expected, deviation 9


def test_class_is_a_mean_over_frames_weighted_by_foreground_and_the_score_is_a_product():
    cat, dog = Seen(A.box, 0.9, dog=0.2, no_object=50.0), Seen(A.box, 0.6, dog=0.9, no_object=0.1)
    hidden = Seen(A.box, 0.3, dog=0.99)  # absent: has no vote
    _, _, outputs = play([({}, [cat]), ({1: hidden}, []), ({1: dog}, [cat]), ({1: dog}, [])])
    assert [output.labels for output in outputs] == [["cat"], [], ["cat"], ["dog"]]
    assert [output.label_ids for output in outputs] == [[0], [], [0], [1]]
    assert outputs[0].scores.item() == pytest.approx(0.9 * 0.8)
    # How good the mask was when it was found, whether the object is there, and its label.
    assert outputs[2].scores.item() == pytest.approx(0.9 * 0.6 * (0.9 * 0.8 + 0.6 * 0.1) / 1.5)
    assert outputs[3].scores.item() == pytest.approx(0.9 * 0.6 * (0.9 * 0.2 + 2 * 0.6 * 0.9) / 2.1)


def test_what_is_marked_after_it_was_found_is_as_good_as_if_it_had_been_marked_at_first():
    session = AusmInferenceSession(find_new_objects=True, seed=0)
    model = ScriptedModel([({}, [A]), ({1: A}, []), ({1: A}, []), ({1: A}, [])])
    model.session = session
    outputs = [step_session(model, session, FRAME) for _ in range(2)]
    session.add_prompts(2, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    outputs += [step_session(model, session, FRAME) for _ in range(2)]
    label = 0.5
    assert outputs[1].scores.item() == pytest.approx(0.9 * 0.9 * label)
    assert outputs[3].scores.item() == pytest.approx(0.9 * label)


def test_a_saved_stream_knows_how_good_its_objects_are(tmp_path):
    session = AusmInferenceSession(seed=0)
    session.objects = [FollowedObject(1, slot=2, prompted=False, absent_frames=3, quality=0.7)]
    session.save(tmp_path / "stream.safetensors")
    assert AusmInferenceSession.load(tmp_path / "stream.safetensors").objects == session.objects


def test_a_stream_of_a_network_of_other_sizes_is_refused(tiny_model):
    config = copy.deepcopy(tiny_model.config)
    config.num_id_vectors += 1
    session = AusmInferenceSession(seed=0)
    step_session(AusmForUniversalSegmentation(config).eval(), session, torch.zeros(3, 64, 96))
    with pytest.raises(ValueError, match="begun with a network of other sizes"):
        step_session(tiny_model, session, torch.zeros(3, 64, 96))
    assert session.next_frame_idx == 1


def test_what_a_session_shows_of_itself():
    session = AusmInferenceSession(video_height=8, video_width=10)
    assert repr(session) == "AusmInferenceSession(next frame 0, 10 x 8 pixels, objects: none)"
    _, session, _ = play([({}, [A, B]), ({1: A, 2: NOTHING}, [])], session)
    assert repr(session) == "AusmInferenceSession(next frame 2, 10 x 8 pixels, objects: 1, 2 (away))"
    mask = torch.ones(8, 10, dtype=torch.bool)
    session.add_prompts(3, [7], [ObjectPrompt(mask=mask)], (8, 10))
    assert repr(session).endswith("objects: 1, 2 (away), prompts for frames [3])")
    session.objects[0].prompted = True
    assert "objects: 1 (marked), 2 (away)" in repr(session)


def test_a_loaded_stream_goes_to_where_the_model_is(tiny_model, tmp_path, monkeypatch):
    """It is loaded to the CPU. "meta" stands for a GPU here: a device that every tensor can be sent to."""
    session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [1], [ObjectPrompt(mask=torch.ones(64, 64, dtype=torch.bool))], (64, 64))
    frame = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        step_session(tiny_model, session, frame)
    session.save(tmp_path / "stream.safetensors")
    moved = AusmInferenceSession.load(tmp_path / "stream.safetensors").history.to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert moved.tensors().keys() == session.history.tensors().keys()
    loaded, sent = AusmInferenceSession.load(tmp_path / "stream.safetensors"), []
    there, loaded.history = loaded.history, moved
    monkeypatch.setattr(AusmHistory, "to", lambda self, device: sent.append(device) or there)
    looks = loaded.objects[0].looks
    loaded.objects[0].looks = SimpleNamespace(to=lambda device: sent.append(device) or looks)
    step_session(tiny_model, loaded, frame)
    assert sent == [tiny_model.device] * 2


def test_what_other_threads_say_waits_for_the_frame_that_is_segmented():
    session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [1, 2], [ObjectPrompt(mask=frame_mask(seen)) for seen in (A, B)], (16, 24))
    model = ScriptedModel([({1: A, 2: B}, []), ({1: A, 2: B}, []), ({1: A}, [])])
    model.session = session
    step_session(model, session, FRAME)
    at_work, others = model.step, []

    def step(*args, **kwargs):
        if not others:
            says = [
                (session.remove_object, 2),
                (session.add_prompts, 2, [3], [ObjectPrompt(mask=frame_mask(C))], (16, 24)),
            ]
            others.extend(threading.Thread(target=what[0], args=what[1:]) for what in says)
            for thread in others:
                thread.start()
                thread.join(0.2)
                assert thread.is_alive()  # it waits
        return at_work(*args, **kwargs)

    model.step = step
    assert step_session(model, session, FRAME).object_ids == [1, 2]
    for thread in others:
        thread.join()
    assert [x.object_id for x in session.objects] == [1] and session.prompts.keys() == {2}
    assert session.obj_ids == [1, 3]
    assert step_session(model, session, FRAME).object_ids == [1, 3]


@pytest.mark.parametrize("at_work_on", ["step", "encode_frames"])
@pytest.mark.parametrize("previewing", [False, True])
def test_who_clicks_meanwhile_marks_the_next_frame(tiny_model, tmp_path, monkeypatch, at_work_on, previewing):
    """Clicks count from the next frame on, whatever the network is at; a session is saved as it is between frames."""
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    session = processor.init_video_session(seed=0)
    at_work, threads, errors = getattr(tiny_model, at_work_on), [], []

    def click(more):
        try:
            processor.add_inputs_to_inference_session(
                session, obj_ids=2, input_points=[[more, more]], clear_old_inputs=more == 20, original_size=(48, 64)
            )
        except ValueError as error:
            errors.append(error)

    def busy(*args, **kwargs):
        if not threads:
            says = [(click, 20), (click, 30), (session.save, tmp_path / "stream.safetensors")]
            threads.extend(threading.Thread(target=what[0], args=what[1:]) for what in says)
            for thread in threads:
                thread.start()
                thread.join(0.2)
                assert thread.is_alive()
        return at_work(*args, **kwargs)

    mask = np.zeros((48, 64), bool)
    mask[10:20, 10:20] = True
    processor.add_inputs_to_inference_session(session, obj_ids=1, input_masks=mask, original_size=(48, 64))
    pixel_values = processor(images=np.zeros((48, 64, 3), np.uint8))["pixel_values"]
    if previewing:
        tiny_model(inference_session=session, frame=pixel_values)
        processor.add_inputs_to_inference_session(session, obj_ids=1, input_points=[[12, 12]])
    monkeypatch.setattr(tiny_model, at_work_on, busy)
    if previewing:
        assert tiny_model.preview_prompts(session, pixel_values).keys() == {1}
    else:
        assert 2 not in tiny_model(inference_session=session, frame=pixel_values).object_ids
    for thread in threads:
        thread.join()
    assert errors == []
    assert session.prompts[1][2].points == ((20.0, 20.0), (30.0, 30.0)) and session.obj_ids == [1, 2]
    assert AusmInferenceSession.load(tmp_path / "stream.safetensors").next_frame_idx == 1
    assert tiny_model(inference_session=session, frame=pixel_values).object_ids == [1, 2]


def test_a_saved_stream_is_not_bound_by_the_length_of_the_video_it_began_with(tmp_path):
    AusmInferenceSession(num_frames=2, video_height=16, video_width=24).save(tmp_path / "stream.safetensors")
    loaded = AusmInferenceSession.load(tmp_path / "stream.safetensors")
    loaded.add_prompts(4, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    assert loaded.prompts.keys() == {4}


def test_label_set_is_the_one_asked_for():
    assert play([({}, [A])], AusmInferenceSession(label_set="ships"))[2][0].labels == ["tug"]


def test_prompt_for_the_first_frame_is_in_the_history_before_and_after_its_step():
    prompt = frame_mask(A)
    prompt[0, 0] = False  # a detail that the logits' resolution cannot show
    elsewhere = Seen(B.box, foreground=0.1)
    model, session, outputs = play([({7: elsewhere}, []), ({7: B}, [])], prompts={0: {7: prompt}})
    for history in model.histories:
        assert history.masks[0, 0].equal(A.mask.float())
        assert history.slots.shape == (1, 1) and history.slots[0, 0] == session.objects[0].slot
    assert outputs[0].object_ids == [7] and outputs[0].prompted == [True]
    # The output is the prompt itself, at its own size; from the next frame on it is what the network says.
    assert outputs[0].pred_masks.shape == (1, 1, 16, 24) and (outputs[0].pred_masks[0, 0] > 0).equal(prompt)
    assert outputs[1].pred_masks.shape == (1, 1, *SIZE) and (outputs[1].pred_masks[0, 0] > 0).equal(B.mask)
    assert outputs[0].scores.item() == pytest.approx(0.1 * 0.5)
    assert not session.prompts


def test_thin_prompt_does_not_vanish():
    prompt = torch.zeros(16, 24, dtype=torch.bool)
    prompt[5, 3] = True
    model, _, outputs = play([({1: NOTHING}, [])], prompts={0: {1: prompt}})
    assert model.histories[0].masks.nonzero().tolist() == [[0, 0, 1, 0]]
    assert (outputs[0].pred_masks[0, 0] > 0).equal(prompt)


def test_a_marked_object_is_away_where_it_is_not_likely_and_never_forgotten():
    """Its mask is empty then, in the history too; others may have its pixels. The session's threshold is not its."""
    faint, likely, wide = Seen(A.box, foreground=0.49), Seen(A.box, foreground=0.5), Seen((0, 2, 0, 6), logit=1.0)
    script = [({1: A, 2: B}, []), *[({1: faint, 2: wide}, [])] * 5, ({1: likely, 2: B}, [])]
    session = AusmInferenceSession(foreground_threshold=0.9)
    model, _, outputs = play(script, session, {0: {1: frame_mask(A), 2: frame_mask(B)}}, max_age=2)
    assert [output.object_ids for output in outputs] == [[1, 2]] * 7
    assert all(output.prompted == [True, True] for output in outputs)
    for output, history in zip(outputs[1:6], model.histories[2:7]):
        assert not (output.pred_masks[0] > 0).any() and (output.pred_masks[1, 0] > 0).equal(wide.mask)
        assert not history.masks[0, 0].any() and history.masks[0, 1].equal(wide.mask.float())
        assert output.scores[0] < 0.49
    assert (outputs[6].pred_masks[0, 0] > 0).equal(A.mask)
    assert [followed.absent_frames for followed in session.objects] == [0, 0]


@pytest.mark.parametrize(("find", "ids"), [(None, [1]), (True, [1, 2]), (False, [1])])
def test_with_prompts_new_objects_are_found_only_when_asked(find, ids):
    session = AusmInferenceSession(find_new_objects=find)
    assert play([({1: A}, [B])], session, {0: {1: frame_mask(A)}})[2][0].object_ids == ids


def test_what_nobody_asked_for_is_followed_as_a_bystander():
    """It holds a slot, and marked objects leave it its pixels, in the history and in the output; nobody is told."""
    wide = Seen((0, 2, 0, 6), logit=3.0)
    script = [({1: A}, [C]), ({1: wide, -1: C}, [B]), ({1: wide, -1: C, -2: B}, [])]
    model, session, outputs = play(script, prompts={0: {1: frame_mask(A)}})
    assert [output.object_ids for output in outputs] == [[1]] * 3
    assert [x.object_id for x in session.objects] == [1, -1, -2] and session.obj_ids == [1]
    assert session.get_obj_num() == 1 and session.next_object_id == 2
    assert len({x.slot for x in session.objects}) == 3
    left = wide.mask & ~C.mask
    for output in outputs[1:]:
        assert (output.pred_masks[0, 0] > 0).equal(left)
        assert output.pred_masks[0, 0].abs().equal(torch.where(wide.mask, 3.0, 5.0))
    assert model.histories[2].masks[0, 0].equal(left.float()) and model.histories[2].masks[0, 1].equal(C.mask.float())


def turned(*looks, box=A.box, foreground=0.9):
    """A script in which an object looks from frame to frame as these angles say."""
    return [({1: Seen(box, foreground, look=look)}, []) for look in looks]


def away(outputs) -> list[bool]:
    return [not (output.pred_masks[0] > 0).any() for output in outputs]


def test_marked_objects_must_look_like_themselves():
    """As they did at first or since: one that turns is known, also when it has turned back."""
    script = turned(0, 0.4, 0.8, 1.2, 0, 0.8, -0.8, -0.8, 1.2)
    play_it = partial(play, script, likeness_scale=20, prompts={0: {1: frame_mask(A)}})
    _, _, outputs = play_it()
    assert away(outputs) == [False] * 6 + [True, True, False]  # what was taken for it teaches nothing
    for frame, angle in ((1, 0.4), (6, 0.8)):
        score = torch.tensor(0.9).logit() + 20 * (math.cos(angle) - 0.9)
        torch.testing.assert_close(outputs[frame].scores[0] / 0.5, score.sigmoid())
    assert not any(away(play_it(offset=-1.0)[2]))
    script[1] = turned(0.4, foreground=0.85)[0]  # sure enough to be it, not to say what it looks like
    assert away(play_it()[2]) == [False, False, True, True, False] + [True] * 4


def test_who_looks_like_itself_need_be_less_sure():
    _, _, outputs = play(turned(0, 0, foreground=0.3), likeness_scale=10, prompts={0: {1: frame_mask(A)}})
    assert away(outputs) == [False, False]
    _, _, outputs = play(turned(0, 0, foreground=0.3), prompts={0: {1: frame_mask(A)}})
    assert away(outputs) == [False, True]


def test_found_objects_must_look_like_themselves():
    """From the frame after that in which they were found on; and one that is away is back as soon as it is itself."""
    script = [({}, [A]), *turned(1.5, 3.0, 3.0, foreground=0.95), ({1: Seen(A.box, look=1.5)}, [A])]
    _, session, outputs = play(script, likeness_scale=20)
    assert [output.object_ids for output in outputs] == [[1], [1], [], [], [1]]
    assert [x.object_id for x in session.objects] == [1]
    # Not sure enough to say what it looks like.
    script = [({}, [Seen(A.box, 0.8)]), *turned(1.5, 3.0, foreground=0.89)]
    _, session, outputs = play(script, likeness_scale=20)
    assert [output.object_ids for output in outputs] == [[1]] * 3 and session.objects[0].looks is None


def test_bystanders_need_not_look_like_themselves():
    """One that is let go for its looks would be found anew as another, and what is marked would take its pixels."""
    script = [({1: A}, [C]), *(({1: A, -1: Seen(C.box, 0.95, look=look)}, []) for look in (0, 1.5))]
    _, session, _ = play(script, likeness_scale=20, prompts={0: {1: frame_mask(A)}})
    assert [x.object_id for x in session.objects if not x.absent_frames] == [1, -1]
    assert session.objects[1].looks is None


def test_a_mark_elsewhere_says_what_it_looks_like():
    play_it = partial(play, likeness_scale=20, prompts={0: {1: frame_mask(A)}, 2: {1: frame_mask(C)}})
    script = [*turned(0, 0), ({1: Seen(A.box), 2: Seen(C.box, look=2)}, []), *turned(0, 2)]
    assert away(play_it(script)[2]) == [False, False, False, True, False]
    script = [*turned(0, 0), *turned(0.4, box=C.box), *turned(0, 0.8)]  # the mark agrees with what was followed
    assert away(play_it(script)[2]) == [False] * 5


EMPTY = torch.zeros(16, 24, dtype=torch.bool)


def test_who_is_said_not_to_be_there_is_back_when_something_looks_like_it(tmp_path):
    looks = (0, 1.5, 1.5, 1.5, 0.1, 1.5)
    marks = {0: {1: frame_mask(A)}, 2: {1: EMPTY}}
    play_it = partial(play, turned(*looks, foreground=0.97), likeness_scale=2)
    assert not any(away(play_it(prompts={0: {1: frame_mask(A)}})[2]))  # the network alone is sure of it
    model, session, outputs = play_it(prompts=marks)
    assert away(outputs) == [False, False, True, True, False, False]
    assert [output.object_ids for output in outputs] == [[1]] * 6
    assert outputs[2].pred_masks.shape == (1, 1, 16, 24)  # as in every frame with prompts
    assert [bool(history.masks.any()) for history in model.histories] == [True, True, True, False, False, True]
    assert not session.objects[0].dismissed

    # Where looks aren't asked, the network alone says when it is back; and a mark says so at once.
    assert away(play(turned(*looks), prompts=marks)[2]) == [False, False, True, False, False, False]
    assert away(play_it(prompts=marks | {3: {1: frame_mask(A)}})[2]) == [False, False, True, False, False, False]

    # A saved stream knows.
    _, session, _ = play(turned(*looks[:3], foreground=0.97), likeness_scale=2, prompts=marks)
    session.history = None
    session.save(tmp_path / "stream.safetensors")
    assert [x.dismissed for x in AusmInferenceSession.load(tmp_path / "stream.safetensors").objects] == [True]


def test_what_was_learned_of_something_else_is_dropped_when_that_is_said():
    """The wrong thing was followed for long, surely enough to teach its looks."""
    looks = turned(0, 0.4, 0.7, 0.7, 0.7, 0.7, 0.1, foreground=0.97)
    play_it = partial(play, looks, likeness_scale=1, offset=0.96)
    _, session, outputs = play_it(prompts={0: {1: frame_mask(A)}})
    assert not any(away(outputs)) and len(session.objects[0].looks) > 2
    _, session, outputs = play_it(prompts={0: {1: frame_mask(A)}, 4: {1: EMPTY}})
    assert away(outputs) == [False] * 4 + [True, True, False]


def test_who_has_no_looks_is_back_when_the_network_says_so():
    """Found, never surely seen, and said not to be there: there is nothing that it could look like."""
    script = [({}, [Seen(A.box, 0.8)]), *turned(0, 0, 0, foreground=0.8)]
    model = ScriptedModel(script, likeness_scale=2)
    model.session = session = AusmInferenceSession(find_new_objects=True)
    step_session(model, session, FRAME)
    session.add_prompts(2, [1], [ObjectPrompt(mask=EMPTY)], (16, 24))
    assert away([step_session(model, session, FRAME) for _ in range(3)]) == [False, True, False]


def test_who_was_found_may_be_said_not_to_be_there_and_stays_known():
    script = [({}, [A, B]), ({1: A, 2: B}, []), ({1: Seen(A.box, 0.2), 2: B}, []), ({1: A, 2: B}, [])]
    _, session, _ = play(script, max_age=1)
    assert session.obj_ids == [2]  # by itself it is let go
    session = AusmInferenceSession(find_new_objects=True)
    model = ScriptedModel(script, max_age=1)
    model.session = session
    step_session(model, session, FRAME)
    session.add_prompts(1, [1], [ObjectPrompt(mask=EMPTY)], (16, 24))
    outputs = [step_session(model, session, FRAME) for _ in range(3)]
    assert [output.object_ids for output in outputs] == [[1, 2]] * 3
    assert away(outputs) == [True, True, False] and outputs[0].prompted == [True, False]


def test_who_was_never_followed_needs_no_saying():
    """Its mark of an earlier frame left nothing of it, so there is nobody who could be away."""
    session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [1, 2], [ObjectPrompt(mask=frame_mask(seen)) for seen in (A, B)], (16, 24))
    session.add_prompts(1, [1], [ObjectPrompt(mask=EMPTY)], (16, 24))
    del session.prompts[0][1]
    _, _, outputs = play([({2: B}, [])] * 2, session)
    assert [output.object_ids for output in outputs] == [[2], [2]] and not session.prompts and session.obj_ids == [2]


def test_a_mark_elsewhere_says_what_it_is():
    """What was followed in its place was a cat; it is a dog. Until the network has answered for it nobody knows."""
    cat, dog = Seen(A.box, 0.9, dog=0.1), Seen(B.box, 0.8, dog=0.7)
    script = [({1: cat}, []), ({1: cat}, []), ({1: dog}, []), ({1: Seen(A.box, 0.2, dog=0.0)}, []), ({1: dog}, [])]
    session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    session.add_prompts(1, [1], [ObjectPrompt(mask=frame_mask(B))], (16, 24))
    session.add_prompts(3, [1], [ObjectPrompt(mask=frame_mask(B))], (16, 24))
    _, _, outputs = play(script, session)
    assert [output.labels for output in outputs] == [["cat"], [None], ["dog"], ["dog"], ["dog"]]
    # The fourth frame's mark says that it is there, and the network's answer for where it was not is nobody's.
    assert outputs[1].scores.tolist() == [1]
    torch.testing.assert_close([float(x.scores) for x in outputs[2:]], [0.8 * 0.7, 0.7, 0.8 * 0.7])


def test_of_marks_that_share_pixels_the_smaller_is_on_top():
    """Whatever the order, and each mark comes back whole in the output; of two alike the first is."""
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    whole, part = torch.zeros(16, 24, dtype=torch.bool), torch.zeros(16, 24, dtype=torch.bool)
    whole[4:12, 4:20] = part[6:8, 6:10] = True
    for ids in ([1, 2], [2, 1]):
        session = AusmInferenceSession(seed=0)
        marks = {1: whole, 2: part}
        session.add_prompts(0, ids, [ObjectPrompt(mask=marks[x]) for x in ids], (16, 24))
        _, _, (output,) = play([(dict.fromkeys(ids, A), [])], session)
        assert output.object_ids == ids and (output.pred_masks[:, 0] > 0).equal(torch.stack([marks[x] for x in ids]))
        (result,) = processor.post_process_instance_segmentation(output, target_sizes=[(16, 24)])
        assert result["segmentation"].equal(whole.int() + part.int())
    session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [5, 6], [ObjectPrompt(mask=part)] * 2, (16, 24))
    _, _, (output,) = play([({5: A, 6: A}, [])], session)
    (result,) = processor.post_process_instance_segmentation(output, target_sizes=[(16, 24)])
    assert result["segmentation"].equal(5 * part.int())


def test_a_mark_of_one_that_is_away_adds_to_what_it_looks_like():
    play_it = partial(play, likeness_scale=20, prompts={0: {1: frame_mask(A)}, 3: {1: frame_mask(A)}})
    assert away(play_it(turned(0, 0, 2, 2, 2, 0))[2]) == [False, False, True, False, False, False]


def test_looks_that_are_remembered():
    """The first one, and the last ones that were new: a number that doesn't grow."""
    followed, angles = FollowedObject(1, slot=0, prompted=True), [0.3 * n for n in range(12)]
    looks = [torch.tensor([math.cos(angle), math.sin(angle)]) for angle in angles]
    assert followed.likeness(looks[0]) == 0
    for look in looks:
        for _ in range(2):  # the second time it is known
            followed.remember(look)
    assert followed.looks.equal(torch.stack([looks[0], *looks[-7:]]))
    assert followed.likeness(looks[1]).item() == pytest.approx(math.cos(0.3))
    assert followed.likeness(looks[-2]).item() == pytest.approx(1)


def test_bystanders_need_but_be_likely():
    """Whatever is asked of objects that are found; less where less is asked of these."""
    faint, fainter = Seen(C.box, foreground=0.35), Seen(B.box, foreground=0.2)
    script = [({1: A}, [faint, fainter]), ({1: A, -1: faint, -2: fainter}, [])]
    for threshold, number in ((0.9, 2), (0.1, 3)):
        session = AusmInferenceSession(seed=0, foreground_threshold=threshold)
        play(script, session, prompts={0: {1: frame_mask(A)}})
        assert len(session.objects) == number and all(x.absent_frames == 0 for x in session.objects)


def test_a_bystander_that_is_marked_is_the_marked_object():
    script = [({1: A}, [C]), ({1: A, -1: C}, []), ({1: A, 2: C}, [])]
    _, session, outputs = play(script, prompts={0: {1: frame_mask(A)}, 1: {2: frame_mask(C)}})
    assert [output.object_ids for output in outputs] == [[1], [1, 2], [1, 2]]
    assert [x.object_id for x in session.objects] == [1, 2]


def test_of_bystanders_that_become_one_the_older_stays():
    script = [({1: A}, [B]), ({1: A, -1: B}, [C]), ({1: A, -1: C, -2: C}, [])]
    _, session, _ = play(script, prompts={0: {1: frame_mask(A)}})
    assert [x.object_id for x in session.objects] == [1, -1]


def test_bystanders_become_objects_when_new_ones_are_asked_for():
    dog = Seen(C.box, dog=0.9)
    script = [({1: A}, [dog]), ({1: A, -1: dog}, [B]), *[({1: A, 2: dog, 3: B}, [])] * 2]
    model = ScriptedModel(script)
    session = model.session = AusmInferenceSession(seed=0)
    session.add_prompts(0, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    outputs = [step_session(model, session, FRAME)]
    session.find_new_objects = True
    outputs += [step_session(model, session, FRAME) for _ in range(3)]
    assert [output.object_ids for output in outputs] == [[1], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert all((output.pred_masks[1, 0] > 0).equal(C.mask) for output in outputs[1:])


def test_a_bystander_that_is_out_of_view_is_let_go():
    """To be found anew; the id of a marked object waits."""
    script = [({1: A}, [C]), ({1: A, -1: C}, []), ({-1: NOTHING}, []), ({}, [C])]
    _, session, _ = play(script[:3], prompts={0: {1: frame_mask(A)}})
    assert [x.object_id for x in session.objects] == [1]
    _, session, _ = play(script, prompts={0: {1: frame_mask(A)}})
    assert [x.object_id for x in session.objects] == [1, -1]


def test_what_was_found_takes_in_nothing_from_afar():
    """With a radius of one cell of stride 8: what comes into view farther away is an object of its own."""
    wide = Seen((0, 2, 0, 6), logit=3.0)
    script = [({}, [A]), ({1: wide}, [C])]
    _, _, outputs = play(script, radius=1)
    assert [output.object_ids for output in outputs] == [[1], [1, 2]]
    near = torch.zeros(4, 6, dtype=torch.bool)
    near[:2, :4] = True
    assert (outputs[1].pred_masks[0, 0] > 0).equal(near)
    # Masks that aren't propagated may be anywhere, and what is marked may too.
    _, _, outputs = play(script, radius=0)
    assert outputs[1].object_ids == [1] and (outputs[1].pred_masks[0, 0] > 0).equal(wide.mask)
    script = [({1: A}, [B]), ({1: wide, -1: B}, [])]
    _, session, outputs = play(script, prompts={0: {1: frame_mask(A)}}, radius=1)
    assert [x.prompted for x in session.objects] == [True, False]
    assert (outputs[1].pred_masks[0, 0] > 0).equal(wide.mask)


def test_what_was_found_and_is_away_may_come_back_anywhere():
    """Where a detection draws it too; otherwise it is taken for something that looks alike. A leap is that too."""
    script = [({}, [A]), ({1: C}, []), ({1: C}, [])]
    for detected, ids in (([], []), ([B], [2]), ([Seen(C.box, foreground=0.2)], []), ([Seen(C.box, 0.35)], [1])):
        _, _, outputs = play([*script[:2], ({1: C}, detected)], radius=1)
        assert [output.object_ids for output in outputs] == [[1], [], ids]
    assert (outputs[2].pred_masks[0, 0] > 0).equal(C.mask)


def test_bystanders_are_the_first_to_give_way(caplog):
    """No warning when there are more than slots, and marked objects get theirs."""
    script = [({1: A}, [B, C]), ({1: A, -1: B}, [C]), ({1: A, 2: B}, [])]
    _, session, outputs = play(script, prompts={0: {1: frame_mask(A)}, 1: {2: frame_mask(C)}}, num_id_vectors=2)
    assert [output.object_ids for output in outputs] == [[1], [1, 2], [1, 2]] and not caplog.records
    assert [x.object_id for x in session.objects] == [1, 2]


def test_prompt_on_a_later_frame_joins_after_its_step_with_an_id_of_its_own():
    session = AusmInferenceSession(find_new_objects=True)
    model, session, outputs = play(
        [({}, [A]), ({6: A}, []), ({6: A, 5: B}, [])], session, prompts={1: {5: frame_mask(B)}}
    )
    assert [output.object_ids for output in outputs] == [[6], [6, 5], [6, 5]]  # 5 was spoken for
    assert [history.slots.shape[1] for history in model.histories] == [0, 1, 2]
    torch.testing.assert_close(model.histories[2].masks[0], torch.stack([A.mask, B.mask]).float())
    assert outputs[1].labels == ["cat", None] and outputs[1].label_ids == [0, -1]
    assert outputs[1].scores[1] == 1
    assert outputs[2].labels == ["cat", "cat"]
    assert (outputs[1].pred_masks[1, 0] > 0).equal(frame_mask(B)) and outputs[1].pred_masks.max() == PROMPT_LOGIT


def test_prompt_for_a_followed_object_replaces_its_mask_and_takes_pixels_from_others():
    corner = Seen((3, 4, 0, 2))  # half of B
    model = ScriptedModel([({}, [A, B]), ({1: A, 2: B}, []), ({1: corner, 2: B}, [])])
    model.session = session = AusmInferenceSession(find_new_objects=True)
    step_session(model, session, FRAME)
    session.add_prompts(1, [1], [ObjectPrompt(mask=frame_mask(corner))], (16, 24))
    output = step_session(model, session, FRAME)
    step_session(model, session, FRAME)
    assert output.object_ids == [1, 2] and output.prompted == [True, False]
    torch.testing.assert_close(model.histories[2].masks[0], torch.stack([corner.mask, B.mask & ~corner.mask]).float())


@pytest.mark.parametrize("prompted_id", [1, 5])
def test_prompt_replaces_a_found_object_that_it_is_the_same_as(prompted_id):
    """Whether the id is new or that of another object that was found: nothing is followed twice."""
    model = ScriptedModel([({}, [A, B]), ({1: A, 2: B}, [B]), ({1: B, 5: B}, [B])])
    model.session = session = AusmInferenceSession(find_new_objects=True)
    step_session(model, session, FRAME)
    session.add_prompts(None, [prompted_id], [ObjectPrompt(mask=frame_mask(B))], (16, 24))
    ids = [step_session(model, session, FRAME).object_ids for _ in range(2)]
    assert ids == ([[1], [1]] if prompted_id == 1 else [[1, 5], [5]])  # then A, by the script, is where B is


def test_detection_where_a_prompt_is_is_a_duplicate():
    session = AusmInferenceSession(find_new_objects=True)
    assert play([({1: NOTHING}, [A, B])], session, {0: {1: frame_mask(A)}})[2][0].object_ids == [1, 2]


def test_prompts_take_the_slots_of_found_objects_that_are_missed_least():
    session = AusmInferenceSession(find_new_objects=True)
    sure, unsure, prompted = Seen(A.box, 0.9), Seen(B.box, 0.8), Seen((2, 3, 4, 6), 0.1)
    later = ({5: prompted, 8: sure, 9: unsure}, [])  # 10 is absent
    script = [({5: prompted}, [sure, unsure, Seen(C.box, 0.7)]), later, later]
    one, two = Seen((3, 4, 3, 4)), Seen((3, 4, 4, 5))
    prompts = {0: {5: frame_mask(prompted)}, 2: {6: frame_mask(one), 7: frame_mask(two)}}
    _, session, outputs = play(script, session, prompts, num_id_vectors=4)
    assert [output.object_ids for output in outputs] == [[5, 8, 9, 10], [5, 8, 9], [5, 8, 6, 7]]
    assert sorted(x.slot for x in session.objects) == [0, 1, 2, 3]


def test_the_session_does_not_grow():
    session = play([({}, [A])] + [({1: A}, [B]), ({1: A, 2: B}, [])] + [({1: A, 2: B}, [])] * 20)[1]
    assert session.results is None and len(session.objects) == 2 and not session.prompts
    kept = play([({}, [A]), ({1: A}, [])], AusmInferenceSession(keep_results=True))[1]
    assert list(kept.results) == [0, 1] and kept.results[1].object_ids == [1]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (torch.zeros(3, 32, 24), r"frame must have the size of the frames before it, \(16, 24\)"),
        (torch.zeros(1, 16, 24), "frame must have shape"),
        (torch.zeros(2, 3, 16, 24), "frame must have shape"),
        (torch.zeros(3, 16, 24, dtype=torch.uint8), "frame must be a floating point tensor"),
        ([0, 1], "frame must be a floating point tensor"),
    ],
)
def test_wrong_frames_leave_the_session_as_it_was(frame, message):
    model, session, _ = play([({}, [A]), ({1: A}, [])][:1])
    model.script.append(({1: A}, []))
    with pytest.raises(ValueError, match=message):
        step_session(model, session, frame)
    assert session.next_frame_idx == 1
    assert step_session(model, session, FRAME[None]).object_ids == [1]


def test_more_prompts_than_id_vectors():
    masks = {i: frame_mask(A) for i in range(1, 4)}
    with pytest.raises(ValueError, match="at most 2, the number of ID vectors, got 3"):
        play([({}, [])], prompts={0: masks}, num_id_vectors=2)
    with pytest.raises(ValueError, match="at most 2, the number of ID vectors, got 3"):
        play([({1: A, 2: B}, [])] * 2, prompts={0: {1: masks[1], 2: masks[2]}, 1: {3: masks[3]}}, num_id_vectors=2)


@pytest.mark.parametrize(
    ("frame_idx", "obj_ids", "masks", "message"),
    [
        (0, [1], [torch.ones(16, 24)], "frame_idx must be an integer of at least 1"),
        ("1", [1], [torch.ones(16, 24)], "frame_idx must be an integer"),
        (9, [1], [torch.ones(16, 24)], "frame_idx must be below 9"),
        (1, [0], [torch.ones(16, 24)], r"obj_ids must be positive integers below 2\*\*30, got 0"),
        (1, ["cat"], [torch.ones(16, 24)], r"obj_ids must be positive integers below 2\*\*30, got 'cat'"),
        (1, [True], [torch.ones(16, 24)], r"obj_ids must be positive integers below 2\*\*30, got True"),
        (1, [], [], "at least one object"),
        (1, [2, 2], [torch.ones(16, 24)] * 2, "each one once"),
        (1, [1], [torch.ones(24, 16)], r"size of the video, \(16, 24\)"),
        (1, [1], [torch.zeros(16, 24)], "empty mask for object 1"),
    ],
)
def test_wrong_prompts(frame_idx, obj_ids, masks, message):
    session = AusmInferenceSession(num_frames=9)
    play([({}, [])], session)
    with pytest.raises(ValueError, match=message):
        session.add_prompts(frame_idx, obj_ids, [ObjectPrompt(mask=mask) for mask in masks], (16, 24))
    assert not session.prompts and session.next_object_id == 1 and session.video_height is None


def test_propagating():
    def started(length=5, **kwargs):
        model = ScriptedModel([({}, [])] * 10)
        model.session = AusmInferenceSession(video=(FRAME for _ in range(length)), **kwargs)
        return model, model.session

    def indices(model, session, *args):
        return [output.frame_idx for output in propagate_in_video_iterator(model, session, *args)]

    model, session = started()
    assert indices(model, session, None, 1) == [0, 1]  # as many after the first as asked for, as in SAM 2
    assert indices(model, session) == [2, 3, 4] and indices(model, session) == []
    assert indices(*started(), 3, 9) == [3, 4]
    assert indices(*started(), 0, 0) == [0]
    assert indices(*started(num_frames=5), 5) == []

    model, session = started()
    frames = propagate_in_video_iterator(model, session, show_progress_bar=True)
    assert next(frames).frame_idx == 0 and session.next_frame_idx == 1  # one at a time


@pytest.mark.parametrize(
    ("find", "followed", "first"), [(None, {}, 2), (False, {}, 2), (True, {}, 0), (None, {1: A}, 1)]
)
def test_propagating_begins_where_there_is_something_to_follow(find, followed, first):
    """As in SAM 2, whose outputs begin at the first prompt."""
    model = ScriptedModel([(followed if first < 2 else {9: B}, [])] * 4)
    model.session = session = AusmInferenceSession(video=[FRAME] * 4, find_new_objects=find)
    if followed:
        session.add_prompts(0, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
        next(propagate_in_video_iterator(model, session))
    session.add_prompts(3, [8], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    session.add_prompts(2, [9], [ObjectPrompt(mask=frame_mask(B))], (16, 24))
    assert [output.frame_idx for output in propagate_in_video_iterator(model, session)] == list(range(first, 4))


def test_prompts_that_come_after_propagating_was_asked_for_are_not_passed_over():
    model = ScriptedModel([({1: A}, [])] * 2)
    model.session = session = AusmInferenceSession(video=[FRAME] * 3)
    frames = propagate_in_video_iterator(model, session, 2)
    session.add_prompts(1, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    with pytest.raises(ValueError, match="prompts of frame 1"):
        next(frames)
    assert session.next_frame_idx == 0
    assert [output.frame_idx for output in propagate_in_video_iterator(model, session)] == [1, 2]


def test_wrong_propagation():
    model = ScriptedModel([({}, [])] * 10)

    def session(**kwargs):
        model.session = AusmInferenceSession(video=[FRAME] * 3, **kwargs)
        return model.session

    with pytest.raises(ValueError, match="made with a video"):
        propagate_in_video_iterator(model, AusmInferenceSession())
    with pytest.raises(ValueError, match="must not be negative"):
        propagate_in_video_iterator(model, session(), max_frame_num_to_track=-1)
    with pytest.raises(ValueError, match="at most 3"):
        propagate_in_video_iterator(model, session(num_frames=3), 4)
    with pytest.raises(ValueError, match="at most 3"):
        list(propagate_in_video_iterator(model, session(), 4))
    prompted = session()
    prompted.add_prompts(1, [1], [ObjectPrompt(mask=frame_mask(A))], (16, 24))
    with pytest.raises(ValueError, match="prompts of frame 1"):
        propagate_in_video_iterator(model, prompted, 2)
    running = session()
    next(propagate_in_video_iterator(model, running))
    with pytest.raises(ValueError, match="at least 1, the next frame"):
        propagate_in_video_iterator(model, running, 0)


def test_threshold_is_a_probability():
    with pytest.raises(ValueError, match="foreground_threshold"):
        AusmInferenceSession(foreground_threshold=1.5)


def test_streaming_a_real_network(tiny_model, moving_square):
    """Found objects and prompts together, from a video; one object is lost and its slot is taken by another."""
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    session = processor.init_video_session(video=frames, find_new_objects=True, foreground_threshold=0.01, seed=0)
    processor.add_inputs_to_inference_session(session, 0, 9, input_masks=masks[0])
    processor.add_inputs_to_inference_session(session, 3, [9, 7], input_masks=[masks[3], masks[0]])
    outputs = list(tiny_model.propagate_in_video_iterator(session))
    assert [output.frame_idx for output in outputs] == list(range(6))
    assert all(9 in output.object_ids for output in outputs) and all(7 in output.object_ids for output in outputs[3:])
    assert session.get_obj_num() == session.history.slots.shape[1] == session.history.masks.shape[1] <= 4
    assert len({x.slot for x in session.objects}) == session.get_obj_num()
    for t in (0, 3):
        (result,) = processor.post_process_instance_segmentation(outputs[t], target_sizes=[(48, 64)])
        assert ((result["segmentation"] == 9).numpy() == (masks[t] == 1)).all()
    assert all(output.pred_masks.shape[1:] == (1, 16, 24) for output in (outputs[1], outputs[2], outputs[4]))
    assert all(output.pred_masks.isfinite().all() for output in outputs)


def test_frames_one_by_one_equal_a_video(tiny_model, moving_square):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    streamed, whole = (processor.init_video_session(video=video, seed=1) for video in (None, frames))
    for session in (streamed, whole):
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=masks[0], original_size=(48, 64))
    for frame, expected in zip(frames, tiny_model.propagate_in_video_iterator(whole), strict=True):
        output = tiny_model(inference_session=streamed, frame=processor(images=frame)["pixel_values"][0])
        assert torch.equal(output.pred_masks, expected.pred_masks) and output.object_ids == expected.object_ids == [1]
    with pytest.raises(ValueError, match="size of the frames before it"):
        tiny_model(inference_session=streamed, frame=torch.zeros(3, 64, 64))


@pytest.mark.parametrize("what", ["the step", "reading"])
def test_what_fails_at_a_frame_of_the_video_goes_on_with_that_frame(tiny_model, moving_square, monkeypatch, what):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    failures = iter([2])

    class Video:
        index = -1

        def __iter__(self):
            return self

        def __next__(self):
            if what == "reading" and self.index == next(failures, None):
                raise OSError("away for a moment")
            self.index += 1
            if self.index == len(frames):
                raise StopIteration
            return frames[self.index]

    def outputs(video, session=None):
        if session is None:
            session = processor.init_video_session(video=video, seed=1)
            processor.add_inputs_to_inference_session(session, 0, 1, input_masks=masks[0])
        return session, tiny_model.propagate_in_video_iterator(session)

    wanted = list(outputs(list(frames))[1])
    session, iterator = outputs(Video())
    got = [next(iterator)]
    if what == "the step":
        step = tiny_model.step

        def interrupted(*arguments, **named):
            monkeypatch.setattr(tiny_model, "step", step)
            raise KeyboardInterrupt

        monkeypatch.setattr(tiny_model, "step", interrupted)
    with pytest.raises((OSError, KeyboardInterrupt)):
        for output in iterator:
            got.append(output)
            failures = iter([session.next_frame_idx - 1])
    got += outputs(None, session)[1]
    assert [output.frame_idx for output in got] == list(range(6))
    assert all(torch.equal(a.pred_masks, b.pred_masks) for a, b in zip(got, wanted, strict=True))


def test_a_frame_that_is_not_finite_is_refused(tiny_model, moving_square):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    pixels = [processor(images=frame)["pixel_values"] for frame in frames[:2]]
    session = processor.init_video_session(seed=1)
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=masks[0], original_size=(48, 64))
    tiny_model(inference_session=session, frame=pixels[0])
    broken = pixels[1].clone()
    broken[0, 1, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="frame must hold finite values"):
        tiny_model(inference_session=session, frame=broken)
    assert session.next_frame_idx == 1 and tiny_model(inference_session=session, frame=pixels[1]).object_ids == [1]


def test_saving_into_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*gone"):
        AusmInferenceSession().save(tmp_path / "gone" / "stream.safetensors")


def test_outputs_of_whole_clips_say_not_who_is_who(tiny_model):
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    with torch.no_grad():
        output = tiny_model(torch.zeros(1, 1, 3, 64, 96))
    with pytest.raises(ValueError, match="wanted are those of a stream"):
        processor.post_process_instance_segmentation(output, target_sizes=[(64, 96)])


def test_frames_from_elsewhere_are_refused_by_a_session_with_a_video(tiny_model, moving_square):
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    session = processor.init_video_session(video=moving_square[0])
    with pytest.raises(ValueError, match="made with a video"):
        tiny_model(inference_session=session, frame=processor(images=moving_square[0][0])["pixel_values"])
    assert [output.frame_idx for output in tiny_model.propagate_in_video_iterator(session)] == list(range(6))


def test_a_failed_step_draws_nothing(tiny_model, moving_square):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    frame = processor(images=frames[0])["pixel_values"]
    slots = []
    for fails in (False, True):
        session = processor.init_video_session(seed=1)
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=masks[0], original_size=(48, 64))
        if fails:
            with pytest.raises(ValueError, match="label_set"):
                tiny_model.step_sessions([session, processor.init_video_session(label_set="none")], [frame] * 2)
        tiny_model(inference_session=session, frame=frame)
        slots.append(session.objects[0].slot)
    assert slots[0] == slots[1]


def test_what_is_interrupted_in_one_of_several_streams_moves_none(tiny_model, moving_square, monkeypatch, tmp_path):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    pixels = [processor(images=frame)["pixel_values"] for frame in frames]

    def streams():
        made = [processor.init_video_session(seed=n, find_new_objects=True, keep_results=True) for n in (1, 2)]
        for session in made:
            session.foreground_threshold = 0.01
            processor.add_inputs_to_inference_session(session, 0, 1, input_masks=masks[0], original_size=(48, 64))
            processor.add_inputs_to_inference_session(session, 2, [1, 9], input_masks=[masks[2]] * 2)
        return made

    def saved(sessions):
        for session in sessions:
            session.save(tmp_path / "stream.safetensors")
            with safe_open(tmp_path / "stream.safetensors", "pt") as file:
                tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}
                yield file.metadata(), tensors, list(session.results)

    describe, interrupted = identities_ausm._describe, streams()

    def interrupt(session, *others):
        if session is interrupted[1]:
            raise KeyboardInterrupt
        return describe(session, *others)

    wanted = streams()
    for frame in pixels[:4]:
        before = list(saved(interrupted))
        monkeypatch.setattr(identities_ausm, "_describe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny_model.step_sessions(interrupted, [frame] * 2)
        assert list(saved(interrupted)) == before
        monkeypatch.setattr(identities_ausm, "_describe", describe)
        tiny_model.step_sessions(interrupted, [frame] * 2)
        tiny_model.step_sessions(wanted, [frame] * 2)
    assert list(saved(interrupted)) == list(saved(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(tiny_model, moving_square, dtype):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))

    def outputs():
        session = processor.init_video_session(video=frames, seed=1, find_new_objects=True, foreground_threshold=0.01)
        points = {"input_points": [[[20, 20], [60, 40]]], "input_labels": [[1, 0]]}
        processor.add_inputs_to_inference_session(session, 0, 8, **points)
        processor.add_inputs_to_inference_session(session, 1, 9, input_boxes=[8, 8, 30, 30])
        return list(tiny_model.propagate_in_video_iterator(session))

    wanted = outputs()
    try:
        torch.set_default_dtype(dtype)
        got = outputs()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(wanted, got, strict=True):
        assert a.object_ids == b.object_ids
        for one, other in ((a.pred_masks, b.pred_masks), (a.scores, b.scores)):
            assert torch.equal(one, other) and other.dtype == torch.float32


def test_history_has_a_constant_size(tiny_model, moving_square, monkeypatch):
    frames, masks = moving_square
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    session = processor.init_video_session(video=np.concatenate([frames] * 3))
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=masks[0])
    session.foreground_threshold = 1.0
    monkeypatch.setattr(identities_ausm, "BYSTANDER_THRESHOLD", 1.0)  # or there may be as many as ID vectors
    sizes = {session.history.num_bytes for _ in tiny_model.propagate_in_video_iterator(session)}
    assert len(sizes) == 1
