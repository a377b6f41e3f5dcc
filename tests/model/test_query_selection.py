"""Detection queries that are selected from the frame, and the loss that teaches where."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ausm_hf import AusmConfig, AusmForUniversalSegmentation
from ausm_hf.model.loss_ausm import pad_instances, plan_teacher_forcing, reach_loss, selection_loss
from ausm_hf.model.pixels_ausm import AusmQuerySelection, AusmReach, sine_positions

CONFIG = SimpleNamespace(hidden_size=16, num_detection_queries=4)


@pytest.fixture
def selection():
    torch.manual_seed(0)
    module = AusmQuerySelection(CONFIG).eval()
    torch.nn.init.normal_(module.score.weight)
    return module


def test_queries_are_the_features_of_the_best_peaks(selection):
    level = 3 * F.avg_pool2d(torch.randn(3, 16, 9, 11), 3, stride=1)  # smooth: beside a peak scores are high too
    selected = selection(level)
    features = level + selection.smooth(level)
    for n in range(3):
        scores = selection.score(features)[n, 0].detach()
        assert torch.allclose(selected.logits[n], scores, atol=1e-5)
        peaks = []
        for y in range(7):
            for x in range(9):
                around = scores[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                if scores[y, x] == around.max():
                    peaks.append((float(scores[y, x]), y, x))
        best = sorted(peaks, reverse=True)[:4]
        assert len(best) == 4
        positions = sine_positions((7, 9), 16, level).view(7, 9, 16)
        for q, (_, y, x) in enumerate(best):
            assert torch.allclose(selected.queries[n, q], features[n, :, y, x], atol=1e-5)
            assert torch.equal(selected.positions[n, q], positions[y, x])
            assert torch.allclose(selected.places[n, q], torch.tensor([(x + 0.5) / 9, (y + 0.5) / 7]))


def test_ranks_are_exact_in_half_precision(selection):
    """In a map with one peak: it, then the cells with the next best scores, though scores are near each other."""
    selection = selection.to(torch.bfloat16)
    slope = torch.linspace(0, 1, 12, dtype=torch.bfloat16).expand(1, 16, 1, -1) * selection.score.weight.sign()
    torch.nn.init.zeros_(selection.smooth[-1].weight)
    places = selection(slope).places[0, :, 0]
    assert torch.allclose(places.float(), (torch.tensor([11, 10, 9, 8]) + 0.5) / 12, atol=0.01)


def test_a_map_with_fewer_cells_than_queries_gives_as_many_queries(selection):
    selected = selection(torch.randn(1, 16, 1, 2))
    assert selected.queries.shape == selected.positions.shape == (1, 4, 16)
    assert ((selected.places > 0) & (selected.places < 1)).all()


def test_reach_is_an_ellipse_around_the_place():
    reach = AusmReach(CONFIG)
    torch.nn.init.zeros_(reach.projection.weight)
    # The middle 0.05 to the right of the place and 0.1 above it, the radii 0.1 and 0.4 of the picture.
    reach.projection.bias.data = torch.tensor([0.5, -1.0, math.log(0.5), math.log(2.0)])
    with torch.no_grad():
        logits = reach(torch.randn(1, 1, 16), torch.tensor([[[0.4, 0.6]]]), (4000, 2000))[0, 0]
    assert logits.shape == (4000, 2000)
    assert divmod(int(logits.argmax()), 2000) in {(y, x) for y in (1999, 2000) for x in (899, 900)}
    assert logits.max() == pytest.approx(3, abs=0.05)
    for y, x in ((2000, 700), (2000, 1100), (400, 900), (3600, 900)):
        assert logits[y, x] == pytest.approx(0, abs=0.06)
    assert logits[2000, 1300] == pytest.approx(-9, abs=0.1)  # twice as far, four times as much below the middle


def test_no_mask_can_change_the_reach():
    reach = AusmReach(CONFIG)
    queries = torch.randn(1, 2, 16, requires_grad=True)
    assert not reach(queries, torch.rand(1, 2, 2), (8, 8)).requires_grad
    assert reach.ellipses(queries, torch.rand(1, 2, 2)).requires_grad


def test_reach_loss_is_zero_for_ellipses_through_the_corners_of_boxes():
    masks = torch.zeros(2, 20, 40)
    masks[0, 5:15, 8:16] = 0.3
    masks[0, 7, 8:16] = 0  # a box doesn't see what is inside
    masks[1, 19, 39] = 1
    root = math.sqrt(2)
    true = torch.tensor([[12 / 40, 10 / 20, root * 4 / 40, root * 5 / 20]])
    true = torch.cat([true, torch.tensor([[39.5 / 40, 19.5 / 20, root * 0.5 / 40, root * 0.5 / 20]])])
    assert reach_loss(true, masks).item() == pytest.approx(0, abs=1e-4)
    # A corner of the first box lies on its ellipse.
    assert ((16 / 40 - true[0, 0]) / true[0, 2]) ** 2 + ((15 / 20 - true[0, 1]) / true[0, 3]) ** 2 == pytest.approx(1)
    moved = true.clone()
    moved[0, 1] += 0.5 * true[0, 3]
    moved[1, 2] *= 2
    assert reach_loss(moved, masks).item() == pytest.approx(0.5 + math.log(2), abs=1e-4)
    assert reach_loss(true[:0], masks[:0]).item() == 0


def clip(masks: list[torch.Tensor], exhaustive: bool = True, switch: list[int] | None = None, ignore=None):
    """Instances and plan of one frame of 64 x 96 (4 x 6 cells) with these masks."""
    stacked = torch.stack(masks)[:, None] if masks else torch.zeros(0, 1, 64, 96, dtype=torch.bool)
    frames = torch.zeros(1, 1, 3, 64, 96)
    instances = pad_instances(frames, [stacked], None, None, None, ignore)
    given = [torch.tensor(switch if switch is not None else [1] * len(masks), dtype=torch.long)]
    return instances, plan_teacher_forcing(instances, 8, given, exhaustive=[exhaustive])


def rectangle(top: int, left: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def focal(logits: torch.Tensor, middles: dict[tuple[int, int], float], counted: torch.Tensor) -> float:
    """The loss cell by cell; `middles` are cells and the spread of what is around them."""
    total = 0.0
    for y in range(4):
        for x in range(6):
            p = 1 / (1 + math.exp(-float(logits[0, 0, y, x])))
            near = max([math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * s**2)) for (v, u), s in middles.items()] + [0])
            if near == 1:
                total -= (1 - p) ** 2 * math.log(p)
            elif counted[y, x]:
                total -= p**2 * (1 - near) ** 4 * math.log(1 - p)
    return total


def test_selection_loss_is_that_of_middles():
    logits = torch.randn(1, 1, 4, 6)
    large, small = rectangle(0, 0, 48, 48), rectangle(48, 80, 16, 16)
    middles = {(1, 1): 0.5, (3, 5): 0.5}
    everywhere = torch.ones(4, 6, dtype=torch.bool)
    loss = selection_loss(logits, *clip([large, small]))
    assert float(loss) == pytest.approx(focal(logits, middles, everywhere), rel=1e-5)


def test_selection_loss_of_what_is_not_annotated():
    logits = torch.randn(1, 1, 4, 6)
    large = rectangle(0, 0, 48, 48)
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[:3, :3] = True
    loss = selection_loss(logits, *clip([large], exhaustive=False))
    assert float(loss) == pytest.approx(focal(logits, {(1, 1): 0.5}, inside), rel=1e-5)
    # Pixels of which nothing is known are not background.
    loss = selection_loss(logits, *clip([large], ignore=rectangle(0, 64, 64, 32)[None, None]))
    known = torch.ones(4, 6, dtype=torch.bool)
    known[:, 4:] = False
    assert float(loss) == pytest.approx(focal(logits, {(1, 1): 0.5}, known), rel=1e-5)


def test_who_is_followed_is_not_to_be_found():
    logits = torch.randn(1, 1, 4, 6)
    large, small = rectangle(0, 0, 48, 48), rectangle(48, 80, 16, 16)
    everywhere = torch.ones(4, 6, dtype=torch.bool)
    loss = selection_loss(logits, *clip([large, small], switch=[0, 1]))
    assert float(loss) == pytest.approx(focal(logits, {(3, 5): 0.5}, everywhere), rel=1e-5)
    loss = selection_loss(logits, *clip([]))
    assert float(loss) == pytest.approx(focal(logits, {}, everywhere), rel=1e-5)


def test_masks_start_from_the_reach_of_their_queries(tiny_config):
    """With a radius of next to nothing a mask has a pixel at most, whatever else the network says."""
    torch.manual_seed(0)
    model = AusmForUniversalSegmentation(tiny_config).eval()
    clip = torch.randn(1, 2, 3, 64, 96)
    with torch.no_grad():
        assert (model(clip).masks_queries_logits > 0).sum((-2, -1)).min() > 10
        model.model.pixel_decoder.reach.projection.bias[2:] = -5
        assert (model(clip).masks_queries_logits > 0).sum((-2, -1)).max() <= 1


def test_the_selection_is_a_term_of_the_loss(tiny_config):
    torch.manual_seed(0)
    model = AusmForUniversalSegmentation(tiny_config)
    masks = [rectangle(0, 0, 48, 48)[None, None]]
    output = model(torch.randn(1, 1, 3, 64, 96), masks, switch_frames=[torch.tensor([1])], class_sets=[None])
    assert output.loss.item() == pytest.approx(sum(x.item() for x in output.loss_dict.values()), rel=1e-5)
    with torch.no_grad():
        logits = model.model(torch.randn(1, 1, 3, 64, 96)).selection_logits
    assert logits.shape == (1, 1, 4, 6)
    assert output.loss_dict["selection"] > 0
    output.loss.backward()
    assert model.model.query_selection.score.weight.grad.abs().max() > 0


def test_the_reach_of_whoever_is_to_be_found_is_a_term_of_the_loss(tiny_config):
    """In every layer; that of objects that are followed is not."""
    torch.manual_seed(0)
    model = AusmForUniversalSegmentation(tiny_config)
    frames, masks = torch.randn(1, 1, 3, 64, 96), torch.stack([rectangle(0, 0, 48, 48), rectangle(0, 48, 8, 8)])
    with torch.no_grad():
        places = model.model(frames).selection_places
    assert places.shape == (1, 1, tiny_config.num_detection_queries, 2)
    switch = [torch.tensor([1, 0])]
    output = model(frames, [masks[:, None]], switch_frames=switch, class_sets=[None])
    # A fresh network's ellipses are circles of the same radius around their places.
    box = torch.tensor([[0.25, 0.375, 0.25 * 2**0.5, 0.375 * 2**0.5]])
    shifts = (places[0, 0] - box[:, :2]).abs() / box[:, 2:]
    sizes = (0.2 / box[0, 2:]).log().abs().sum()
    one = shifts.sum(-1) + sizes
    per_object = (tiny_config.num_decoder_layers + 1) / 2  # every term is divided by all objects
    assert per_object * one.min() - 1e-4 <= output.loss_dict["reach"] <= per_object * one.max() + 1e-4
    output.loss.backward()
    assert model.model.pixel_decoder.reach.projection.weight.grad.abs().max() > 0
    output = model(frames, [masks[:, None]], switch_frames=[torch.tensor([0, 0])], class_sets=[None])
    assert output.loss_dict["reach"] == 0


def test_the_network_learns_where_to_look(tiny_config):
    """Both squares of one picture are found after a few steps on it."""
    config = AusmConfig.from_dict({**tiny_config.to_dict(), "foreground_threshold": 0.5})
    torch.manual_seed(0)
    model = AusmForUniversalSegmentation(config)
    masks = torch.stack([rectangle(0, 16, 32, 32), rectangle(32, 64, 32, 32)])[:, None]
    picture = 0.1 * torch.randn(1, 1, 3, 64, 96) + 2 * masks.any(0)[None, :, None]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        loss = model(picture, [masks], switch_frames=[torch.tensor([1, 1])], class_sets=[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        output = model(picture)
    found = output.masks_queries_logits[0, 0][output.foreground_queries_logits[0, 0].sigmoid() > 0.5] > 0
    true = F.interpolate(masks.float().transpose(0, 1), scale_factor=0.25, mode="area")[0] > 0.5
    shared = torch.einsum("qhw,nhw->qn", found.float(), true.float())
    iou = shared / (found.sum((1, 2))[:, None] + true.sum((1, 2)) - shared)
    assert (iou.amax(0) > 0.8).all(), iou
