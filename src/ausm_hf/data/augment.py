"""Augmentation that is coherent over a clip: one affine warp per frame, colour, and objects too small to see."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from .clips import Clip

# An affine map here is a (2, 3) array that takes a pixel (x, y, 1) of the output to a pixel of the input.

MIN_PIXELS = 16  # of a mask, in a clip as it is trained
MIN_SHARE = 0.0008  # of the picture, that an object has in some frame


def random_view(
    source: tuple[int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
    anchor: tuple[float, float] | None = None,
    zoom: tuple[float, float] = (0.85, 2.0),
) -> dict:
    """Draw a random resized crop with large-scale jitter and a flip, as the parameters of an affine map.

    Scale 1 shows something between the whole picture (borders beside it) and a crop that fills `size`; it is
    multiplied by a factor from `zoom`, uniform in its logarithm. The aspect ratio is stretched by up to 15%.

    Args:
        source: Height and width of the input.
        size: Height and width of the output.
        anchor: A point (x, y) of the input that has to be in view, away from the edge.

    Returns:
        `{"scale": (x, y) input pixels per output pixel, "centre": (x, y) in the input, "flip": bool}`.
    """
    ratios = np.array([source[1] / size[1], source[0] / size[0]])
    fill, show = math.log(ratios.min()), math.log(ratios.max())
    base = math.exp(rng.uniform(fill, show) if rng.random() < 0.5 else fill)
    side = base / math.exp(rng.uniform(math.log(zoom[0]), math.log(zoom[1])))
    stretch = math.exp(rng.uniform(-0.07, 0.07))
    scale = np.array([side * stretch, side / stretch])
    # The window stays inside the input where it fits, and is centred where it is larger.
    half = scale * np.array([size[1], size[0]]) / 2
    extent = np.array([source[1], source[0]], dtype=float)
    low, high = np.minimum(half, extent / 2), np.maximum(extent - half, extent / 2)
    centre = rng.uniform(low, high)
    if anchor is not None:
        centre = np.clip(np.clip(centre, np.array(anchor) - 0.8 * half, np.array(anchor) + 0.8 * half), low, high)
    return {"scale": scale, "centre": centre, "flip": bool(rng.random() < 0.5)}


def random_anchor(clip: Clip, rng: np.random.Generator) -> tuple[float, float] | None:
    """The middle (x, y) of a random object in a random frame where it is visible; None without objects."""
    places = torch.nonzero(clip.masks.flatten(2).any(-1))
    if len(places) == 0:
        return None
    n, t = places[int(rng.integers(len(places)))].tolist()
    y, x = clip.masks[n, t].nonzero(as_tuple=True)
    return x.float().mean().item(), y.float().mean().item()


def view_matrix(
    size: tuple[int, int], scale: np.ndarray, centre: np.ndarray, flip: bool = False, angle: float = 0.0
) -> np.ndarray:
    """The affine map `(2, 3)` of a view: `centre` of the input lands in the middle of an output of `size`."""
    linear = linear_map(scale, flip, angle)
    middle = np.array([size[1], size[0]]) / 2
    return np.concatenate([linear, (np.asarray(centre) - linear @ middle)[:, None]], axis=1)


def linear_map(scale: np.ndarray, flip: bool, angle: float) -> np.ndarray:
    """The `(2, 2)` part of an affine map: `scale` input pixels per output pixel, a flip, a turn by `angle` degrees."""
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return rotation * np.asarray(scale) * ([-1, 1] if flip else [1, 1])


def warp_clip(clip: Clip, matrices: np.ndarray, size: tuple[int, int]) -> Clip:
    """Warp every frame by its own affine map; a one-frame clip becomes as many frames as there are maps.

    Beyond the border the picture is mirrored, masks are empty, and pixels are ignored.

    Args:
        matrices: `(T, 2, 3)`.
        size: Height and width of the result.
    """
    steps = len(matrices)
    height, width = clip.frames.shape[-2:]
    frames = clip.frames.float()
    # Bilinear sampling aliases when it shrinks: halve the picture first, as often as the map shrinks by two.
    shrink = float(np.median(np.abs(np.linalg.det(matrices[:, :, :2])))) ** 0.5
    for _ in range(int(math.log2(max(shrink, 1.0)) + 0.4)):
        if min(frames.shape[-2:]) >= 2:
            frames = F.avg_pool2d(frames, 2, ceil_mode=True)
    grid = sampling_grid(matrices, (height, width), size)
    frames = F.grid_sample(
        frames.expand(steps, -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    layers = torch.cat(
        [clip.masks.transpose(0, 1), clip.ignore[:, None], torch.ones_like(clip.ignore)[:, None]], dim=1
    )
    layers = F.grid_sample(
        layers.float().expand(steps, -1, -1, -1), grid, mode="nearest", padding_mode="zeros", align_corners=False
    )
    layers = layers > 0.5
    return replace(
        clip,
        frames=frames.round_().clamp_(0, 255).to(torch.uint8),
        masks=layers[:, :-2].transpose(0, 1).contiguous(),
        ignore=layers[:, -2] | ~layers[:, -1],
        annotated=clip.annotated.expand(steps).clone(),
    )


def sampling_grid(matrices: np.ndarray, source: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Affine maps `(T, 2, 3)` as the grid `(T, H, W, 2)` that `grid_sample` wants for an input of size `source`."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(-1, 3)
    maps = torch.as_tensor(np.asarray(matrices), dtype=torch.float32)
    located = points @ maps.transpose(1, 2)  # (T, H*W, 2), in input pixels
    extent = torch.tensor([source[1], source[0]], dtype=torch.float32)
    return (2 * located / extent - 1).reshape(len(maps), height, width, 2)


def jitter_colour(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change brightness, contrast and saturation of all frames alike, by up to a quarter; now and then make them grey
    or blur them.

    Args:
        frames: `(T, 3, H, W)` uint8.
    """
    brightness, contrast, saturation = rng.uniform(0.75, 1.25, size=3).tolist()
    if rng.random() < 0.03:
        saturation = 0.0
    blur = rng.random() < 0.08
    # All three are linear: one matrix for the colour of each pixel. Contrast is about the mean of all frames.
    x = frames.flatten(2).float()
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    matrix = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * x.mean()
    x = torch.baddbmm(offset, matrix.expand(len(x), 3, 3), x).view(frames.shape)
    if blur:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def areas(masks: torch.Tensor) -> torch.Tensor:
    """Pixels of masks `(N, T, H, W)` bool: int64 `(N, T)`. By NumPy, which is ten times as fast as torch here."""
    return torch.from_numpy(np.count_nonzero(masks.numpy(), axis=(2, 3)))


def drop_small(clip: Clip) -> Clip:
    """Empty masks of fewer than `MIN_PIXELS`, whose pixels are then ignored, and drop objects that are never seen."""
    area = areas(clip.masks)
    seen = (area >= MIN_PIXELS).any(dim=1)
    masks, ignore = clip.masks.clone(), clip.ignore.clone()
    for n, t in torch.nonzero((area > 0) & (area < MIN_PIXELS)).tolist():
        ignore[t] |= masks[n, t]
        masks[n, t] = False
    return replace(
        clip,
        masks=masks[seen],
        ignore=ignore,
        labels=[label for label, keep in zip(clip.labels, seen.tolist()) if keep],
    )


def select_objects(clip: Clip, max_objects: int, rng: np.random.Generator) -> Clip:
    """Keep at most `max_objects`, drawn at random, and none of less than `MIN_SHARE` in every frame; ignore others.

    A clip that lost objects for number is no longer exhaustive. Losing tiny ones doesn't count: nobody need find them.
    """
    area = areas(clip.masks)
    pixels = clip.masks.shape[-1] * clip.masks.shape[-2]
    visible = (area > 0).any(dim=1)
    candidates = torch.nonzero((area >= MIN_SHARE * pixels).any(dim=1)).flatten().tolist()
    kept = candidates
    if len(candidates) > max_objects:
        kept = sorted(rng.choice(candidates, size=max_objects, replace=False).tolist())
    dropped = [n for n in torch.nonzero(visible).flatten().tolist() if n not in kept]
    masks = clip.masks[kept]
    ignore = clip.ignore
    if dropped:
        ignore = ignore | (clip.masks[dropped].any(dim=0) & ~masks.any(dim=0))
    return replace(
        clip,
        masks=masks,
        ignore=ignore,
        labels=[clip.labels[n] for n in kept],
        exhaustive=clip.exhaustive and len(kept) == len(candidates),
    )
