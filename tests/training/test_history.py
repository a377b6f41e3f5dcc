import numpy as np
import pytest
import torch
from scipy import ndimage

from ausm_hf.training import history
from ausm_hf.training.history import (
    add_lasting_errors,
    clip_generator,
    corrupt_history,
    draw_prompts,
    sample_history,
)


def squares(num_objects=3, num_frames=5, size=64):
    masks = torch.zeros(num_objects, num_frames, size, size, dtype=torch.bool)
    for n in range(num_objects):
        masks[n, :, 5 + 18 * n : 19 + 18 * n, 10:40] = True
    return masks


def test_a_clip_draws_the_same_whatever_is_around_it():
    first = torch.rand(3, generator=clip_generator(1, 5))
    torch.rand(7)
    assert torch.equal(first, torch.rand(3, generator=clip_generator(1, 5)))
    assert not torch.equal(first, torch.rand(3, generator=clip_generator(1, 6)))
    assert not torch.equal(first, torch.rand(3, generator=clip_generator(2, 5)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_corruption_changes_a_copy_and_keeps_the_form(dtype):
    masks = squares().to(dtype)
    before = masks.clone()
    corrupted = corrupt_history(masks, torch.zeros(3, dtype=torch.long), 1.0, clip_generator(0, 0))
    assert torch.equal(masks, before)
    assert corrupted.shape == masks.shape and corrupted.dtype == dtype
    assert not torch.equal(corrupted, masks)
    assert set(corrupted.float().unique().tolist()) <= {0.0, 1.0}


def test_probability_is_the_share_of_changed_masks():
    masks, switch_frames = squares(), torch.full((3,), 5)
    assert torch.equal(corrupt_history(masks, switch_frames, 0.0, clip_generator(0, 0)), masks)
    changed = [
        (corrupt_history(masks, switch_frames, 0.25, clip_generator(0, i)) != masks).flatten(2).any(2)
        for i in range(200)
    ]
    # A shift by nothing leaves a few as they are.
    assert torch.stack(changed).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_the_first_mark_stays_at_its_place():
    masks = squares()
    switch_frames = torch.tensor([0, 1, 4])
    for i in range(50):
        corrupted = corrupt_history(masks, switch_frames, 1.0, clip_generator(0, i))
        for n, t in enumerate([0, 0, 3]):
            mark, true = corrupted[n, t], masks[n, t]
            assert mark.any() and ((mark & ~true).any() != (true & ~mark).any())  # grown or shrunk, nothing else


def test_all_kinds_happen():
    masks, kinds = squares(), set()
    for i in range(30):
        corrupted = corrupt_history(masks, torch.full((3,), 5), 1.0, clip_generator(0, i))
        for n in range(3):
            for t in range(4):
                mine, true = corrupted[n, t], masks[n, t]
                if not mine.any():
                    kinds.add("dropped")
                elif torch.equal(mine, masks[(n - 1) % 3, t]):
                    kinds.add("swapped")
                elif (mine & true).sum() == true.sum():
                    kinds.add("dilated")
                elif (mine & true).sum() == mine.sum():
                    kinds.add("eroded or cut")
                else:
                    kinds.add("shifted")
    assert kinds == {"dropped", "swapped", "dilated", "eroded or cut", "shifted"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_lasting_errors_last_and_stay_at_their_place(dtype):
    masks = squares(num_objects=2, num_frames=6, size=128).to(dtype).roll((40, 40), dims=(-2, -1))
    masks[:, 3:] = masks[:, 3:].roll(9, dims=-1)  # both objects move to the right
    masks[1, 4] = 0  # and one is away for a frame
    before, switch_frames, kinds = masks.clone(), torch.tensor([0, 2]), set()
    for i in range(60):
        wrong = add_lasting_errors(masks, switch_frames, 1.0, clip_generator(0, i))
        assert torch.equal(masks, before) and wrong.dtype == dtype
        assert not wrong[1, 4].any()
        for n, first in enumerate([1, 2]):
            different = wrong[n] != masks[n]
            assert not different[:first].any()  # the mark, and what was before it
            there = [t for t in range(first, 6) if different[t].any()]
            if not there:
                continue
            kinds.add("hole" if masks[n, there[0]][different[there[0]]].bool().all() else "growth")
            assert there == [t for t in range(there[0], 6) if masks[n, t].any()]
            assert torch.equal(different[5], different[there[0]].roll(9 if there[0] < 3 else 0, dims=-1))
    assert kinds == {"hole", "growth"}


def test_probability_is_the_share_of_objects_with_lasting_errors():
    masks, switch_frames = squares(), torch.zeros(3, dtype=torch.long)
    assert torch.equal(add_lasting_errors(masks, switch_frames, 0.0, clip_generator(0, 0)), masks)
    wrong = [add_lasting_errors(masks, switch_frames, 0.4, clip_generator(0, i)) != masks for i in range(300)]
    # Some growths lie on the object.
    assert 0.3 < torch.stack(wrong).flatten(2).any(2).float().mean().item() < 0.4


def test_dilation_and_shift_are_those_of_scipy():
    masks = torch.rand(4, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.97
    for radius in (1, 3):
        wanted = [ndimage.binary_dilation(m, np.ones((2 * radius + 1,) * 2)) for m in masks.numpy()]
        assert np.array_equal(history._dilate(masks, radius).numpy(), np.stack(wanted))
    shifts = torch.tensor([[0, 0], [3, -2], [-5, 7], [25, 0]])
    moved = history._shift(masks, shifts)
    for mine, mask, shift in zip(moved, masks, shifts):
        wanted = ndimage.shift(mask.numpy().astype(float), shift.numpy(), order=0, cval=0.0)
        assert np.array_equal(mine.numpy(), wanted > 0.5)


def test_an_object_too_thin_to_erode_is_kept():
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[:, :, 20, 5:50] = True
    for i in range(20):
        assert corrupt_history(masks, torch.tensor([0]), 1.0, clip_generator(0, i)).any()


def test_no_objects():
    nothing = torch.zeros(0, 3, 32, 32, dtype=torch.bool)
    assert corrupt_history(nothing, torch.zeros(0, dtype=torch.long), 1.0, clip_generator(0, 0)).shape == nothing.shape


def test_sampled_history_takes_predictions_where_the_network_tracks():
    masks = squares(num_objects=2)
    switch_frames = torch.tensor([0, 2])
    logits = torch.full((5, 2, 16, 16), -9.0)
    logits[:, 0, :4, 12:], logits[:, 1, :4, 12:] = 8.0, 9.0  # the network sees both in the upper right
    foreground = torch.full((5, 2), 9.0)
    foreground[4, 1] = -9.0  # and thinks that the second one is gone in the last frame
    sampled = sample_history(masks, logits, foreground, switch_frames, 1.0, 0.5, clip_generator(0, 0))
    assert torch.equal(sampled[0, 0], masks[0, 0])  # the prompt
    assert torch.equal(sampled[1, :2], masks[1, :2])  # detected: frames 1 and 2
    for n, t in [(0, 1), (0, 4), (1, 2), (1, 3)]:
        assert sampled[n, t, :14, 50:].all() and not sampled[n, t, 18:].any() and not sampled[n, t, :, :46].any()
    assert not sampled[1, 4].any()
    untouched = sample_history(masks, logits, foreground, switch_frames, 0.0, 0.5, clip_generator(0, 0))
    assert torch.equal(untouched, masks)


def test_sampled_masks_do_not_overlap():
    masks = squares(num_objects=2)
    logits = torch.full((5, 2, 16, 16), -9.0)
    logits[:, 0, :, :10] = 2.0
    logits[:, 1, :, 6:] = 5.0
    foreground = torch.full((5, 2), 9.0)
    sampled = sample_history(masks, logits, foreground, torch.tensor([0, 0]), 1.0, 0.5, clip_generator(0, 0))
    later = sampled[:, 1:].bool()
    assert not (later[0] & later[1]).any()
    assert later[1, :, :, 26:].all() and later[0, :, :, :22].all()  # both claim columns 6 to 9; the second more
    # Of equals one has the pixel.
    sampled = sample_history(
        masks, torch.full((5, 2, 16, 16), 2.0), foreground, torch.tensor([0, 0]), 1.0, 0.5, clip_generator(0, 0)
    )
    assert (sampled[:, 1:].bool().sum(0) == 1).all()
    # Who isn't seen takes nothing from others.
    foreground = torch.tensor([[9.0, -9.0]]).expand(5, 2)
    sampled = sample_history(masks, logits, foreground, torch.tensor([0, 0]), 1.0, 0.5, clip_generator(0, 0))
    assert sampled[0, 1:, :, :36].bool().all() and not sampled[1, 1:].any()


def test_prompts_are_signals_of_each_kind():
    """Of a disc: a box holds it, clicks and scribbles lie on it, corrected masks are nearly right."""
    y, x = torch.meshgrid(torch.arange(128), torch.arange(160), indexing="ij")
    disc = ((y - 60) ** 2 + (x - 80) ** 2 < 35**2)[None]
    kinds = {"box": 0, "clicks": 0, "clicks off it": 0, "corrected": 0}
    for i in range(100):
        signal = draw_prompts(disc, disc, 1.0, clip_generator(0, i))
        assert signal.shape == disc.shape and signal.dtype == torch.bool and signal.any()
        covered = (signal & disc).sum() / disc.sum()
        precise = (signal & disc).sum() / signal.sum()
        if 0.7 < precise < 0.85 and covered > 0.9:
            kinds["box"] += 1
        elif covered < 0.35 and precise > 0.8:
            kinds["clicks"] += 1
        elif covered > 0.99 or precise > 0.99:
            kinds["corrected"] += 1
        kinds["clicks off it"] += bool(precise == 1 and (disc & ~signal).any())
    assert kinds["box"] > 20 and kinds["clicks"] > 20 and kinds["corrected"] > 8, kinds


def test_the_share_of_signals_and_what_stays_a_mask():
    masks = squares()[:, 0]
    absent = torch.zeros_like(masks)
    absent[0] = masks[0]
    history_masks = masks.float() * 0.5  # something that can be told from the true masks
    changed = 0
    for i in range(200):
        prompts = draw_prompts(masks, history_masks, 0.3, clip_generator(0, i))
        assert prompts.dtype == history_masks.dtype
        changed += (prompts != history_masks).flatten(1).any(1).sum().item()
        prompts = draw_prompts(absent, history_masks, 1.0, clip_generator(0, i))
        assert torch.equal(prompts[1:], history_masks[1:])
    assert changed / 600 == pytest.approx(0.3, abs=0.05)
    assert torch.equal(draw_prompts(masks, history_masks, 0.0, clip_generator(0, 0)), history_masks)
