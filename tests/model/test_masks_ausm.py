"""Rules about mask logits, on masks that one can see."""

import pytest
import torch

from ausm_hf.model.masks_ausm import PIECE_GAP, main_piece, marked_pieces, without_duplicates, without_specks


def logits_of(*columns: tuple[int, int], width: int = 24) -> torch.Tensor:
    """Logits (6, width) that are positive in these columns, first and last."""
    logits = torch.full((6, width), -2.0)
    for first, last in columns:
        logits[:, first : last + 1] = 3.0
    return logits


def test_a_detection_is_what_its_largest_piece_is():
    two = logits_of((0, 2), (12, 18))
    assert torch.equal(main_piece(two), torch.where(torch.arange(24) > 10, two, -two.abs()))
    assert torch.equal(main_piece(logits_of((4, 9))), logits_of((4, 9)))
    assert torch.equal(main_piece(logits_of()), logits_of())


def test_what_a_narrow_thing_hides_in_the_middle_is_one_piece():
    narrow = logits_of((0, 3), (4 + PIECE_GAP, 12))
    wide = logits_of((0, 3), (5 + PIECE_GAP, 14))
    assert torch.equal(main_piece(narrow), narrow)
    assert torch.equal(main_piece(wide) > 0, logits_of((5 + PIECE_GAP, 14)) > 0)


def test_a_detection_of_two_things_leaves_the_smaller_one_to_its_own():
    masks = torch.stack([logits_of((0, 8), (15, 20)), logits_of((15, 20)), logits_of((0, 8))])
    assert without_duplicates([0, 1, 2], masks, [], 0.5) == [0, 1]
    assert torch.equal(masks[0] > 0, logits_of((0, 8)) > 0)
    followed = [logits_of((0, 8))]
    masks = torch.stack([logits_of((0, 8), (15, 18)), logits_of((0, 3), (13, 20))])
    assert without_duplicates([0, 1], masks, followed, 0.5) == [1]
    assert torch.equal(masks[1] > 0, logits_of((13, 20)) > 0)


def test_of_what_is_marked_every_piece_with_a_mark_is_left():
    three = logits_of((0, 2), (4, 6), (13, 15))  # the first two are near each other
    marks = torch.zeros(6, 24, dtype=torch.bool)
    marks[2, 5] = True
    assert torch.equal(marked_pieces(three, marks) > 0, logits_of((0, 2), (4, 6)) > 0)
    marks[2, 14] = True
    assert torch.equal(marked_pieces(three, marks), three)
    assert not (marked_pieces(three, torch.zeros_like(marks)) > 0).any()
    marks[:] = False
    marks[2, 20] = True
    assert not (marked_pieces(three, marks) > 0).any()


def test_detections_that_draw_the_same_agree_on_a_mask():
    surest, second, third, other = logits_of((0, 6)), logits_of((1, 9)), logits_of((1, 8)), logits_of((14, 20))
    masks = torch.stack([surest, second, other, third])
    assert without_duplicates([0, 1, 2, 3], masks, [], 0.5) == [0, 2]
    assert torch.equal(masks[0] > 0, logits_of((1, 8)) > 0)  # what two of three say
    assert torch.equal(masks[2], other)


def test_where_any_overlap_is_allowed_there_are_no_copies():
    masks = torch.stack([logits_of((0, 6)), logits_of((0, 6)) / 2])
    assert without_duplicates([0, 1], masks, [], 1.0) == [0, 1]
    assert torch.equal(masks[1], logits_of((0, 6)) / 2)


def test_where_detections_that_draw_the_same_agree_on_nothing_the_next_is_asked():
    masks = torch.full((4, 6, 24), -9.0)
    for row, columns in enumerate((range(9), range(5), range(4, 9), (0, 1, 2, 6, 7, 8))):
        masks[row, :, list(columns)] = 0.5
    assert without_duplicates([0, 1, 2, 3], masks.clone(), [], 0.5)[0] == 1


def test_specks_far_from_an_object_are_none_of_it():
    logits = torch.full((3, 80, 120), -4.0)
    logits[:, 10:40, 10:40] = 3.0  # 900 cells
    logits[0, 60:64, 100:104] = 2.0  # 16 of them far away
    logits[1, 60:64, 40:44] = 2.0  # a row of small pieces that leads away, each near to the one before
    logits[1, 45:49, 20:24], logits[1, 53:57, 30:34] = 2.0, 2.0
    logits[2, 60:70, 100:110] = 2.0  # 100 cells are more than a tenth
    for one in logits:
        assert torch.equal(without_specks(one[None], [True])[0], one)  # whoever marked it meant it
    cleaned = torch.cat([without_specks(one[None], [False]) for one in logits])
    assert torch.equal(cleaned[1:], logits[1:])
    assert torch.equal(cleaned[0] > 0, logits[0] > 2.5) and cleaned[0, 61, 101] == -2
    nothing = torch.full((1, 80, 120), -1.0)
    assert torch.equal(without_specks(nothing, [False]), nothing)


@pytest.mark.parametrize("far", [False, True])
def test_how_far_a_speck_is(far):
    """A tenth of the shorter side are 8 cells here."""
    logits = torch.full((1, 80, 160), -4.0)
    logits[0, 10:40, 10:40] = 3.0
    logits[0, 20:24, 48 + far : 52 + far] = 2.0
    assert (without_specks(logits, [False])[0, 20:24, 48:54] > 0).any() != far


def test_specks_are_of_the_pixels_that_an_object_has():
    """What another object covers is not what the rest of it is small beside."""
    logits = torch.full((2, 80, 120), -4.0)
    logits[0, 10:40, 10:40], logits[1, 10:40, 10:40] = 1.0, 3.0
    logits[0, 60:68, 100:108] = 1.0
    assert torch.equal(without_specks(logits, [False, False]), logits)
