import numpy as np
import pytest
import torch
from PIL import Image

from ausm_hf.data.augment import (
    drop_small,
    jitter_colour,
    random_anchor,
    random_view,
    select_objects,
    view_matrix,
    warp_clip,
)
from ausm_hf.data.clips import Clip
from ausm_hf.data.sampling import pseudo_motion


def painted_clip(steps: int = 1, height: int = 96, width: int = 160) -> Clip:
    """A red disc on green noise: the mask can be read off the picture."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(0)
    frames = np.zeros((steps, 3, height, width), dtype=np.uint8)
    masks = np.zeros((1, steps, height, width), dtype=bool)
    for t in range(steps):
        masks[0, t] = (y - 50) ** 2 + (x - 60 - 3 * t) ** 2 < 30**2
        frames[t, 1] = rng.integers(150, 250, (height, width))
        frames[t, :, masks[0, t]] = (240, 0, 0)
    return Clip(
        torch.from_numpy(frames),
        torch.from_numpy(masks),
        torch.zeros(steps, height, width, dtype=torch.bool),
        torch.ones(steps, dtype=torch.bool),
        ["ball"],
    )


def random_maps(clip: Clip, size: tuple[int, int], steps: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    native = tuple(clip.frames.shape[-2:])
    view = random_view(native, size, rng, random_anchor(clip, rng))
    if len(clip.frames) == 1:
        return pseudo_motion(view, native, size, steps, rng)
    return np.repeat(view_matrix(size, **view)[None], steps, axis=0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [(96, 160), (64, 64), (160, 256)])
def test_masks_stay_on_their_objects(steps, size):
    seen = 0
    for seed in range(12):
        clip = painted_clip(steps)
        warped = warp_clip(clip, random_maps(clip, size, 3, seed), size)
        assert warped.frames.shape == (3, 3, *size) and warped.masks.shape == (1, 3, *size)
        assert warped.annotated.shape == (3,)
        red = (warped.frames[:, 0] > warped.frames[:, 1]) & ~warped.ignore
        mask = warped.masks[0]
        assert not (mask & warped.ignore).any()
        seen += mask.sum().item()
        # Halving on the way down blurs the edge: a quarter of a pixel around the disc at most.
        assert (red ^ mask).sum() <= 0.02 * mask.sum() + 8
    assert seen > 0


def test_warp_agrees_with_pillow():
    clip = painted_clip()
    size = (64, 96)
    maps = np.stack(
        [view_matrix(size, (1.1, 0.9), (70, 45), flip, angle) for flip, angle in [(False, 12), (True, -7)]]
    )
    warped = warp_clip(clip, maps, size)
    image, mask = Image.fromarray(clip.frames[0].permute(1, 2, 0).numpy()), Image.fromarray(clip.masks[0, 0].numpy())
    for t, matrix in enumerate(maps):
        data, shape = matrix.ravel().tolist(), (size[1], size[0])
        inside = ~warped.ignore[t].numpy()
        theirs = np.array(image.transform(shape, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)).astype(int)
        ours = warped.frames[t].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(theirs - ours)[inside].max() <= 3
        theirs = np.array(mask.transform(shape, Image.Transform.AFFINE, data, Image.Resampling.NEAREST))
        assert (theirs != warped.masks[0, t].numpy()).mean() < 1e-3


def test_what_lies_beyond_the_border_is_ignored_and_mirrored():
    clip = painted_clip()
    warped = warp_clip(clip, view_matrix((96, 160), (2, 2), (80, 48))[None], (96, 160))
    assert warped.ignore[0, :24].all() and warped.ignore[0, -24:].all() and not warped.ignore[0, 24:72, 40:120].any()
    assert warped.frames[0, 1, :20, 40:120].float().mean() > 100  # no black bars


def test_pseudo_motion_turns_one_way_and_stays_near_the_view():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        view = random_view((96, 160), (64, 96), rng)
        maps = pseudo_motion(view, (96, 160), (64, 96), 6, rng)
        scaled = maps[:, :, :2] / (view["scale"] * ([-1, 1] if view["flip"] else [1, 1]))
        angles = np.degrees(np.arctan2(scaled[:, 1, 0], scaled[:, 0, 0]))
        assert np.abs(angles).max() <= 15.001
        assert (np.diff(angles) >= 0).all() or (np.diff(angles) <= 0).all()
        centres = maps[:, :, :2] @ [48, 32] + maps[:, :, 2]
        assert (centres > 0).all() and (centres < [160, 96]).all()
        for axis in range(2):
            assert (np.diff(centres[:, axis]) >= -1e-9).all() or (np.diff(centres[:, axis]) <= 1e-9).all()


def test_anchor_is_in_view():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        view = random_view((96, 160), (32, 64), rng, anchor=(5.0, 90.0), zoom=(2, 4))
        inside = np.linalg.inv(np.vstack([view_matrix((32, 64), **view), [0, 0, 1]])) @ [5, 90, 1]
        assert 0 <= inside[0] <= 64 and 0 <= inside[1] <= 32


def test_colour_changes_alike_over_the_clip():
    frames = painted_clip(1).frames.expand(3, -1, -1, -1)
    changed = jitter_colour(frames, np.random.default_rng(3))
    assert changed.dtype == torch.uint8
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    assert not torch.equal(changed[0], frames[0])


def test_colour_is_brightness_then_contrast_then_saturation():
    frames = torch.from_numpy(np.random.default_rng(0).integers(40, 200, (2, 3, 16, 24), dtype=np.uint8))
    brightness, contrast, saturation = np.random.default_rng(3).uniform(0.75, 1.25, size=3).tolist()
    wanted = frames.double() * brightness
    wanted = wanted.mean() + (wanted - wanted.mean()) * contrast
    red, green, blue = wanted.unbind(1)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    wanted = (grey + (wanted - grey) * saturation).clamp(0, 255)
    assert (jitter_colour(frames, np.random.default_rng(3)) - wanted).abs().max() <= 0.501


def test_slivers_are_emptied_and_the_unseen_dropped():
    masks = torch.zeros(3, 2, 32, 32, dtype=torch.bool)
    masks[0, :, :8, :8] = True
    masks[1, 0, 20, :15] = True  # 15 pixels, nowhere more
    masks[2, 0, 30, :15] = True
    masks[2, 1, 28, :16] = True
    clip = Clip(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), masks, torch.zeros(2, 32, 32, dtype=torch.bool),
                torch.ones(2, dtype=torch.bool), ["a", "b", "c"])  # fmt: skip
    kept = drop_small(clip)
    assert kept.labels == ["a", "c"]
    assert kept.masks.sum(dim=(2, 3)).tolist() == [[64, 64], [0, 16]]
    assert kept.ignore[0, 20, :15].all() and kept.ignore[0, 30, :15].all() and kept.ignore.sum() == 30


def test_too_many_objects_make_a_clip_inexhaustive_but_tiny_ones_do_not():
    masks = torch.zeros(4, 1, 100, 100, dtype=torch.bool)
    for n in range(3):
        masks[n, 0, 20 * n : 20 * n + 10, :50] = True
    masks[3, 0, 90, 90:93] = True  # 0.03% of the picture
    clip = Clip(torch.zeros(1, 3, 100, 100, dtype=torch.uint8), masks, torch.zeros(1, 100, 100, dtype=torch.bool),
                torch.ones(1, dtype=torch.bool), ["a", "b", "c", "d"])  # fmt: skip
    rng = np.random.default_rng(0)
    three = select_objects(clip, 3, rng)
    assert three.labels == ["a", "b", "c"] and three.exhaustive
    assert torch.equal(three.ignore, masks[3])
    two = select_objects(clip, 2, rng)
    assert len(two.labels) == 2 and not two.exhaustive
    gone = ({"a", "b", "c"} - set(two.labels)).pop()
    assert torch.equal(two.ignore, masks[3] | masks["abc".index(gone)])
