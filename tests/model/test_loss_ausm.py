"""Teacher forcing and losses, on cases small enough to work out by hand."""

import itertools
import math

import pytest
import torch

from ausm_hf.model.configuration_ausm import AusmConfig
from ausm_hf.model.history_ausm import binarize
from ausm_hf.model.loss_ausm import (
    AusmLoss,
    detection_quality,
    draw_switch_frames,
    match_detections,
    pad_instances,
    plan_teacher_forcing,
)

SIZE = 8  # pixels; two by two cells of stride 4
CELLS = [
    (slice(0, 4), slice(0, 4)),
    (slice(0, 4), slice(4, 8)),
    (slice(4, 8), slice(0, 4)),
    (slice(4, 8), slice(4, 8)),
]


def cell_masks(rows: list[list[int | None]]) -> torch.Tensor:
    """(N, T, 8, 8): for each instance and frame the cell that it fills, or None where it is absent."""
    masks = torch.zeros(len(rows), len(rows[0]), SIZE, SIZE, dtype=torch.uint8)
    for instance, row in enumerate(rows):
        for frame, cell in enumerate(row):
            if cell is not None:
                masks[instance, frame][CELLS[cell]] = 1
    return masks


def plan(rows, switch=None, slots=None, labels=None, num_id_vectors=10, annotated=None, **arguments):
    masks = cell_masks(rows)
    frames = torch.zeros(1, masks.shape[1], 3, SIZE, SIZE)
    labels = None if labels is None else [torch.tensor(labels)]
    instances = pad_instances(frames, [masks], labels, None, annotated, None)
    switch = None if switch is None else [torch.tensor(switch)]
    slots = None if slots is None else [torch.tensor(slots)]
    return instances, plan_teacher_forcing(instances, num_id_vectors, switch, slots, **arguments)


def shown(history: torch.Tensor) -> list[list[list[int]]]:
    """Cells marked in the history, per frame and instance."""
    return [[mask.flatten().nonzero().flatten().tolist() for mask in frame] for frame in history[0]]


def test_every_rule_of_the_paper():
    """Detection target if t <= s, tracking target if t > s, in the history M_t if t >= s; for every s in 0..T."""
    rows = [[0, 1, 2, 3], [3, 3, None, 0]]
    length = 4
    for switch in itertools.product(range(length + 1), repeat=2):
        _, result = plan(rows, switch=list(switch))
        for t in range(1, length + 1):
            for instance, s in enumerate(switch):
                present = rows[instance][t - 1] is not None
                assert bool(result.tracked[0, t - 1, instance]) == (t > s)
                assert bool(result.detected[0, t - 1, instance]) == (t <= s and present)
                # What frame t sees is M_{t-1}. For t = 1 that is the prompt y_0, the first frame's own mask.
                source = rows[instance][max(t - 2, 0)]
                in_history = t - 1 >= s and source is not None
                assert shown(result.history_masks)[t - 1][instance] == ([source] if in_history else [])


def test_a_worked_example():
    _, result = plan([[0, 0, 1], [None, 2, 2], [3, None, 3]], switch=[0, 2, 1], slots=[7, 1, 4])
    assert result.id_slots.tolist() == [[7, 1, 4]]
    assert result.taken[0].tolist() == [[True, False, False], [True, False, True], [True, True, True]]
    assert result.detected[0].tolist() == [[False, False, True], [False, True, False], [False, False, False]]
    assert shown(result.history_masks) == [[[0], [], []], [[0], [], [3]], [[0], [2], []]]


def test_switch_frames_are_drawn_where_the_instance_can_be_handed_over():
    present = torch.tensor([[[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_switch_frames(present, torch.tensor([True]), generator)[0].tolist() for _ in range(500)]
    seen = [set(values) for values in zip(*drawn)]
    assert seen == [{0, 1, 2, 3, 4}, {3, 4}, {0, 1, 4}, {4}]
    prompts = sum(values[0] == 0 for values in drawn)
    assert 200 < prompts < 300
    # Without detection, everyone is given at the first frame that shows them.
    assert draw_switch_frames(present, torch.tensor([False]), generator)[0].tolist() == [0, 3, 0, 4]


def test_id_vectors_are_drawn_without_replacement():
    generator = torch.Generator().manual_seed(0)
    rows = [[0], [1], [2], [3]]
    drawn = torch.cat([plan(rows, generator=generator)[1].id_slots for _ in range(300)])
    assert all(len(set(slots)) == 4 for slots in drawn.tolist())
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert counts.min() > 80 and counts.max() < 160  # 120 expected


def test_clips_without_detection_and_unannotated_frames():
    instances, result = plan([[0, 0, 0], [None, 1, 1]], detect=[False], annotated=torch.tensor([[True, True, False]]))
    assert result.taken[0].tolist() == [[True, False], [True, False], [True, True]]  # s is 0 and 2
    assert not result.detected.any() and not result.searched.any()
    assert result.tracked[0].tolist() == [[True, False], [True, False], [False, False]]


def test_thin_objects_stay_in_the_history():
    thin = torch.zeros(1, 2, 2)
    thin[0, 0] = torch.tensor([0.2, 0.1])
    assert binarize(thin).tolist() == [[[1, 0], [0, 0]]]
    assert binarize(torch.zeros(1, 2, 2)).sum() == 0
    assert binarize(torch.tensor([[[0.9, 0.5], [0.4, 0.0]]])).tolist() == [[[1, 1], [0, 0]]]


@pytest.mark.parametrize("value", [1, 2, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_what_is_not_0_belongs_to_the_object(value, dtype):
    """Masks come as 0 and 1, as 0 and 255, and as ids."""
    masks = cell_masks([[0, 1], [3, None]])
    frames = torch.zeros(1, 2, 3, SIZE, SIZE)
    of_bool = [[x.bool()] for x in (masks, masks.flip(1), masks[:, 1])]
    of_value = [[x.to(dtype) * value] for x in (masks, masks.flip(1), masks[:, 1])]
    wanted, got = (
        pad_instances(frames, true, None, history, None, None, prompts)
        for true, history, prompts in (of_bool, of_value)
    )
    for name, tensor in vars(wanted).items():
        torch.testing.assert_close(getattr(got, name), tensor)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_soft_masks_stay_soft_beside_others(order):
    masks = [torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool), torch.full((1, 1, SIZE, SIZE), 0.25)]
    frames = torch.zeros(2, 1, 3, SIZE, SIZE)
    instances = pad_instances(frames, [masks[i] for i in order], None, None, None, None)
    assert [float(of_clip.mean()) for of_clip in instances.masks] == [[1.0, 0.25][i] for i in order]


def test_matching_is_optimal():
    torch.manual_seed(0)
    cost = torch.rand(1, 2, 5, 3)
    detected = torch.tensor([[[True, True, True], [True, False, True]]])
    clips, frames, queries, instances = match_detections(cost, detected)
    for frame in range(2):
        columns = detected[0, frame].nonzero().flatten().tolist()
        best = min(
            sum(float(cost[0, frame, q, c]) for q, c in zip(chosen, columns))
            for chosen in itertools.permutations(range(5), len(columns))
        )
        here = frames == frame
        assert sorted(instances[here].tolist()) == columns
        assert sum(cost[0, frame][queries[here], instances[here]]).item() == pytest.approx(best)


def tiny_loss(**overrides) -> AusmLoss:
    return AusmLoss(
        AusmConfig(
            train_num_points=None,
            label_sets={"pets": ["cat", "dog"]},
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=3.0,
            foreground_weight=4.0,
            no_object_weight=0.1,
            **overrides,
        )
    )


def test_the_loss_by_hand():
    """One frame, one tracked and one new instance, two detection queries, logits of +-2 everywhere."""
    instances, result = plan([[0], [3]], switch=[0, 1], labels=[0, 1])
    x = 2.0
    masks = torch.full((1, 1, 4, 2, 2), -x)
    masks[0, 0, 0, 0, 0] = x  # the tracked instance: right
    masks[0, 0, 2, 0, 0] = x  # detection query 0: wrong cell
    masks[0, 0, 3, 1, :] = x  # detection query 1: the right cell and one too many
    foreground = torch.tensor([[[1.0, 0.0, -1.0, 0.5]]])
    classes = torch.zeros(1, 1, 4, 3)
    classes[0, 0, 3] = torch.tensor([0.0, 1.0, 0.0])
    loss, terms = tiny_loss()(
        [{"masks": masks, "foreground": foreground, "classes": {"pets": classes}}], instances, result, ["pets"]
    )

    def softplus(value):
        return math.log1p(math.exp(value))

    right, wrong, p = softplus(-x), softplus(x), 1 / (1 + math.exp(-x))
    count = 2
    mask = (right + (3 * right + wrong) / 4) / count
    q = 1 - p
    dice = ((1 - (2 * p + 1) / (p + 3 * q + 2)) + (1 - (2 * p + 1) / (2 * p + 2 * q + 2))) / count
    # Query 1 of the two is matched and has an IoU of 0.5; query 0 is background with weight 0.1.
    fg = (softplus(-1.0) + (softplus(-0.5) + softplus(0.5)) / 2 - math.log(2) + 0.1 * softplus(-1.0)) / count
    matched_class = math.log(2 + math.e) - 1.0
    label = (math.log(3) + matched_class + 0.1 * math.log(3)) / count
    expected = {"mask": 5 * mask, "dice": 3 * dice, "foreground": 4 * fg, "class": 2 * label}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(sum(expected.values()), abs=1e-5)


def test_an_absent_tracked_instance_wants_an_empty_mask_and_no_foreground():
    instances, result = plan([[0, None]], switch=[0])
    prediction = {
        "masks": torch.zeros(1, 2, 3, 2, 2, requires_grad=True),
        "foreground": torch.zeros(1, 2, 3, requires_grad=True),
        "classes": {"pets": torch.zeros(1, 2, 3, 3)},
    }
    loss, terms = tiny_loss()([prediction], instances, result, ["pets"])
    loss.backward()
    assert prediction["foreground"].grad[0, 1, 0] > 0  # to be pushed down
    assert (prediction["masks"].grad[0, 1, 0] > 0).all()
    # No dice: its gradient would not vanish where nothing is to be found.
    bce_alone = 5 * 0.5 / 4
    torch.testing.assert_close(prediction["masks"].grad[0, 1, 0], torch.full((2, 2), bce_alone))


def test_what_is_not_annotated_teaches_nothing():
    instances, result = plan([[0]], switch=[1], exhaustive=[False])
    prediction = {
        "masks": torch.zeros(1, 1, 3, 2, 2),
        "foreground": torch.zeros(1, 1, 3, requires_grad=True),
        "classes": {"pets": torch.zeros(1, 1, 3, 3, requires_grad=True)},
    }
    prediction["masks"][0, 0, 1, 0, 0] = 5.0  # detection query 0 is matched
    tiny_loss()([prediction], instances, result, ["pets"])[0].backward()
    assert prediction["foreground"].grad[0, 0, 1] < 0
    assert prediction["foreground"].grad[0, 0, 2] == 0
    assert (prediction["classes"]["pets"].grad == 0).all()  # no class is known


@pytest.mark.parametrize("searched", [True, False])
def test_foreground_of_detections_learns_the_iou_of_their_masks(searched):
    instances, result = plan([[0, 1]], switch=[2], exhaustive=[False], detect=[searched])
    foreground = torch.zeros(1, 2, 6, requires_grad=True)
    prediction = {
        "masks": torch.full((1, 2, 6, 2, 2), -5.0),
        "foreground": foreground,
        "classes": {"pets": torch.zeros(1, 2, 6, 3, requires_grad=True)},
    }
    # In the first frame the object is cell 0, in the second cell 1.
    prediction["masks"][0, 0, 1, 0, 0] = 5.0  # detection query 0 is matched
    prediction["masks"][0, 0, 2, 0, 0] = 4.0  # 1 draws the same
    prediction["masks"][0, 0, 3] = 4.0  # of what 2 draws three quarters may be another object
    prediction["masks"][0, 1, 1] = torch.tensor([[0.1, 5.0], [0.1, 0.1]])  # 0 is matched, with three cells too many
    tiny_loss()([prediction], instances, result, ["pets"])[0].backward()
    # Of binary cross-entropy at a logit of 0: 1/2 less the target, which is 1, 1 and 1/4.
    slopes = torch.zeros(2, 5)
    if searched:
        slopes[0, 0], slopes[0, 1], slopes[1, 0] = -0.5, 0.1 * -0.5, 0.25
    torch.testing.assert_close(foreground.grad[0, :, 1:], 4 * slopes / 2)
    assert (prediction["classes"]["pets"].grad == 0).all()  # no class is known, and both draw an object


def test_a_part_of_an_annotated_object_is_none_though_others_may_be_there():
    instances, result = plan([[0]], switch=[1], exhaustive=[False])
    instances.small_masks[:] = 1.0  # the object fills the frame
    prediction = {
        "masks": torch.full((1, 1, 3, 2, 2), 5.0),
        "foreground": torch.zeros(1, 1, 3, requires_grad=True),
        "classes": {"pets": torch.zeros(1, 1, 3, 3, requires_grad=True)},
    }
    prediction["masks"][0, 0, 2, 0, 1] = prediction["masks"][0, 0, 2, 1] = -5.0  # a quarter of it
    tiny_loss()([prediction], instances, result, ["pets"])[0].backward()
    torch.testing.assert_close(prediction["foreground"].grad[0, 0, 2].item(), 4 * 0.1 * (0.5 - 0.25))
    assert prediction["classes"]["pets"].grad[0, 0, 2, 2] < 0  # "no object"
    assert (prediction["classes"]["pets"].grad[0, 0, 1] == 0).all()


def test_detections_get_nothing_for_what_is_tracked_hidden_or_ignored():
    instances, result = plan([[0, 1], [3, 3]], switch=[1, 2])
    logits = torch.full((1, 2, 3, 2, 2), -5.0)
    logits[0, :, 0, 0, 0] = logits[0, :, 1, 0, 1] = logits[0, :, 2, 1, 1] = 5.0
    iou, inside, unknown = detection_quality(logits, instances, result)
    # Object 0 is cell 0, then tracked; object 1 is cell 3 throughout.
    assert iou.tolist() == [[[1, 0, 1], [0, 0, 1]]]
    assert inside.tolist() == [[[True, False, True], [False, True, True]]] and not unknown.any()
    instances.pixel_weights[0, 0, 1, 1] = 0
    iou, _, unknown = detection_quality(logits, instances, result)
    assert iou[0, 0].tolist() == [1, 0, 0]
    assert unknown.tolist() == [[[False, False, True], [False, False, False]]]


def test_detections_in_ignored_pixels_are_not_judged():
    """Where a crowd is, say. A match is judged wherever it lies, and so is what lies there by half alone."""
    ignore = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    ignore[0, 0][CELLS[2]] = ignore[0, 0][CELLS[3]] = True
    masks = cell_masks([[0]])
    instances = pad_instances(torch.zeros(1, 1, 3, SIZE, SIZE), [masks], [torch.tensor([1])], None, None, ignore)
    result = plan_teacher_forcing(instances, 4, [torch.tensor([1])])
    prediction = {
        "masks": torch.full((1, 1, 5, 2, 2), -5.0),
        "foreground": torch.zeros(1, 1, 5, requires_grad=True),
        "classes": {"pets": torch.zeros(1, 1, 5, 3, requires_grad=True)},
    }
    prediction["masks"][0, 0, 1, 0, 0] = 5.0  # detection query 0 is matched
    prediction["masks"][0, 0, 2, 1] = 5.0  # 1 draws both ignored cells, 2 one of them and a known one
    prediction["masks"][0, 0, 3, :, 1] = prediction["masks"][0, 0, 4, 0, 1] = 5.0  # 3 draws the background
    tiny_loss()([prediction], instances, result, ["pets"])[0].backward()
    torch.testing.assert_close(prediction["foreground"].grad[0, 0, 1:], 4 * torch.tensor([-0.5, 0, 0.05, 0.05]))
    no_object = prediction["classes"]["pets"].grad[0, 0, 1:, 2]
    assert no_object[1] == 0 and no_object[2] == no_object[3] < 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("points", [None, 12544])
def test_mixed_precision_has_the_loss_of_float32(dtype, points):
    """A large mask: its pixels are more than float16 can count, and than bfloat16 can tell from one more."""
    mask = torch.zeros(1, 1, 640, 640, dtype=torch.bool)
    mask[..., :480] = True
    instances = pad_instances(torch.zeros(1, 1, 3, 640, 640), [mask], None, None, None, None)
    result = plan_teacher_forcing(instances, 4, [torch.tensor([1])])
    config = tiny_loss().config
    config.train_num_points = points
    masks = torch.full((1, 1, 6, 160, 160), -10.0)
    masks[0, 0, 1, :, :119] = 10.0
    prediction = {"masks": masks, "foreground": torch.zeros(1, 1, 6), "classes": {"pets": torch.zeros(1, 1, 6, 3)}}
    low = {"masks": masks.to(dtype), "foreground": torch.zeros(1, 1, 6, dtype=dtype), "classes": prediction["classes"]}
    terms = []
    for values, enabled in ((prediction, False), (low, True)):
        with torch.autocast("cpu", dtype, enabled=enabled):
            generator = torch.Generator().manual_seed(0)
            terms.append(AusmLoss(config)([values], instances, result, ["pets"], generator)[1])
    assert terms[0] == terms[1] and all(torch.isfinite(value) for value in terms[0].values())


@pytest.mark.parametrize("dtype, height, width", [(torch.float16, 37, 59), (torch.bfloat16, 31, 21)])
def test_the_iou_is_never_above_1_in_mixed_precision(dtype, height, width):
    mask = torch.zeros(1, 1, 512, 512, dtype=torch.bool)
    mask[..., : 4 * height, : 4 * width] = True
    instances = pad_instances(torch.zeros(1, 1, 3, 512, 512), [mask], None, None, None, None)
    result = plan_teacher_forcing(instances, 4, [torch.tensor([1])])
    drawn = instances.small_masks.transpose(1, 2) - 0.5
    with torch.autocast("cpu", dtype):
        assert 0.99 < detection_quality(drawn, instances, result)[0].item() <= 1


def test_a_clip_without_targets_has_a_finite_loss_in_float16():
    instances = pad_instances(torch.zeros(1, 1, 3, 640, 640), [torch.zeros(0, 1, 640, 640)], None, None, None, None)
    prediction = {
        "masks": torch.full((1, 1, 4, 160, 160), -10.0, dtype=torch.float16),  # their sum is more than it can hold
        "foreground": torch.zeros(1, 1, 4, dtype=torch.float16),
        "classes": {"pets": torch.zeros(1, 1, 4, 3, dtype=torch.float16)},
    }
    loss, _ = tiny_loss()([prediction], instances, plan_teacher_forcing(instances, 4), ["pets"])
    assert loss.isfinite() and loss.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pass_that_is_not_finite_has_a_loss_that_is_not(value):
    instances, result = plan([[0, 1]], switch=[2])
    prediction = {
        "masks": torch.zeros(1, 2, 4, 2, 2),
        "foreground": torch.zeros(1, 2, 4),
        "classes": {"pets": torch.zeros(1, 2, 4, 3)},
    }
    prediction["masks"][0, 0, 1:] = value
    assert not tiny_loss()([prediction], instances, result, ["pets"])[0].isfinite()


def test_ignored_pixels_teach_nothing():
    masks = cell_masks([[0]])
    ignore = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    ignore[0, 0][CELLS[1]] = True
    instances = pad_instances(torch.zeros(1, 1, 3, SIZE, SIZE), [masks], None, None, None, ignore)
    result = plan_teacher_forcing(instances, 4, [torch.tensor([0])])
    logits = torch.zeros(1, 1, 2, 2, 2, requires_grad=True)
    tiny_loss()(
        [{"masks": logits, "foreground": torch.zeros(1, 1, 2), "classes": {"pets": torch.zeros(1, 1, 2, 3)}}],
        instances,
        result,
        [None],
    )[0].backward()
    assert logits.grad[0, 0, 0, 0, 1] == 0
    assert logits.grad[0, 0, 0, 1, 1] != 0


def test_sampled_points_estimate_the_full_loss():
    """Uniform points (no importance sampling) on smooth logits: the same loss up to sampling noise."""
    torch.manual_seed(0)
    instances, result = plan([[0, 1]], switch=[0])
    coarse = torch.randn(1, 2, 3, 2, 2)
    prediction = {
        "masks": coarse,
        "foreground": torch.zeros(1, 2, 3),
        "classes": {"pets": torch.zeros(1, 2, 3, 3)},
    }
    full = tiny_loss()([prediction], instances, result, [None])[1]
    config = tiny_loss().config
    config.train_num_points, config.importance_sample_ratio = 20_000, 0.0
    points = AusmLoss(config)([prediction], instances, result, [None])[1]
    assert points["foreground"] == full["foreground"]
    # Between cell centres the sampled logits are interpolated, the full loss takes each cell as it is.
    assert points["mask"].item() == pytest.approx(full["mask"].item(), rel=0.25)


@pytest.mark.parametrize("kind, left, right", [("uncertain", 0, 1), ("wrong", 1, 0)])
def test_hard_points_lie_where_the_mask_is_uncertain_or_wrong(kind, left, right):
    """The mask is sure and wrong on the left, sure and right in the middle, unsure and right on the right."""
    config = tiny_loss().config
    config.train_num_points, config.importance_sampling = 400, kind
    logits = torch.tensor([9.0, 9, 9, 9, 9, 9, 0.1, 0.1]).expand(2, 8, 8)
    targets = torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1]).repeat_interleave(4).expand(2, 32, 32)
    points = AusmLoss(config)._hard_points(logits, targets, 400, torch.Generator().manual_seed(0))
    assert points.shape == (2, 400, 2) and 0 <= points.min() and points.max() <= 1
    hard = points[:, :300, 0]
    assert ((hard < 0.25) == left).float().mean() > 0.9
    assert ((hard > 0.7) == right).float().mean() > 0.9


def test_no_instances_at_all():
    frames = torch.zeros(1, 2, 3, SIZE, SIZE)
    instances = pad_instances(frames, [torch.zeros(0, 2, SIZE, SIZE)], None, None, None, None)
    result = plan_teacher_forcing(instances, 4)
    masks = torch.zeros(1, 2, 2, 2, 2, requires_grad=True)
    prediction = {"masks": masks, "foreground": torch.zeros(1, 2, 2), "classes": {"pets": torch.zeros(1, 2, 2, 3)}}
    loss, terms = tiny_loss()([prediction], instances, result, ["pets"])
    loss.backward()
    assert torch.isfinite(loss) and terms["mask"] == 0 and terms["foreground"] > 0


def test_what_the_user_marks_stands_before_the_first_frame_only():
    """A box over cells 0 and 1 given for an instance that fills cell 0: `M_0` is the box, `M_1` the instance."""
    masks = cell_masks([[0, 0, 0], [3, 3, 3]])
    box = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    box[0, :4] = box[1, 4:, 4:] = True
    frames = torch.zeros(1, 3, 3, SIZE, SIZE)
    instances = pad_instances(frames, [masks], None, None, None, None, prompt_masks=[box])
    result = plan_teacher_forcing(instances, 10, [torch.tensor([0, 1])])
    assert shown(result.history_masks) == [[[0, 1], []], [[0], [3]], [[0], [3]]]
    with pytest.raises(ValueError, match=r"prompt_masks\[0\]. must have shape \(2, 8, 8\)"):
        pad_instances(frames, [masks], None, None, None, None, prompt_masks=[box[:1]])
    batch = pad_instances(frames, masks[None], None, masks[None], None, None)  # in one tensor
    assert batch.history_masks.equal(instances.history_masks)
