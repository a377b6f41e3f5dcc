"""Whose pixels are whose: rules about mask logits alone, for the stream's bookkeeping."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

PIECE_GAP = 4  # cells of stride 4: so far apart are pieces of one object that something hides in part
SPECK_GAP = 0.1  # of the shorter side: farther from an object than this, a piece
SPECK_AREA = 0.1  # of less than this part of the largest one is none of it


def within_reach(logits: torch.Tensor, previous: torch.Tensor, radius: int, prompted: list[bool]) -> torch.Tensor:
    """
    Mask logits (n, h, w) of followed objects without what lies farther from their masks in the frame before than masks
    are propagated, `radius` cells of stride 8. So an object that was found doesn't take in what comes into view, which
    is there to be found itself. Prompted objects, and those that were away, may be anywhere.
    """
    near = F.max_pool2d(F.max_pool2d(previous.float(), 2), 2 * radius + 1, stride=1, padding=radius)
    near = F.interpolate(near[None], size=logits.shape[-2:])[0] > 0
    free = torch.tensor(prompted, device=logits.device) | ~near.flatten(1).any(1)
    return torch.where(near | free[:, None, None], logits, -logits.abs())


def twins(prompted: dict[int, bool], logits: dict[int, torch.Tensor], max_overlap: float) -> set[int]:
    """
    Ids of found objects whose mask has become that of another (by IoU): those that are `prompted`, by id, and older
    ones stay.
    """
    seen = sorted((x for x in prompted if x in logits), key=lambda x: (not prompted[x], abs(x)))
    if len(seen) < 2:
        return set()
    same = overlapping(torch.stack([logits[x] for x in seen]), max_overlap).tolist()
    staying: list[int] = []
    for i, object_id in enumerate(seen):
        if prompted[object_id] or not any(same[i][j] for j in staying):
            staying.append(i)
    return set(seen) - {seen[i] for i in staying}


def without_duplicates(
    rows: list[int], mask_logits: torch.Tensor, known: list[torch.Tensor], max_overlap: float
) -> list[int]:
    """
    The detections, best first, whose mask is not covered by followed objects and better detections. Several draw one
    object, and the surest not always best: the mask logits of each that is left become the mean of all that draw the
    same (by IoU), without what is not the mean's main piece.
    """
    if not rows:
        return []
    covered = torch.stack(known).gt(0).any(0) if known else torch.zeros_like(mask_logits[0], dtype=torch.bool)
    drawn = mask_logits[rows]

    def is_new(mask: torch.Tensor) -> bool:
        return bool((mask & covered).sum() <= max_overlap * mask.sum())

    accepted = []
    alike = None  # in most frames nothing is new
    for i, row in enumerate(rows):
        if not is_new(drawn[i] > 0):
            continue
        if alike is None:
            alike = overlapping(drawn, max_overlap)
        mask_logits[row] = main_piece(drawn[alike[i]].mean(0))
        mask = mask_logits[row] > 0
        if mask.any() and is_new(mask):
            accepted.append(row)
            covered = covered | mask
    return accepted


def overlapping(mask_logits: torch.Tensor, max_overlap: float) -> torch.Tensor:
    """Which masks (n, h, w) overlap by more than `max_overlap` (IoU), bool (n, n); each is the same as itself."""
    masks = mask_logits.flatten(1).gt(0).float()
    intersection = masks @ masks.T
    area = masks.sum(1)
    return (intersection > max_overlap * (area[:, None] + area[None, :] - intersection)).fill_diagonal_(True)


def main_piece(logits: torch.Tensor) -> torch.Tensor:
    """
    Mask logits (h, w) of a detection without what lies apart from its largest piece, by more than `PIECE_GAP` cells:
    that is another object which looks alike.
    """
    pieces = _pieces(logits > 0)
    areas = pieces.flatten().bincount(minlength=2)
    areas[0] = 0
    return torch.where(pieces == areas.argmax(), logits, -logits.abs())


def without_specks(logits: torch.Tensor, prompted: list[bool]) -> torch.Tensor:
    """
    Mask logits (n, h, w) of the objects of a frame without pieces that are small and far from the others: `SPECK_GAP`,
    `SPECK_AREA`. What was marked by hand may be in such pieces, and has them all.
    """
    if all(prompted):
        return logits
    gap = 2 * round(SPECK_GAP * min(logits.shape[-2:]) / 2)
    masks = exclusive(logits) & ~torch.tensor(prompted, device=logits.device)[:, None, None]
    specks = torch.compiler.disable(_specks) if torch.compiler.is_compiling() else _specks
    return torch.where(specks(masks.cpu(), gap).to(masks.device), -logits.abs(), logits)


def _specks(masks: torch.Tensor, gap: int) -> torch.Tensor:
    found = np.zeros(masks.shape, dtype=bool)
    for speck, mask in zip(found, masks.numpy()):
        if ndimage.label(mask)[1] > 1:  # most are in one piece
            pieces = ndimage.label(ndimage.maximum_filter(mask, gap + 1))[0] * mask
            areas = np.bincount(pieces.flat)
            areas[0] = 0
            speck |= mask & (areas < SPECK_AREA * areas.max())[pieces]
    return torch.from_numpy(found)


def marked_pieces(logits: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """
    Mask logits (h, w) of an object that was marked, bool (h, w), without pieces that have no mark, farther than
    `PIECE_GAP` cells from those that have one.
    """
    pieces = _pieces(logits > 0)
    return torch.where(torch.isin(pieces, pieces[marked].unique()), logits, -logits.abs())


def _pieces(mask: torch.Tensor) -> torch.Tensor:
    """The number, from 1 on, of the piece that each cell of a mask (h, w) belongs to; 0 where there is none."""
    near = F.max_pool2d(mask[None].float(), PIECE_GAP + 1, stride=1, padding=PIECE_GAP // 2)[0] > 0
    # torch.compile fails at NumPy's arrays in inference mode.
    label = torch.compiler.disable(_label) if torch.compiler.is_compiling() else _label
    return label(near.cpu()).to(mask.device) * mask


def _label(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ndimage.label(mask)[0])


def exclusive(logits: torch.Tensor) -> torch.Tensor:
    """Of mask logits (..., n, h, w) bool masks: a pixel belongs to the object of the highest, if that is positive."""
    if not logits.shape[-3]:
        return logits > 0
    numbers = torch.arange(logits.shape[-3], device=logits.device)[:, None, None]
    return (logits > 0) & (logits.argmax(-3, keepdim=True) == numbers)
