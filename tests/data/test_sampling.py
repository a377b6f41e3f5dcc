import numpy as np
import torch
from trees import index_mask, write_frames, write_mask

from ausm_hf.data import sampling
from ausm_hf.data.augment import view_matrix
from ausm_hf.data.clips import Clip, clip_row, clips_from_rows, file
from ausm_hf.data.sampling import Cutout, cut_object, paste_object, paste_path, sample_clip, sample_indices


def flat_clip(steps: int, colour: int, box: tuple[slice, slice] | None, size=(64, 96)) -> Clip:
    frames = torch.full((steps, 3, *size), 20, dtype=torch.uint8)
    masks = torch.zeros(1, steps, *size, dtype=torch.bool)
    if box is not None:
        frames[:, :, box[0], box[1]] = colour
        masks[0, :, box[0], box[1]] = True
    return Clip(frames, masks, torch.zeros(steps, *size, dtype=torch.bool), torch.ones(steps, dtype=torch.bool), ["a"])


def test_indices():
    rng = np.random.default_rng(0)
    for length in range(1, 20):
        for stride in (1, 3, 8):
            for reverse in (False, True):
                indices = sample_indices(length, 4, stride, reverse, rng)
                assert len(indices) == 4 and 0 <= min(indices) and max(indices) < length
                steps = set(np.diff(indices).tolist())
                if length >= 4:
                    assert len(steps) == 1
                    assert abs(steps.pop()) == min(stride, (length - 1) // 3)
                    assert (indices[0] > indices[-1]) == reverse
                else:
                    assert steps <= {-1, 0, 1}
    assert sample_indices(3, 6, 1, False, rng) == [0, 1, 2, 1, 0, 1]


def row_with_masks_at(tmp_path, length: int, annotated: list[int]) -> dict:
    names = [f"{t:03d}" for t in range(length)]
    write_frames(tmp_path / "frames", names)
    for t in annotated:
        write_mask(tmp_path / f"{t}.png", index_mask(t, [1]))
    annotations = [file(tmp_path / f"{t}.png") if t in annotated else None for t in range(length)]
    frames = [file(tmp_path / "frames" / f"{name}.png") for name in names]
    return clips_from_rows([clip_row("v", frames, [], annotations=annotations)])[0]


def test_sparse_annotation_is_sampled_where_it_is(tmp_path):
    row = row_with_masks_at(tmp_path, 17, [0, 4, 8, 12, 16])
    for seed in range(5):
        clip = sample_clip(row, 3, 1, seed % 2 == 0, np.random.default_rng(seed))
        assert clip.annotated.all()
        numbers = clip.frames[:, 0, 0, 0].int() // 10
        assert numbers.diff().abs().tolist() == [4, 4]


def test_clips_begin_with_ground_truth(tmp_path):
    row = row_with_masks_at(tmp_path, 6, [3])
    for seed in range(5):
        clip = sample_clip(row, 3, 1, False, np.random.default_rng(seed))
        assert clip.annotated.tolist() == [True, False, False]


def test_few_masks_are_played_to_and_fro(tmp_path):
    row = row_with_masks_at(tmp_path, 6, [0, 3])
    clip = sample_clip(row, 3, 1, False, np.random.default_rng(0))
    assert clip.annotated.all() and (clip.frames[:, 0, 0, 0].int() // 10).tolist() == [0, 3, 0]


def test_pasted_in_front_hides_what_is_behind_and_back():
    base = flat_clip(1, 100, (slice(20, 44), slice(30, 54)))
    cutout = Cutout(torch.full((1, 3, 10, 10), 250, dtype=torch.uint8), torch.ones(1, 10, 10, dtype=torch.bool), "b")
    # 20 x 20 pixels around (60, 30), so that columns 50..53 overlap.
    maps = np.concatenate([np.eye(2) / 2, np.array([[5.0], [5.0]]) - np.array([[30.0], [15.0]])], axis=1)[None]
    front = paste_object(base, cutout, maps, behind=False)
    assert front.labels == ["a", "b"]
    assert front.masks[1, 0].nonzero().min(0).values.tolist() == [20, 50]
    assert front.masks[1].sum() == 400
    assert front.masks[0].sum() == 24 * 24 - 20 * 4
    assert not (front.masks[0] & front.masks[1]).any()
    inner = front.masks[1, 0].clone()
    inner[[20, 21, 38, 39]] = False  # the seam is soft
    inner[:, [50, 51, 68, 69]] = False
    assert (front.frames[0, 0][inner] == 250).all()

    behind = paste_object(base, cutout, maps, behind=True)
    assert torch.equal(behind.masks[0], base.masks[0])
    assert behind.masks[1].sum() == 400 - 20 * 4
    assert torch.equal(behind.frames[0, 0][base.masks[0, 0]], base.frames[0, 0][base.masks[0, 0]])


def test_an_object_passes_behind_and_returns():
    base = flat_clip(5, 100, (slice(10, 54), slice(36, 60)))
    cutout = Cutout(torch.full((1, 3, 12, 12), 250, dtype=torch.uint8), torch.ones(1, 12, 12, dtype=torch.bool), "b")
    maps = np.stack([[[1, 0, 6.0 - x], [0, 1, 6.0 - 32]] for x in (12, 36, 48, 60, 84)])
    visible = paste_object(base, cutout, maps, behind=True).masks[1].sum((1, 2)).tolist()
    assert visible == [144, 72, 0, 72, 144]


def test_ignored_pixels_under_a_pasted_object_are_known():
    base = flat_clip(1, 0, None)
    base.ignore[:] = True
    cutout = Cutout(torch.full((1, 3, 10, 10), 250, dtype=torch.uint8), torch.ones(1, 10, 10, dtype=torch.bool), None)
    pasted = paste_object(base, cutout, view_matrix((64, 96), (1, 1), (5, 5))[None], behind=False)
    assert torch.equal(~pasted.ignore, pasted.masks[1]) and pasted.masks[1].sum() == 100


def test_pasting_leaves_out_only_where_the_object_is_not(monkeypatch):
    """The same as with the whole picture looked at: turned, shrunk, and beyond the border."""
    rng = np.random.default_rng(0)
    base = flat_clip(6, 100, (slice(20, 44), slice(30, 54)))
    base.frames = torch.from_numpy(rng.integers(0, 256, base.frames.shape, dtype=np.uint8))
    for side in (12, 70):
        cutout = Cutout(
            torch.from_numpy(rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8)),
            torch.ones(1, side, side, dtype=torch.bool),
            "b",
        )
        for seed in range(12):
            maps, behind = paste_path(base, cutout, np.random.default_rng(seed)), seed % 2 == 0
            got = paste_object(base, cutout, maps, behind)
            with monkeypatch.context() as patch:
                patch.setattr(sampling, "landing_place", lambda *_: (slice(0, 64), slice(0, 96)))
                wanted = paste_object(base, cutout, maps, behind)
            assert torch.equal(got.masks, wanted.masks)
            assert (got.frames.int() - wanted.frames.int()).abs().max() <= 1


def test_cut_objects_are_whole_and_of_a_fair_size():
    rng = np.random.default_rng(0)
    cutout = cut_object(flat_clip(3, 100, (slice(20, 44), slice(30, 54))), rng)
    assert cutout.frames.shape == (3, 3, 24, 24) and cutout.masks.all() and cutout.label == "a"
    assert cut_object(flat_clip(3, 100, (slice(40, 64), slice(30, 54))), rng) is None  # cut off by the border
    assert cut_object(flat_clip(3, 100, (slice(20, 24), slice(30, 34))), rng) is None  # tiny
    assert cut_object(flat_clip(3, 100, (slice(1, 63), slice(1, 95))), rng) is None  # all there is


def test_paths_enter_leave_and_cross():
    base = flat_clip(6, 100, (slice(20, 44), slice(30, 54)))
    cutout = Cutout(torch.full((6, 3, 20, 20), 250, dtype=torch.uint8), torch.ones(6, 20, 20, dtype=torch.bool), "b")
    stories = {"first only": 0, "last only": 0, "hidden between": 0, "away between": 0, "crosses": 0, "always": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        maps = paste_path(base, cutout, rng)
        assert maps.shape == (6, 2, 3) and np.isfinite(maps).all()
        pasted = paste_object(base, cutout, maps, behind=seed % 2 == 0)
        seen = pasted.masks[1].flatten(1).sum(1) > 15
        stories["first only"] += bool(seen[0] and not seen[-1])
        stories["last only"] += bool(seen[-1] and not seen[0])
        stories["hidden between"] += bool(seen[0] and seen[-1] and not seen.all())
        outside = pasted.masks[1].flatten(1).sum(1) + pasted.masks[0].flatten(1).sum(1) == 24 * 24
        stories["away between"] += bool(seen[0] and seen[-1] and (outside & ~seen).any())
        stories["crosses"] += bool((pasted.masks[0].flatten(1).sum(1) < 24 * 24).any())
        stories["always"] += bool(seen.all())
    assert all(count >= 1 for count in stories.values()), stories


def test_paths_of_a_single_frame_are_finite():
    base = flat_clip(1, 100, (slice(20, 44), slice(30, 54)))
    cutout = cut_object(base, np.random.default_rng(0))
    for seed in range(20):
        assert np.isfinite(paste_path(base, cutout, np.random.default_rng(seed))).all()
