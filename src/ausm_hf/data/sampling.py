"""What to take from a data set: frames of a video, pseudo-video from a still, objects pasted from elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from .augment import areas, linear_map, sampling_grid, view_matrix
from .clips import Clip, load_clip


def sample_indices(length: int, num_frames: int, stride: int, reverse: bool, rng: np.random.Generator) -> list[int]:
    """Draw `num_frames` frame numbers, `stride` apart.

    A video too short for the stride gets the largest one that fits; one with too few frames is played to and fro.
    """
    if length < num_frames:
        there_and_back = [*range(length), *range(length - 2, 0, -1)]
        indices = [there_and_back[t % len(there_and_back)] for t in range(num_frames)]
    else:
        stride = max(1, min(stride, (length - 1) // max(num_frames - 1, 1)))
        start = int(rng.integers(length - stride * (num_frames - 1)))
        indices = [start + stride * t for t in range(num_frames)]
    return indices[::-1] if reverse else indices


def sample_clip(row: dict, num_frames: int, stride: int, reverse: bool, rng: np.random.Generator) -> Clip:
    """Draw and decode a clip of a video.

    Where more than one frame has ground truth, only such are drawn and the stride counts them (of SA-V, one frame in
    four): in the history of a clip an object without a mask is one that is away. Otherwise frames without it come too,
    but of ten draws the first is taken that begins with ground truth: training starts from masks.
    """
    if not row["annotated"]:
        raise ValueError(f"{row['video_id']} has no frames")
    annotated = [t for t, known in enumerate(row["annotated"]) if known]
    if len(annotated) >= min(num_frames, 2):
        return load_clip(row, [annotated[t] for t in sample_indices(len(annotated), num_frames, stride, reverse, rng)])
    for _ in range(10):
        indices = sample_indices(len(row["annotated"]), num_frames, stride, reverse, rng)
        if row["annotated"][indices[0]]:
            break
    return load_clip(row, indices)


def pseudo_motion(
    view: dict, source: tuple[int, int], size: tuple[int, int], num_frames: int, rng: np.random.Generator
) -> np.ndarray:
    """Affine maps `(T, 2, 3)` that make a moving camera out of one still (the recipe of VITA and GenVIS).

    Rotations are drawn from U[-15, 15] degrees and sorted in time. Half of the time the view also travels: its corners
    move along a sorted path over the picture; otherwise it only drifts. Half of the time all is played backwards.
    Scale and flip of `view` hold for the whole clip.
    """
    angles = np.sort(rng.uniform(-15, 15, num_frames))
    zoom = np.exp(np.sort(rng.uniform(-0.15, 0.15, num_frames)) * rng.choice([-1, 1]))
    extent = np.array([source[1], source[0]], dtype=float)
    window = view["scale"] * np.array([size[1], size[0]])
    if rng.random() < 0.5:
        # How far the centre may travel: over what is out of view, but half a window at most.
        reach = np.minimum(np.maximum(extent - 0.8 * window, 0.25 * extent), 0.5 * window)
    else:
        reach = 0.12 * np.minimum(window, extent)
    steps = np.sort(rng.uniform(-0.5, 0.5, (num_frames, 2)), axis=0) * rng.choice([-1, 1], 2)
    centres = np.clip(view["centre"] + steps * reach, 0.2 * extent, 0.8 * extent)
    if rng.random() < 0.5:
        angles, zoom, centres = angles[::-1], zoom[::-1], centres[::-1]
    return np.stack(
        [
            view_matrix(size, view["scale"] * z, centre, view["flip"], angle)
            for z, centre, angle in zip(zoom, centres, angles)
        ]
    )


@dataclass
class Cutout:
    """An object cut from a clip: `frames` `(K, 3, h, w)` uint8, `masks` `(K, h, w)` bool; K is 1 or a clip's T."""

    frames: torch.Tensor
    masks: torch.Tensor
    label: str | None


def cut_object(clip: Clip, rng: np.random.Generator) -> Cutout | None:
    """Cut one object out of a clip; None if no object is fit for it.

    Fit is an object of 0.5% to 45% of the picture in every frame that the border of the picture doesn't cut off.
    """
    area = areas(clip.masks) / math.prod(clip.masks.shape[-2:])
    fit = ((area > 0.005) & (area < 0.45)).all(dim=1)
    edges = torch.cat([clip.masks[..., 0, :], clip.masks[..., -1, :], clip.masks[..., 0], clip.masks[..., -1]], dim=-1)
    fit &= edges.sum((1, 2)) < 6 * clip.masks.shape[1]  # a few pixels a frame may touch it
    candidates = torch.nonzero(fit).flatten().tolist()
    if not candidates:
        return None
    chosen = candidates[int(rng.integers(len(candidates)))]
    mask = clip.masks[chosen]
    rows, columns = mask.any(dim=0).any(dim=1).nonzero().flatten(), mask.any(dim=0).any(dim=0).nonzero().flatten()
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return Cutout(clip.frames[:, :, box[0], box[1]], mask[:, box[0], box[1]], clip.labels[chosen])


def paste_path(clip: Clip, cutout: Cutout, rng: np.random.Generator) -> np.ndarray:
    """Affine maps `(T, 2, 3)` that move a cutout through a clip.

    It drifts about, enters, leaves, leaves and returns, or crosses the place of an object of the clip halfway, so that
    one hides the other.
    """
    steps = len(clip.frames)
    height, width = clip.frames.shape[-2:]
    extent = np.array([width, height], dtype=float)
    cut_height, cut_width = cutout.frames.shape[-2:]
    area = cutout.masks.float().sum((1, 2)).mean().item()
    # Side of a square of the object's area, as a part of the picture's: small enough to leave room, large enough to
    # see.
    side = math.exp(rng.uniform(math.log(0.12), math.log(0.4))) * math.sqrt(height * width)
    magnify = min(side / math.sqrt(area), 1.2 * height / cut_height, 1.2 * width / cut_width)
    growth = np.exp(np.linspace(0, rng.uniform(-0.25, 0.25), steps))
    angles = rng.uniform(-10, 10) + np.linspace(0, rng.uniform(-12, 12), steps)

    time = np.linspace(-0.5, 0.5, steps) if steps > 1 else np.zeros(1)
    direction = rng.uniform(-math.pi, math.pi)
    heading = np.array([math.cos(direction), 0.5 * math.sin(direction)])
    distance = width * min(0.9, rng.uniform(0.02, 0.12) * (steps - 1))
    kind = rng.choice(["drift", "enter", "leave", "return", "cross"], p=[0.25, 0.1, 0.1, 0.15, 0.4])
    there = clip.masks[:, steps // 2].flatten(1).any(dim=1).nonzero().flatten().tolist() if len(clip.masks) else []
    if kind == "cross" and there:
        ys, xs = clip.masks[there[int(rng.integers(len(there)))], steps // 2].nonzero(as_tuple=True)
        middle = np.array([xs.float().mean().item(), ys.float().mean().item()])
        if steps % 2 == 0:
            time = time - time[steps // 2]
        # Far enough to be seen on both sides, but no faster than things move.
        distance = max(distance, rng.uniform(0.3, 0.8) * width * min(1, (steps - 1) / 8))
        centres = middle + time[:, None] * distance * heading
    elif kind in ("enter", "leave", "return"):
        inside = rng.uniform(0.25, 0.75, 2) * extent
        side_sign = rng.choice([-1, 1])
        outside = np.array([width * 0.5 + side_sign * (0.5 * width + 0.45 * magnify * cut_width), inside[1]])
        outside[1] += rng.uniform(-0.2, 0.2) * height
        mix = np.linspace(0, 1, steps)[:, None]
        if kind == "return":
            # Away from one frame to another, never in the first one nor in the last.
            away = np.sort(rng.integers(1, max(steps - 1, 2), size=2))
            mix = np.array([[0.0 if away[0] <= t <= away[1] else 1.0] for t in range(steps)])
        centres = outside * (1 - mix) + inside * mix
        centres = centres[::-1] if kind == "leave" else centres
        if kind == "return":
            centres = centres + 0.3 * time[:, None] * distance * heading * mix
    else:
        centres = rng.uniform(0.2, 0.8, 2) * extent + time[:, None] * distance * heading

    flip = rng.random() < 0.5
    maps = []
    for centre, grow, angle in zip(centres, growth, angles):
        # The map from the picture to the cutout: the inverse of placing the cutout's middle at `centre`.
        linear = linear_map(np.full(2, 1 / (magnify * grow)), flip, angle)
        offset = np.array([cut_width, cut_height]) / 2 - linear @ centre
        maps.append(np.concatenate([linear, offset[:, None]], axis=1))
    return np.stack(maps)


def paste_object(clip: Clip, cutout: Cutout, maps: np.ndarray, behind: bool) -> Clip:
    """Paste a cutout into a clip as a new last object, moved by `maps`; what it hides loses its mask there.

    Args:
        behind: It passes behind the clip's objects instead of in front of them.
    """
    steps, _, height, width = clip.frames.shape
    layers = torch.cat([cutout.frames.float(), cutout.masks[:, None].float()], dim=1)
    # A margin without mask, so that the mask ends at the cutout's border; the picture is extended over it.
    margin = 2
    layers = F.pad(layers, (margin,) * 4, mode="replicate")
    layers[:, 3, :margin] = layers[:, 3, -margin:] = 0
    layers[:, 3, :, :margin] = layers[:, 3, :, -margin:] = 0
    maps = maps + np.array([[0, 0, margin], [0, 0, margin]])
    if float(np.median(np.abs(np.linalg.det(maps[:, :, :2])))) ** 0.5 > 1.5:  # shrinks: smooth, so as not to alias
        layers = F.avg_pool2d(layers, 3, stride=1, padding=1, count_include_pad=False)
    source = layers.shape[-2], layers.shape[-1]
    frames, visible = clip.frames.clone(), torch.zeros(steps, height, width, dtype=torch.bool)
    for t, layer in enumerate(layers.expand(steps, -1, -1, -1)):
        rows, columns = landing_place(maps[t], source, (height, width))
        size = rows.stop - rows.start, columns.stop - columns.start
        if min(size) <= 0:
            continue
        inside = maps[t].copy()
        inside[:, 2] += inside[:, :2] @ [columns.start, rows.start]
        grid = sampling_grid(inside[None], source, size)
        warped = F.grid_sample(layer[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
        colour, alpha = warped[:3], warped[3]
        if behind:
            alpha = alpha * ~clip.masks[:, t, rows, columns].any(dim=0)
        visible[t, rows, columns] = there = alpha > 0.5
        # A seam one pixel soft: sharp cuts would give pasted objects away.
        soft = F.avg_pool2d(F.pad(alpha[None, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
        soft = soft * there if behind else soft
        place = frames[t, :, rows, columns]
        place.copy_((place * (1 - soft) + colour * soft).round_().clamp_(0, 255))
    return replace(
        clip,
        frames=frames,
        masks=torch.cat([clip.masks & ~visible, visible[None]]),
        ignore=clip.ignore & ~visible,
        labels=[*clip.labels, cutout.label],
    )


def landing_place(matrix: np.ndarray, source: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a picture of `size` onto which an affine map takes all of `source`, and 2 pixels more."""
    corners = np.array([[0, source[1], 0, source[1]], [0, 0, source[0], source[0]]])
    x, y = np.linalg.inv(matrix[:, :2]) @ (corners - matrix[:, 2:])
    low = np.maximum(np.floor([y.min() - 2, x.min() - 2]), 0).astype(int)
    high = np.minimum(np.ceil([y.max() + 2, x.max() + 2]), size).astype(int)
    return slice(low[0], high[0]), slice(low[1], high[1])
