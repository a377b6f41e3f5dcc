"""Commands to a session in any order: documented errors only, and what a stream promises holds after each."""

import json
import random
from types import SimpleNamespace

import torch
from fuzzing import numbers, tries
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ausm_hf.model.history_ausm import AusmHistory
from ausm_hf.model.pixels_ausm import AusmFrameFeatures
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.model.session_ausm import AusmInferenceSession
from ausm_hf.model.streaming_ausm import preview_prompts, step_session, step_sessions

SIZE, SLOTS, DETECTIONS = (16, 24), 3, 4  # of frames
FRAME = torch.zeros(3, *SIZE)


class ErraticModel:
    """A network that sees objects at random: the answers are a function of the seed and the frame's number alone."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, seed: int):
        self.seed = seed
        self.config = SimpleNamespace(
            hidden_size=1,
            num_compressor_layers=1,
            remember_appearance=False,
            likeness_scale=3.0,
            likeness_offset=0.5,
            num_id_vectors=SLOTS,
            foreground_threshold=0.5,
            duplicate_overlap=0.5,
            mask_propagation_radius=1,
            max_age=3,
            label_sets={"pets": ["cat", "dog"]},
            default_label_set="pets",
        )

    def encode_frames(self, pixel_values):
        stride_4 = pixel_values[:, :1, ::4, ::4]
        return AusmFrameFeatures((stride_4,), stride_4)

    def init_history(self, batch_size):
        return AusmHistory.empty(batch_size, "cpu", torch.float32)

    def describe_objects(self, history, masks):
        generator = torch.Generator().manual_seed(1000 * self.seed - int(history.features.max()))
        looks = torch.randn(SLOTS, 1, generator=generator)[torch.arange(masks.shape[1])[None] % SLOTS]
        return looks.sign() * (masks > 0).flatten(2).any(-1, keepdim=True)

    def step(self, pixel_values, history, label_set=None):
        batch, held = history.slots.shape
        height, width = pixel_values.stride_4.shape[-2:]
        answers = []
        for i in range(batch):
            steps = 0 if history.features is None else int(history.features[i].max())
            generator = torch.Generator().manual_seed(1000 * self.seed + steps)
            # As many rows as there may ever be; a followed object's is that of its slot.
            rows = [*history.slots[i].tolist(), *range(SLOTS, SLOTS + DETECTIONS)]
            centres = (
                torch.rand(SLOTS + DETECTIONS, 2, 1, 1, generator=generator) * torch.tensor(SIZE)[:, None, None] / 4
            )
            grid = torch.stack(torch.meshgrid(torch.arange(1.0 * height), torch.arange(1.0 * width), indexing="ij"))
            masks = 1.5 - (grid - centres).abs().amax(1)
            masks[torch.rand(len(masks), generator=generator) < 0.2] = -1
            foreground = 3 * torch.randn(SLOTS + DETECTIONS, generator=generator)
            answers.append((masks[rows], foreground[rows], torch.zeros(len(rows), 3)))
        masks, foreground, classes = (torch.stack(x) for x in zip(*answers))
        before = torch.zeros(batch, 1, 1, 1) if history.features is None else history.features
        after = AusmHistory(before + 1, ((before, before),), history.slots, history.taken, history.masks)
        return SimpleNamespace(
            masks_queries_logits=masks,
            foreground_queries_logits=foreground,
            class_queries_logits=classes,
            history=after,
        )


def same(a, b) -> bool:
    return a.object_ids == b.object_ids and torch.equal(a.pred_masks, b.pred_masks) and torch.equal(a.scores, b.scores)


def check_promises(session, ever_used: set[int]):
    ids = [x.object_id for x in session.objects if not x.is_bystander]
    slots = [x.slot for x in session.objects]
    assert len(set(ids)) == len(ids) <= SLOTS and all(i >= 1 for i in ids)
    assert len(set(slots)) == len(slots) and all(0 <= slot < SLOTS for slot in slots)
    assert len({x.object_id for x in session.objects}) == len(slots)  # bystanders too
    assert session.next_object_id > max([0, *ids, *ever_used])
    if session.history is not None:
        assert session.history.slots.tolist() == [slots]
        assert len(session.history.masks[0]) == len(slots) and session.history.masks.isfinite().all()
    assert all(frame_idx >= session.next_frame_idx and given for frame_idx, given in session.prompts.items())


def check_output(output, session, ever_used: set[int]):
    assert output.frame_idx == session.next_frame_idx - 1
    assert len(set(output.object_ids)) == len(output.object_ids) and set(output.object_ids) <= set(session.obj_ids)
    number = len(output.object_ids)
    assert output.pred_masks.shape[:2] == (number, 1) and output.pred_masks.isfinite().all()
    assert len(output.scores) == len(output.labels) == len(output.label_ids) == len(output.prompted) == number
    assert ((output.scores >= 0) & (output.scores <= 1)).all()
    ever_used.update(output.object_ids)


def prompts_at(coordinate):
    point = st.tuples(coordinate, coordinate)
    points = st.lists(point, max_size=3).map(tuple)
    labels = st.lists(st.sampled_from([1, 1, 0]), max_size=3).map(tuple)
    return st.one_of(
        st.builds(lambda n: ObjectPrompt(mask=torch.arange(16 * 24).view(SIZE) % 7 < n), st.integers(0, 7)),
        st.builds(lambda a, b: ObjectPrompt(box=(*a, *b)), point, point),
        st.builds(lambda p: ObjectPrompt(points=p, labels=(1,) * len(p)), points),
        st.builds(lambda p, x: ObjectPrompt(points=p, labels=x), points, labels),
        st.builds(lambda p: ObjectPrompt(scribble=p), points),
    )


sound = st.builds(
    lambda x, y, mask: ObjectPrompt(mask=mask) if x > 8 else ObjectPrompt(box=(x, y, x + 7, y + 5)),
    st.integers(0, 15),
    st.integers(0, 10),
    st.builds(lambda n: torch.arange(16 * 24).view(SIZE) % 7 < n, st.integers(1, 6)),
)
away = st.just(ObjectPrompt(mask=torch.zeros(SIZE, dtype=torch.bool)))
prompts = st.one_of(sound, sound, away, prompts_at(st.integers(0, 15)), prompts_at(st.integers(-3, 26)))
object_ids = st.one_of(
    st.lists(st.integers(1, 6), min_size=1, max_size=2, unique=True), st.lists(st.integers(0, 6), max_size=3)
)
COMMANDS = st.one_of(
    st.tuples(st.just("step")),
    st.tuples(st.just("step")),
    st.tuples(st.just("prompt"), st.just(0), object_ids, st.tuples(prompts, prompts, prompts)),
    st.tuples(st.just("prompt"), st.none() | st.integers(-1, 3), object_ids, st.tuples(prompts, prompts, prompts)),
    st.tuples(st.just("remove"), st.integers(0, 8)),
    st.tuples(st.just("preview")),
    st.tuples(st.just("save and load")),
    st.tuples(st.just("step beside another")),
    st.tuples(st.just("frame of another size")),
)


@numbers(40, 3000)
def test_any_order(examples, tmp_path):
    path = tmp_path / "stream.safetensors"

    @tries(examples)
    @given(st.lists(COMMANDS, min_size=1, max_size=20), st.sampled_from([None, True, False]), st.integers(0, 50))
    def check(commands, find_new_objects, seed):
        model = ErraticModel(seed)
        session = AusmInferenceSession(seed=seed, find_new_objects=find_new_objects)
        ever_used, said = set(), set()  # ids that were seen, ids that the user gave
        for name, *arguments in commands:
            before = (session.next_frame_idx, session.obj_ids, {k: dict(v) for k, v in session.prompts.items()})
            try:
                if name == "step":
                    known = session.next_object_id
                    output = step_session(model, session, FRAME)
                    assert all(i in before[1] or i in said or i >= known for i in output.object_ids)  # none comes back
                    check_output(output, session, ever_used)
                elif name == "prompt":
                    offset, ids, given_prompts = arguments
                    frame_idx = None if offset is None else session.next_frame_idx + offset
                    session.add_prompts(frame_idx, ids, given_prompts[: len(ids)], SIZE)
                    said.update(ids)
                elif name == "remove":
                    session.remove_object(arguments[0])
                    assert arguments[0] not in session.obj_ids
                elif name == "preview":
                    preview = preview_prompts(model, session, FRAME)
                    assert set(preview) <= set(session.prompts.get(session.next_frame_idx, {}))
                    assert all(mask.shape == SIZE and mask.dtype == torch.bool for mask in preview.values())
                    assert before[0] == session.next_frame_idx
                elif name == "save and load":
                    session.save(path)
                    loaded = AusmInferenceSession.load(path)
                    one, other = AusmInferenceSession.load(path), AusmInferenceSession.load(path)
                    outputs = []
                    for copy in (one, other):
                        try:
                            outputs.append(step_session(model, copy, FRAME))
                        except ValueError:
                            outputs.append(None)
                    assert outputs == [None, None] or same(*outputs)
                    session = loaded
                elif name == "step beside another":
                    other = AusmInferenceSession(seed=1)
                    if session.history is None:
                        step_session(model, other, FRAME)
                    output, _ = step_sessions(model, [session, other], [FRAME, FRAME])
                    check_output(output, session, ever_used)
                else:
                    step_session(model, session, torch.zeros(3, 32, 32 + 16 * len(session.obj_ids)))
            except ValueError as error:
                assert str(error)
                assert before == (session.next_frame_idx, session.obj_ids, session.prompts)
            check_promises(session, ever_used)

    check()


@numbers(60, 5000)
def test_damaged_files(examples, tmp_path):
    """A saved stream of which bytes, or what is noted beside its tensors, were changed: loaded, or a ValueError."""
    rng = random.Random(0)
    model, session = ErraticModel(3), AusmInferenceSession(seed=3, find_new_objects=True)
    for _ in range(3):
        step_session(model, session, FRAME)
    session.add_prompts(4, [9], [ObjectPrompt(points=((3, 3),), labels=(1,))], SIZE)
    session.save(tmp_path / "sound")
    original, tensors = (tmp_path / "sound").read_bytes(), load_file(tmp_path / "sound")
    with safe_open(tmp_path / "sound", framework="pt") as file:
        ((tag, state),) = ((key, value) for key, value in file.metadata().items() if key != "format")
    refused = 0
    for number in range(examples):
        kind = rng.choice(["cut", "bytes", "state", "state", "tensors"])
        if kind in ("cut", "bytes"):
            content = bytearray(original)
            if kind == "cut":
                content = content[: rng.randrange(len(content))]
            else:
                content[rng.randrange(len(content))] = rng.randrange(256)
            (tmp_path / "damaged").write_bytes(content)
        else:
            kept, changed = dict(tensors), json.loads(state)
            if kind == "tensors":
                name = rng.choice(sorted(kept))
                kept.pop(name)
                if rng.random() < 0.5:
                    kept[name] = torch.zeros(rng.choice([(), (0,), (1, 2), (3, 3)]))
            else:
                changed[rng.choice(sorted(changed))] = rng.choice([None, -1, "abc", [], {}, [[1]], [1, 2], 0.5, True])
            save_file(kept, tmp_path / "damaged", metadata={tag: json.dumps(changed)})
        try:
            AusmInferenceSession.load(tmp_path / "damaged")
        except ValueError as error:
            assert "path must be a saved session" in str(error), (number, error)
            refused += 1
    assert refused > examples / 4
