"""What the history of a training clip is made of: when objects are handed over, and how clean their masks are.

All draws come from a generator per clip, so a clip's targets depend on the clip's number alone: not on the batch, the
process or the step it falls into.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ausm_hf.model.masks_ausm import exclusive
from ausm_hf.model.prompts_ausm import ObjectPrompt, fill_box


def clip_generator(seed: int, index: int) -> torch.Generator:
    """Generator for clip number `index` of a run with that seed (on the CPU)."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_prompts(
    masks: torch.Tensor, history_masks: torch.Tensor, probability: float, generator: torch.Generator
) -> torch.Tensor:
    """What the user marks in the first frame: the object's mask, or a signal that the network has to make one from.

    Signals are a box around the object, a little off; one to five clicks; a scribble; or a wrong mask that clicks
    correct.

    Args:
        masks: (N, H, W) true masks of the first frame.
        history_masks: (N, H, W) what the history shows of it, given where there is no signal.
        probability: that an object that is in the first frame is given by a signal.

    Returns:
        (N, H, W), `M_0`, in the dtype and on the device of `history_masks`.
    """
    prompts = history_masks.clone()
    for n in range(len(masks)):
        if torch.rand((), generator=generator) >= probability or not masks[n].any():
            continue
        prompts[n] = _signal(masks[n].cpu() != 0, generator).to(prompts)
    return prompts


def _signal(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A signal (H, W) for an object's mask (H, W); the mask itself where nothing of the signal is left."""
    size = mask.shape[0], mask.shape[1]

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def clicks(where: torch.Tensor, number: int) -> tuple[tuple[float, float], ...]:
        """Points (x, y) in the middle of pixels of `where`, none if it has none."""
        pixels = where.nonzero()
        if not len(pixels):
            return ()
        chosen = torch.randint(len(pixels), (number,), generator=generator)
        return tuple((x + 0.5, y + 0.5) for y, x in pixels[chosen].tolist())

    def clicked(on: torch.Tensor, off: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        positive, negative = clicks(on, 1 + draw(3)), clicks(off, draw(3))
        labels = (1,) * len(positive) + (0,) * len(negative)
        return ObjectPrompt(points=positive + negative, labels=labels).signal(size, known)

    inside = 1 - _dilate(1 - mask[None].float(), 3)[0] > 0
    inside = inside if inside.any() else mask
    y, x = mask.nonzero(as_tuple=True)
    kind = draw(10)
    if kind < 4:
        box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        off = torch.randn(4, generator=generator) * 0.03 * (box[2:] - box[:2]).repeat(2)
        signal = fill_box(size, box + off)
    elif kind < 7:
        around = (_dilate(mask[None], max(4, min(size) // 12))[0] > 0) & ~mask
        signal = clicked(inside, around)
    elif kind < 8:
        signal = ObjectPrompt(scribble=clicks(inside, 2 + draw(2))).signal(size)
    else:
        # A wrong mask, cut off or with a box too much, and clicks where it is wrong.
        pixel = draw(len(y))
        wrong = mask.clone()
        if kind == 8:
            wrong[int(y[pixel]) :] = False
        else:
            corner = torch.stack([x[pixel], y[pixel]]).float()
            extent = torch.tensor([size[1], size[0]]) * (0.1 + 0.2 * torch.rand(2, generator=generator))
            wrong |= fill_box(size, torch.cat([corner, corner + extent]))
        signal = clicked(mask & ~wrong, wrong & ~mask, wrong)
    return signal if signal.any() else mask


def corrupt_history(
    masks: torch.Tensor, switch_frames: torch.Tensor, probability: float, generator: torch.Generator
) -> torch.Tensor:
    """Masks as a tracker would have left them: dilated, eroded, shifted, dropped, or those of another object.

    The frame in which an object is handed over, or prompted, is dilated or eroded only: without a trustworthy first
    mark there is nothing that the network could be asked to follow.

    Args:
        masks: (N, T, H, W) bool, uint8 or float in [0, 1]; not changed.
        switch_frames: (N,) int64, s_i.
        probability: that a mask is corrupted.

    Returns:
        (N, T, H, W) in the dtype and on the device of `masks`.
    """
    num_objects, num_frames, height, width = masks.shape
    if num_objects == 0 or probability == 0:
        return masks
    corrupted = masks.clone()
    # 0 dilate, 1 erode, 2 shift, 3 drop, 4 swap
    kind = torch.randint(5, (num_objects, num_frames), generator=generator)
    hit = torch.rand(num_objects, num_frames, generator=generator) < probability
    first = (switch_frames.cpu().clamp(min=1) - 1)[:, None] == torch.arange(num_frames)
    kind = torch.where(first, kind % 2, kind)
    largest = max(1, round(0.04 * min(height, width)))
    radius = int(torch.randint(1, largest + 1, (1,), generator=generator))
    reach = max(1, round(0.1 * min(height, width)))
    shifts = torch.randint(-reach, reach + 1, (num_objects, num_frames, 2), generator=generator)

    def chosen(number: int) -> torch.Tensor:
        return (hit & (kind == number)).to(masks.device)

    where = chosen(0)
    corrupted[where] = _dilate(masks[where], radius)
    where = chosen(1)
    eroded = 1 - _dilate(1 - masks[where].float(), radius)
    gone = ~eroded.flatten(1).any(1)[:, None, None]
    corrupted[where] = torch.where(gone, masks[where].float(), eroded).to(masks.dtype)
    where = chosen(2)
    corrupted[where] = _shift(masks[where], shifts.to(masks.device)[where])
    corrupted[chosen(3)] = 0
    if num_objects > 1:
        where = chosen(4)
        corrupted[where] = masks.roll(1, dims=0)[where]
    return corrupted


def add_lasting_errors(
    masks: torch.Tensor, switch_frames: torch.Tensor, probability: float, generator: torch.Generator
) -> torch.Tensor:
    """Masks with a part that is lost, or too much, from some frame on: errors that a tracker makes and then keeps.

    The part is an ellipse at a fixed place of the object's box. The mark by which an object is handed over, or
    prompted, is left alone: from it the network can know better.

    Args:
        masks: (N, T, H, W) bool, uint8 or float in [0, 1]; not changed.
        switch_frames: (N,) int64, s_i.
        probability: that an object gets such an error.

    Returns:
        (N, T, H, W) in the dtype and on the device of `masks`.
    """
    num_objects, num_frames, height, width = masks.shape
    if probability == 0:
        return masks
    wrong = masks.clone()
    rows = torch.arange(height, device=masks.device)[:, None]
    columns = torch.arange(width, device=masks.device)
    for n in range(num_objects):
        hit, lost = torch.rand(2, generator=generator) < torch.tensor([probability, 0.5])
        place, radius, start = torch.rand(5, generator=generator).split([2, 2, 1])
        first = max(int(switch_frames[n]), 1)  # the first mask after the mark
        if not hit or first >= num_frames:
            continue
        radius = 0.1 + 0.3 * radius
        if not lost:
            place = 1.4 * place - 0.2  # also beside the object
        place, radius = place.to(masks.device), radius.to(masks.device)
        for t in range(first + int(start * (num_frames - first)), num_frames):
            y, x = masks[n, t].nonzero(as_tuple=True)
            if not len(y):
                continue
            top, left = y.min(), x.min()
            tall, wide = y.max() - top + 1, x.max() - left + 1
            part = ((rows - top) / tall - place[0]) ** 2 / radius[0] ** 2 + (
                (columns - left) / wide - place[1]
            ) ** 2 / radius[1] ** 2 < 1
            changed = masks[n, t] * ~part if lost else masks[n, t] + part.to(masks.dtype) * (masks[n, t] == 0)
            if changed.any():
                wrong[n, t] = changed
    return wrong


def sample_history(
    masks: torch.Tensor,
    mask_logits: torch.Tensor,
    foreground_logits: torch.Tensor,
    switch_frames: torch.Tensor,
    probability: float,
    foreground_threshold: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """True masks, some of them replaced by what the network predicted (scheduled sampling).

    Only masks that the network tracks can be its own: those after frame s_i, and not the prompt in the first frame.
    As at inference, a mask is empty where its foreground probability is below the threshold, and no two overlap.

    Args:
        masks: (N, T, H, W) bool, uint8 or float; not changed.
        mask_logits: (T, N, h, w) of the objects' ID vectors, from a pass over the clip without gradient.
        foreground_logits: (T, N).
        switch_frames: (N,) int64, s_i.
        probability: that a tracked mask is replaced.

    Returns:
        (N, T, H, W) in the dtype and on the device of `masks`.
    """
    num_objects, num_frames, height, width = masks.shape
    if num_objects == 0:
        return masks
    tracked = torch.arange(num_frames) >= switch_frames.cpu().clamp(min=1)[:, None]
    replaced = torch.rand(num_objects, num_frames, generator=generator) < probability
    seen = foreground_logits.float().sigmoid().T > foreground_threshold
    logits = F.interpolate(mask_logits.float(), size=(height, width), mode="bilinear", align_corners=False)
    candidates = (tracked.to(masks.device) & seen).T[..., None, None]
    predicted = exclusive(logits.masked_fill(~candidates, -torch.inf)).transpose(0, 1)
    return torch.where((tracked & replaced).to(masks.device)[..., None, None], predicted.to(masks.dtype), masks)


def _dilate(masks: torch.Tensor, radius: int) -> torch.Tensor:
    """Dilates (K, H, W) masks by a square of side 2 * radius + 1, one axis after the other."""
    size = 2 * radius + 1
    x = masks.float()[:, None]
    x = F.max_pool2d(F.max_pool2d(x, (size, 1), 1, (radius, 0)), (1, size), 1, (0, radius))
    return x[:, 0].to(masks.dtype)


def _shift(masks: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Moves (K, H, W) masks by (K, 2) pixels (down, right); what leaves the frame is lost."""
    _, height, width = masks.shape
    rows = torch.arange(height, device=masks.device) - shifts[:, :1]
    columns = torch.arange(width, device=masks.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    moved = masks.gather(1, rows.clamp(0, height - 1)[:, :, None].expand_as(masks))
    moved = moved.gather(2, columns.clamp(0, width - 1)[:, None, :].expand_as(masks))
    return moved * inside.to(masks.dtype)
