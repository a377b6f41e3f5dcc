"""The tiny network learns one clip by heart in both forms: all frames at once, and one by one on its own masks."""

import copy

import pytest
import torch

from ausm_hf import AusmForUniversalSegmentation
from ausm_hf.training.forms import IterativeForm
from ausm_hf.training.samples import follow, iou

LENGTH, SIZE, STEPS = 3, 64, 100


@pytest.fixture
def clip():
    """A red square that is given in the first frame, and a blue one that is to be found anew in every frame."""
    frames = 0.2 * torch.rand(1, LENGTH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, LENGTH, SIZE, SIZE)
    for t in range(LENGTH):  # in steps of 4 pixels: at stride 4 the masks are exact, so the loss can vanish
        masks[0, t, 8:32, 8 + 4 * t : 32 + 4 * t] = 1
        masks[1, t, 36 + 4 * t : 56 + 4 * t, 36 - 4 * t : 60 - 4 * t] = 1
    frames[0, :, 0] += masks[0]
    frames[0, :, 2] += masks[1]
    return {
        "pixel_values_videos": frames,
        "mask_labels": [masks],
        "class_labels": [torch.tensor([0, 1])],
        "switch_frames": [torch.tensor([0, LENGTH])],
        "id_slots": [torch.tensor([0, 2])],
        "label_sets": ["pets"],
        "exhaustive": [True],
        "detect": [True],
        "annotated_frames": torch.ones(1, LENGTH, dtype=torch.bool),
        "ignore_masks": torch.zeros(1, LENGTH, SIZE, SIZE, dtype=torch.bool),
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["parallel", "iterative"])
def test_the_loss_on_one_clip_falls_to_near_zero(tiny_config, clip, mode):
    torch.manual_seed(0)
    network = AusmForUniversalSegmentation(copy.deepcopy(tiny_config)).train()
    form = network if mode == "parallel" else IterativeForm(network)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        output = form(**clip)
        losses.append(output["loss"].item())
        optimizer.zero_grad()
        output["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert losses[0] > 20 and losses[-1] < 0.3, losses[::10]
    assert output["loss_dict"]["mask"] + output["loss_dict"]["dice"] < 0.1

    # What it learned holds frame by frame too, on its own masks.
    network.eval()
    masks = clip["mask_labels"][0].bool()
    with torch.no_grad():
        predicted = follow(network, clip["pixel_values_videos"], masks[:1, 0])
    assert iou(predicted, masks[:1]).min() > 0.9
