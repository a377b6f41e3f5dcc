"""Boxes, points and scribbles as mask signals, and the shapes that they may be typed in."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from transformers.models.sam2_video.processing_sam2_video import Sam2VideoProcessor

from ausm_hf import AusmImageProcessor, AusmProcessor
from ausm_hf.model.prompts_ausm import (
    ObjectPrompt,
    fill_box,
    heed_points,
    refine_signals,
    signal_of_marks,
    signal_radius,
)

SIZE = (80, 120)  # height, width; the radius is 2


def near(points, radius, size=SIZE):
    """The pixels whose centre is within `radius` of a point, by scipy."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    distances, _ = cKDTree(points).query(np.stack([x, y], -1))
    return torch.from_numpy(distances <= radius)


def test_radius_is_a_fortieth_of_the_shorter_side():
    assert signal_radius((480, 854)) == pytest.approx(12) and signal_radius((854, 480)) == pytest.approx(12)
    assert signal_radius((16, 24)) == 1


def test_filled_box_is_what_a_slice_is():
    filled = fill_box(SIZE, (10, 20, 31, 50))
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[20:50, 10:31] = True
    assert filled.equal(expected)
    assert fill_box(SIZE, (-5, -5, 500, 500)).all()
    assert fill_box(SIZE, (10.6, 20, 10.9, 22)).nonzero().tolist() == [[20, 10], [21, 10]]  # between two centres
    for box, column in (((-20, 20, 0.4, 22), 0), ((SIZE[1] - 0.4, 20, SIZE[1] + 9, 22), SIZE[1] - 1)):
        assert fill_box(SIZE, box).nonzero().tolist() == [[20, column], [21, column]]  # enters the frame


def test_points_are_discs():
    points = [(3.2, 4.7), (100, 79.9)]
    assert ObjectPrompt(points=points, labels=(1, 1)).signal(SIZE).equal(near(points, 2))
    assert ObjectPrompt(points=((60.0, 40.0),), labels=(1,)).signal(SIZE).sum() == 12  # about pi 2^2
    assert not ObjectPrompt().signal(SIZE).any()


def test_scribble_is_a_line_of_discs():
    corners = np.array([(10, 10), (50, 30), (50, 30), (20, 70)], dtype=float)  # one of them twice
    share = np.linspace(0, 1, 2001)[:, None]
    line = np.concatenate([a + share * (b - a) for a, b in zip(corners, corners[1:])])
    assert ObjectPrompt(scribble=corners).signal(SIZE).equal(near(line, 2))
    assert ObjectPrompt(scribble=corners[:1]).signal(SIZE).equal(near(corners[:1], 2))


def test_signal_is_everything_together_less_the_negative_points():
    prompt = ObjectPrompt(
        box=(10, 10, 40, 40), points=((60, 60), (20, 20), (63, 60)), labels=(1, 0, 0), scribble=((80, 5), (90, 5))
    )
    signal = prompt.signal(SIZE)
    assert signal[15, 15] and signal[5, 85] and not signal[20, 20]
    # Between a positive and a negative point the nearer one has the pixel.
    assert signal[60, 60] and signal[60, 59] and not signal[60, 62] and not signal[60, 63]
    x = torch.arange(SIZE[1]) + 0.5
    assert signal[55:65, 50:70].equal((near([(60, 60)], 2) & (x < 61.5)[None])[55:65, 50:70])


def test_signal_corrects_what_is_known():
    known = fill_box(SIZE, (10, 10, 40, 40))
    signal = ObjectPrompt(points=((20, 20), (60, 60)), labels=(0, 1)).signal(SIZE, known)
    assert signal.equal((known & ~near([(20, 20)], 2)) | near([(60, 60)], 2))
    assert known[20, 20]  # is left as it was


@pytest.mark.parametrize(
    "prompt, parts",
    [
        (ObjectPrompt(box=(0, 0, 9, 9)), [ObjectPrompt(box=(0, 0, 9, 9))]),
        (
            ObjectPrompt(box=(0, 0, 9, 9), scribble=((1, 1),), points=((2, 2), (3, 3)), labels=(0, 1)),
            [
                ObjectPrompt(box=(0, 0, 9, 9), scribble=((1, 1),)),
                ObjectPrompt(scribble=((1, 1),), points=((2, 2),), labels=(0,)),
                ObjectPrompt(scribble=((1, 1),), points=((2, 2), (3, 3)), labels=(0, 1)),
            ],
        ),
        (
            ObjectPrompt(points=((1, 1), (2, 2), (3, 3)), labels=(0, 1, 0)),
            [
                ObjectPrompt(points=((1, 1), (2, 2)), labels=(0, 1)),
                ObjectPrompt(points=((1, 1), (2, 2), (3, 3)), labels=(0, 1, 0)),
            ],
        ),
        (
            ObjectPrompt(points=((1, 1), (2, 2)), labels=(0, 0)),
            [ObjectPrompt(points=((1, 1),), labels=(0,)), ObjectPrompt(points=((1, 1), (2, 2)), labels=(0, 0))],
        ),
    ],
    ids=["box", "box, scribble and points", "points", "negative points"],
)
def test_marks_come_one_after_the_other(prompt, parts):
    assert prompt.in_turn() == parts


@pytest.mark.parametrize("found", [True, False])
def test_each_mark_corrects_what_the_network_makes_of_those_before(monkeypatch, found):
    """What it makes of a box here is the box's right half, or nothing, and then the box stays as it is."""
    passes = []

    def refine(model, frame, signals, prompts):
        passes.append(signals[0])
        given = replace(prompt, points=prompt.points[: len(passes) - 1], labels=prompt.labels[: len(passes) - 1])
        assert (model, frame, prompts) == ("model", "frame", [given])
        return [signals[0] & (torch.arange(SIZE[1]) >= 30) & found]

    monkeypatch.setattr("ausm_hf.model.prompts_ausm.refine_signals", refine)
    prompt = ObjectPrompt(box=(20, 20, 40, 40), points=((10, 30), (36, 30)), labels=(1, 0))
    box, left, right = fill_box(SIZE, prompt.box), near([(10, 30)], 2), near([(36, 30)], 2)
    signal = signal_of_marks("model", "frame", prompt, SIZE)
    made_of_box = box & (torch.arange(SIZE[1]) >= 30) if found else box
    assert len(passes) == 2 and passes[0].equal(box) and passes[1].equal(made_of_box | left)
    # The second time nothing lies at the positive point, so what was marked stays.
    assert signal.equal((made_of_box | left) & ~right)


def test_a_single_mark_needs_no_pass(monkeypatch):
    monkeypatch.setattr("ausm_hf.model.prompts_ausm.refine_signals", None)
    known = fill_box(SIZE, (50, 50, 70, 70))
    for prompt in (ObjectPrompt(box=(1, 1, 9, 9)), ObjectPrompt(points=((5, 5),), labels=(1,))):
        assert signal_of_marks("model", "frame", prompt, SIZE, known).equal(prompt.signal(SIZE, known))


def test_points_alone_correct_the_mask_that_they_give_once_more(monkeypatch):
    signals = []

    def refine(model, frame, given, prompts):
        signals.append(given[0])
        return [fill_box(SIZE, (0, 0, 9 + len(signals), 9))]

    monkeypatch.setattr("ausm_hf.model.prompts_ausm.refine_signals", refine)
    points = ObjectPrompt(points=((5, 5), (30, 30)), labels=(1, 0))
    first, second = near([(5, 5)], 2), fill_box(SIZE, (0, 0, 10, 9)) & ~near([(30, 30)], 2)
    last = signal_of_marks("model", "frame", points, SIZE)
    assert len(signals) == 2 and signals[0].equal(first) and signals[1].equal(second)
    assert last.equal(fill_box(SIZE, (0, 0, 11, 9)) & ~near([(30, 30)], 2))
    signal_of_marks("model", "frame", replace(points, box=(1, 1, 9, 9)), SIZE)
    assert len(signals) == 4  # the box, and the first point


def test_refined_masks_come_from_a_history_of_one_signal_alone_and_do_not_overlap(tiny_model):
    calls = []

    def step(frame, history):
        calls.append(history)
        return tiny_model.step(frame, history)

    model = SimpleNamespace(step=step, init_history=tiny_model.init_history)
    with torch.no_grad():
        frame = tiny_model.encode_frames(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    signals = [fill_box(SIZE, (0, 0, 60, 40)), ObjectPrompt(points=((100, 70),), labels=(1,)).signal(SIZE)]
    prompts = [ObjectPrompt(), ObjectPrompt(box=(62, 0, 120, 80))]
    with torch.no_grad():
        masks = refine_signals(model, frame, signals, prompts)
        logits = [tiny_model.step(frame, history).masks_queries_logits[:, :1] for history in calls]
    assert len(calls) == 2 and all(history.masks.shape == (1, 1, 16, 24) for history in calls)
    assert all(history.features is None and history.states is None and history.taken.all() for history in calls)
    assert calls[0].masks[0, 0, :8, :12].all() and calls[0].masks.sum() == 8 * 12 and calls[1].masks.sum() >= 1
    assert [mask.shape for mask in masks] == [SIZE] * 2 and not (masks[0] & masks[1]).any()
    upscaled = torch.nn.functional.interpolate(torch.cat(logits, 1), SIZE, mode="bilinear")[0]
    upscaled[1, :, :60] = -1
    assert (masks[0] | masks[1]).equal((upscaled > 0).any(0)) and (masks[0] | masks[1]).any()
    assert refine_signals(model, frame, []) == [] and len(calls) == 2


def test_what_is_marked_twice_has_its_mask_twice(tiny_model):
    drawn = torch.full((1, 1, 16, 24), -3.0)
    drawn[..., 2:6, 2:6] = 3.0
    model = SimpleNamespace(
        step=lambda frame, history: SimpleNamespace(masks_queries_logits=drawn), init_history=tiny_model.init_history
    )
    prompt = ObjectPrompt(box=(0, 0, 85, 80))
    first, second = refine_signals(
        model, SimpleNamespace(stride_4=drawn), [fill_box(SIZE, prompt.box)] * 2, [prompt] * 2
    )
    assert first.any() and first.equal(second)


def test_pieces_without_a_mark_are_left_out(tiny_model):
    drawn = torch.full((1, 1, 16, 24), -3.0)
    drawn[..., 2:6, 2:6] = drawn[..., 10:14, 14:20] = 3.0
    model = SimpleNamespace(
        step=lambda frame, history: SimpleNamespace(masks_queries_logits=drawn), init_history=tiny_model.init_history
    )
    frame = SimpleNamespace(stride_4=drawn)
    (mask,) = refine_signals(model, frame, [fill_box(SIZE, (12, 12, 20, 20))])
    assert mask[20, 20] and mask.sum() < 600 and not mask[50:].any()
    # A box holds one object: of pieces of 4 x 4 and 4 x 3 cells the larger, unless a scribble is in both.
    box = (0, 0, 85, 80)
    for prompt, both in ((ObjectPrompt(box=box), False), (ObjectPrompt(box=box, scribble=((16, 16), (77, 60))), True)):
        (mask,) = refine_signals(model, frame, [fill_box(SIZE, box)], [prompt])
        assert mask[16, 16] and mask[60, 77] == both


def two_halves() -> torch.Tensor:
    """Features (16, 32, 48) that are one thing left of the middle and another right of it, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 16, 1, 1, generator=generator)
    return torch.where(torch.arange(48) < 24, left, right) + 0.1 * torch.randn(16, 32, 48, generator=generator)


def test_what_looks_like_a_wrong_point_and_is_near_it_changes_with_it():
    logits = torch.full((64, 96), -5.0)
    logits[:32] = 5.0
    # On the object below its mask, left of the border between the halves; and rightly in it.
    points = torch.tensor([[44.5 / 96, 40.5 / 64], [0.9, 0.2]])
    healed = heed_points(logits, two_halves(), points, torch.tensor([True, True]))
    change = healed - logits
    assert healed.shape == (64, 96) and healed[40, 44] == pytest.approx(4, abs=1)
    assert change[40, 50] < 0.5 * change[40, 39]  # as near, but it looks different
    assert 0 < change[56, 44] < change[48, 44] < change[40, 44]  # the farther away, the less
    assert change[:, 85:].abs().max() < 0.1


def test_points_that_the_mask_agrees_with_change_nothing():
    logits = torch.full((64, 96), -5.0)
    logits[:32] = 5.0
    points = torch.tensor([[0.2, 0.2], [0.2, 0.9]])
    assert heed_points(logits, two_halves(), points, torch.tensor([True, False])).equal(logits)
    wrong = heed_points(logits, two_halves(), points, torch.tensor([False, True])) - logits
    assert wrong[12, 19] < -7 and wrong[57, 19] > 7


def test_refined_masks_are_right_at_points(tiny_model):
    with torch.no_grad():
        frame = tiny_model.encode_frames(torch.randn(1, 3, 256, 384, generator=torch.Generator().manual_seed(1)))
        signal = fill_box(SIZE, (0, 0, 60, 40))
        (plain,) = refine_signals(tiny_model, frame, [signal])
        on, off = (~plain).nonzero(), plain.nonzero()
        assert len(on) and len(off)
        (y, x), (v, u) = on[len(on) // 2].tolist(), off[len(off) // 2].tolist()
        points = tuple(map(tuple, np.array([(x + 0.5, y + 0.5), (u + 0.5, v + 0.5)])))  # of float64
        prompt = ObjectPrompt(points=points, labels=(1, 0))
        (mask,) = refine_signals(tiny_model, frame, [prompt.signal(SIZE, signal)], [prompt])
    assert mask[y, x] and not mask[v, u]


def test_a_point_on_one_object_is_not_on_another(monkeypatch):
    first = ObjectPrompt(points=((5, 5), (9, 9)), labels=(1, 0))
    second = ObjectPrompt(points=((30, 30),), labels=(1,), box=(20, 20, 40, 40))
    third = ObjectPrompt(mask=fill_box(SIZE, (50, 50, 60, 60)))
    assert first.not_on([second, third]) == ObjectPrompt(points=((30, 30),), labels=(0,))
    assert second.not_on([first, third]) == ObjectPrompt()  # its box says enough
    for outside in ((19, 30), (41, 30), (30, 19), (30, 41)):
        assert second.not_on([ObjectPrompt(points=(outside,), labels=(1,))]) == ObjectPrompt()
    assert second.not_on([replace(first, points=((21, 40), (9, 9)))]).points == ((21, 40),)
    assert first.not_on([replace(second, points=((5, 5),))]) == ObjectPrompt()  # one on another

    # It corrects what a single point gives, and costs no pass.
    signals = []

    def refine(model, frame, given, prompts):
        signals.append(given[0])
        return [fill_box(SIZE, (0, 0, 40, 40))]

    monkeypatch.setattr("ausm_hf.model.prompts_ausm.refine_signals", refine)
    click = ObjectPrompt(points=((5, 5),), labels=(1,))
    last = signal_of_marks("model", "frame", click, SIZE, others=click.not_on([second]))
    assert len(signals) == 1 and signals[0].equal(near([(5, 5)], 2))
    assert last.equal(fill_box(SIZE, (0, 0, 40, 40)) & ~near([(30, 30)], 2))


def test_objects_clicked_together_are_kept_off_each_other(tiny_model, processor, monkeypatch):
    given = {}

    def refine(model, frame, signals, prompts):
        given.update(zip([prompt.positive_points[0] for prompt in prompts], zip(signals, prompts)))
        return signals

    session = processor.init_video_session()
    for object_id, point in ((1, [5, 5]), (2, [30, 30])):
        add(processor, object_id, session=session, input_points=[[[point]]])
    monkeypatch.setattr("ausm_hf.model.streaming_ausm.refine_signals", refine)
    frame = processor(images=np.zeros((*SIZE, 3), np.uint8))["pixel_values"]
    tiny_model.preview_prompts(session, frame)
    for mine, other in (((5, 5), (30, 30)), ((30, 30), (5, 5))):
        signal, prompt = given[mine]
        assert signal[mine[1], mine[0]] and not signal[other[1], other[0]]
        assert prompt.points == (mine, other) and prompt.labels == (1, 0)


def test_a_click_in_a_small_box_of_another_leaves_it_its_box(tiny_model, processor, monkeypatch):
    given = []
    monkeypatch.setattr(
        "ausm_hf.model.streaming_ausm.refine_signals",
        lambda model, frame, signals, prompts: given.extend(prompts) or signals,
    )
    session = processor.init_video_session()
    add(processor, 1, session=session, input_points=[[[[30, 30]]]])
    add(processor, 2, session=session, input_boxes=[[[29, 29, 31, 31]]])
    frame = processor(images=np.zeros((*SIZE, 3), np.uint8))["pixel_values"]
    masks = tiny_model.preview_prompts(session, frame)
    assert masks[2].equal(fill_box(SIZE, (29, 29, 31, 31)))
    assert given[1] == ObjectPrompt(box=(29, 29, 31, 31))


@pytest.fixture(scope="module")
def processor():
    return AusmProcessor(AusmImageProcessor(size={"shortest_edge": 32}))


def add(processor, obj_ids=1, frame_idx=None, session=None, **inputs):
    session = session or processor.init_video_session()
    processor.add_inputs_to_inference_session(session, frame_idx, obj_ids, original_size=SIZE, **inputs)
    return session.prompts[session.next_frame_idx if frame_idx is None else frame_idx]


POINTS = [[[[10, 20], [30, 40]], [[50, 60]]]]  # one image, two objects
LABELS = [[[1, 0], [1]]]
BOXES = [[[1, 2, 30, 40], [5, 6, 70, 80]]]


def test_shapes_are_those_of_sam2(processor):
    """What SAM 2's own processor makes of the same lists, padding (-10) aside."""
    prompts = add(processor, [3, 7], input_points=POINTS, input_labels=LABELS, input_boxes=BOXES)
    sam = object.__new__(Sam2VideoProcessor)
    for name, value, depth, coordinates in [
        ("points", POINTS, 4, 2),
        ("labels", LABELS, 3, None),
        ("boxes", BOXES, 3, 4),
    ]:
        (nested,) = sam._validate_single_input(value, depth, name, "", coordinates)
        for prompt, of_object in zip(prompts.values(), nested, strict=True):
            mine = {"points": prompt.points, "labels": prompt.labels, "boxes": prompt.box}[name]
            assert np.array_equal(np.array(mine), np.array(of_object))
    assert list(prompts) == [3, 7]


@pytest.mark.parametrize(
    ("obj_ids", "inputs"),
    [
        ([3, 7], {"input_points": POINTS[0], "input_labels": LABELS[0], "input_boxes": BOXES[0]}),
        ([3, 7], {"input_points": POINTS, "input_labels": LABELS, "input_boxes": torch.tensor(BOXES)}),
        (torch.tensor([3, 7]), {"input_points": POINTS, "input_labels": LABELS, "input_boxes": np.array(BOXES)}),
        (3, {"input_points": POINTS[0][0], "input_labels": LABELS[0][0], "input_boxes": BOXES[0][0]}),
        (3, {"input_points": np.array(POINTS[0][0]), "input_labels": (1, np.int64(0)), "input_boxes": BOXES[0][:1]}),
    ],
    ids=["no image level", "tensor", "array", "one object", "numpy scalars"],
)
def test_levels_may_be_left_out(processor, obj_ids, inputs):
    expected = add(processor, [3, 7], input_points=POINTS, input_labels=LABELS, input_boxes=BOXES)
    prompts = add(processor, obj_ids, **inputs)
    assert prompts == {object_id: expected[object_id] for object_id in prompts} and 3 in prompts


def test_objects_may_have_different_prompts(processor):
    prompts = add(
        processor,
        [1, 2, 3],
        input_boxes=[[BOXES[0][0], None, None]],
        input_points=[[[], [[1, 2]], []]],
        input_scribbles=[[], [], [[1, 2], [3, 4]]],
    )
    assert prompts[1] == ObjectPrompt(box=(1, 2, 30, 40))
    assert prompts[2] == ObjectPrompt(points=((1, 2),), labels=(1,))  # points are positive if nothing else is said
    assert prompts[3] == ObjectPrompt(scribble=((1, 2), (3, 4)))


def test_now_is_the_next_frame_and_the_last_word_counts(processor):
    session = processor.init_video_session()
    session.next_frame_idx = 4
    add(processor, 1, session=session, input_points=[5, 5])
    add(processor, 1, session=session, input_boxes=[1, 2, 3, 4])
    add(processor, 2, 9, session=session, input_boxes=[1, 2, 3, 4])
    assert session.prompts == {4: {1: ObjectPrompt(box=(1, 2, 3, 4))}, 9: {2: ObjectPrompt(box=(1, 2, 3, 4))}}


def test_masks_of_several_objects_in_one_array(processor):
    masks = np.stack([fill_box(SIZE, box).numpy() for box in BOXES[0]])
    prompts = add(processor, [3, 7], input_masks=masks)
    assert all(prompts[object_id].mask.equal(torch.from_numpy(mask)) for object_id, mask in zip([3, 7], masks))


@pytest.mark.parametrize(
    ("obj_ids", "inputs", "message"),
    [
        (1, {"input_points": [120, 5]}, r"0 <= x < 120 and 0 <= y < 80, got \(120.0, 5.0\) for object 1"),
        (1, {"input_points": [5, -1]}, r"input_points must lie within the frame"),
        (1, {"input_points": [5, float("nan")]}, r"input_points must lie within the frame"),
        (1, {"input_scribbles": [[5, 5], [5, 80]]}, r"input_scribbles must lie within the frame"),
        (2, {"input_boxes": [10, 10, 10, 20]}, r"input_boxes must be .* got \(10.0, 10.0, 10.0, 20.0\) for object 2"),
        (1, {"input_boxes": [20, 10, 10, 20]}, "x0 < x1"),
        (1, {"input_boxes": [120, 10, 130, 20]}, "an area within the frame of width 120 and height 80"),
        (1, {"input_boxes": [0, 0, float("inf"), 20]}, "input_boxes must be"),
        (1, {"input_labels": [1]}, "got 1 labels and 0 points for object 1"),
        (1, {"input_points": [5, 5], "input_labels": [1, 0]}, "got 2 labels and 1 points"),
        (1, {"input_points": [5, 5], "input_labels": [2]}, "must be 1 .* or 0 .*, got 2"),
        (1, {"input_points": [5, 5], "input_labels": [0]}, "negative points alone for object 1"),
        ([1, 1], {"input_boxes": BOXES}, "each one once"),
        ([1, 2, 3], {"input_boxes": BOXES}, r"as many objects as obj_ids \(3\), got 2"),
        (1, {"input_boxes": [BOXES[0], BOXES[0]]}, "of one image, got 2"),
        (1, {"input_boxes": [[[[1, 2, 3, 4]]]]}, r"nested \[image\]\[object\]\[4\], got 4 levels"),
        ([1, 2], {"input_points": [5, 5]}, r"nested \[image\]\[object\]\[point\]\[2\], got 1 levels for 2 objects"),
        (1, {"input_boxes": [0.1, 0.2, 0.5, 1.0]}, "input_boxes must be in pixels"),
        (1, {"input_boxes": [1, 2, 3]}, "input_boxes must hold 4 numbers each, got"),
        (1, {"input_boxes": ["a", 2, 3, 4]}, "input_boxes must hold 4 numbers each, got"),
        ([1, 2], {"input_boxes": [BOXES[0][0], None]}, "got nothing for object 2"),
        (1, {}, "got nothing for object 1"),
        (None, {"input_boxes": [1, 2, 3, 4]}, "obj_ids must be given"),
        (1, {"input_masks": np.ones(SIZE), "input_points": [5, 5]}, "exact and stand alone"),
        (1, {"input_points": [5, 5], "frame_idx": 3}, "at least 4, the next frame of the stream, got 3"),
    ],
)
def test_wrong_prompts(processor, obj_ids, inputs, message):
    session = processor.init_video_session()
    session.next_frame_idx = 4
    with pytest.raises(ValueError, match=message):
        add(processor, obj_ids, session=session, **inputs)
    assert not session.prompts and session.video_height is None
