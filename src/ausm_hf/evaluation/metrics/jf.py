"""J and F, the measures of video object segmentation, frame by frame and never a whole video at once.

J, *region similarity*, is the intersection over union of two masks. F, *boundary accuracy*, is the F-measure of their
outlines, where an outline pixel counts as found when the other outline passes within 0.8% of the image's diagonal.
Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016, section 5.

The numbers are those of the DAVIS 2017 toolkit, TrackEval and vos-benchmark. Where these differ from one another (from
which frame on does an object count?), `SequenceScorer.result` names the conventions and who uses them. Objects that
come later than the first frame count here, as in TrackEval; the DAVIS 2017 toolkit leaves them out.

This file needs numpy and scipy only: it travels with the `evaluate` modules that use it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil, hypot, isqrt
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

VOID = 255  # ground-truth pixels with this value are not scored (DAVIS)
BOUND_TH = 0.008  # how far apart two outlines may be, as a fraction of the image's diagonal (DAVIS)

MAX_PROBLEMS = 20  # that one report lists

MODES = ("prompted", "best-track", "union")
COUNT_FROM = ("start", "first_seen", "first_annotated")


def region_similarity(pred: np.ndarray, gt: np.ndarray, void: np.ndarray | None = None) -> float:
    """J: intersection over union of two masks of one object.

    Args:
        pred (`np.ndarray` of shape `(H, W)`): Predicted mask; every non-zero pixel belongs to the object.
        gt (`np.ndarray` of shape `(H, W)`): Ground-truth mask, likewise.
        void (`np.ndarray` of shape `(H, W)`, *optional*): Pixels that are not scored.

    Returns:
        `float`: In 0..1; 1 where both masks are empty.

    Raises:
        ValueError: If the shapes differ or are not two-dimensional.
    """
    pred, gt = _two_masks(pred, gt, void)
    union = np.count_nonzero(pred | gt)
    return np.count_nonzero(pred & gt) / union if union else 1.0


def boundary_accuracy(
    pred: np.ndarray, gt: np.ndarray, void: np.ndarray | None = None, bound_th: float = BOUND_TH
) -> float:
    """F: F-measure of precision and recall of the outlines of two masks of one object.

    Args:
        pred (`np.ndarray` of shape `(H, W)`): Predicted mask; every non-zero pixel belongs to the object.
        gt (`np.ndarray` of shape `(H, W)`): Ground-truth mask, likewise.
        void (`np.ndarray` of shape `(H, W)`, *optional*): Pixels that are not scored.
        bound_th (`float`, *optional*, defaults to 0.008): How far apart two outlines may be, as a fraction of the
            image's diagonal, rounded up to whole pixels; 1 or more is a number of pixels.

    Returns:
        `float`: In 0..1; 1 where neither mask has an outline, 0 where only one has.

    Raises:
        ValueError: If the shapes differ or are not two-dimensional.
    """
    pred, gt = _two_masks(pred, gt, void)
    one = np.array([1])
    return float(_boundary_accuracies(pred, gt, one, one, _radius(gt.shape, bound_th))[0, 0])


@dataclass
class ObjectScore:
    """J and F of one ground-truth object on every frame that counts for it.

    Args:
        j (`np.ndarray` of shape `(frames,)`): Region similarity, float64 in 0..1.
        f (`np.ndarray` of shape `(frames,)`): Boundary accuracy, float64 in 0..1.
        first_frame (`int`): Index in the sequence of the frame that `j[0]` and `f[0]` belong to.
        predicted_id (`int` or `None`): Id of the prediction it was compared with; `None` if it was left without one.
    """

    j: np.ndarray
    f: np.ndarray
    first_frame: int
    predicted_id: int | None


class SequenceScorer:
    """Scores one sequence, frame after frame. It keeps two numbers per object and frame, and no mask.

    Args:
        name (`str`): Name of the sequence, for messages.
        mode (`str`, *optional*, defaults to `"prompted"`): Which prediction belongs to which object.
            - `"prompted"`: the one with the same id, as where the ids were given with a prompt.
            - `"best-track"`: objects and predicted ids are paired one to one so that the sum of mean J&F is highest
              (DAVIS 2017 unsupervised; TrackEval pairs by J alone); with one object, it gets the predicted id with the
              highest J&F.
            - `"union"`: all predicted ids together, against all non-zero ground truth (DAVIS 2016 unsupervised).
        binary (`bool`, *optional*, defaults to `False`): The ground truth is black and white, as that of DAVIS 2016:
            each non-zero pixel belongs to object 1, and nothing is void. `"union"` always reads it so.
    """

    def __init__(self, name: str = "sequence", mode: str = "prompted", binary: bool = False):
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; it must be one of {', '.join(MODES)}.")
        self.name = name
        self.mode = mode
        self.binary = binary or mode == "union"
        self.problems: list[str] = []
        self._pred_ids: list[list[int]] = []  # per frame, who is there
        self._gt_ids: list[list[int]] = []
        # per frame, (predicted id, true id) -> J, F; None stands for a mask that is not there
        self._pairs: list[dict[tuple[int | None, int | None], tuple[float, float]]] = []
        self._saw_void = False

    def add(self, pred: np.ndarray, gt: np.ndarray, frame: str | None = None) -> None:
        """Adds the next frame. What is wrong with it is noted in `problems` and reported by `result`.

        Args:
            pred (`np.ndarray` of shape `(H, W)`): Predicted ids per pixel, any integer type or bool, 0 = background.
            gt (`np.ndarray` of shape `(H, W)`): True ids per pixel, likewise; 255 = void, not scored.
            frame (`str`, *optional*): Name of the frame for messages; its number if not given.
        """
        frame = frame if frame is not None else str(len(self._pairs))
        wrong = _what_is_wrong(pred, gt)
        if wrong:
            self.problems.append(f"{self.name}, frame {frame}: {wrong}")
            pred = gt = np.zeros((1, 1), np.uint8)
        if self.binary:
            gt = gt != 0
            if self.mode == "prompted" and pred.dtype == np.uint8 and np.isin(pred, (0, 255)).all():
                pred = pred != 0  # black and white likewise
        elif (gt == VOID).any():
            self._saw_void = True
            void = gt == VOID
            pred, gt = np.where(void, 0, pred), np.where(void, 0, gt)
        if self.mode == "union":
            pred = pred != 0

        pred_ids, gt_ids, pairs = _score_frame(pred, gt, same_id=self.mode != "best-track")
        self._pred_ids.append(pred_ids)
        self._gt_ids.append(gt_ids)
        self._pairs.append(pairs)

    def result(
        self, skip_first: bool = True, skip_last: bool = True, count_from: str = "start"
    ) -> dict[int, ObjectScore]:
        """Scores of every ground-truth object.

        Args:
            skip_first (`bool`, *optional*, defaults to `True`): Leave out the first frame of the sequence: it is the
                prompt (DAVIS 2016, and DAVIS 2017 semi-supervised; not DAVIS 2017 unsupervised).
            skip_last (`bool`, *optional*, defaults to `True`): Leave out the last one (DAVIS, as before).
            count_from (`str`, *optional*, defaults to `"start"`): From which of the remaining frames on an object
                counts. Frames where neither prediction nor ground truth has it score 1.
                - `"start"`: from the first (DAVIS toolkit, TrackEval).
                - `"first_seen"`: from where prediction or ground truth first has it (vos-benchmark, SA-V).
                - `"first_annotated"`: from where ground truth first has it, that frame included (YouTube-VOS).

        Returns:
            `dict[int, ObjectScore]`: By object id, ascending. Objects that ground truth has only in frames left out
            are not in it, except that under `"start"` the first frame counts as showing who there is.

        Raises:
            ValueError: One report of everything that was wrong with the frames: masks that are no masks or have
                another size, ids that ground truth does not know (`"prompted"`), nothing to score.
        """
        if count_from not in COUNT_FROM:
            raise ValueError(f"`count_from` is {count_from!r}; it must be one of {', '.join(COUNT_FROM)}.")
        scores, problems = self.result_or_problems(skip_first, skip_last, count_from)
        report_problems(problems)
        return scores

    def result_or_problems(
        self, skip_first: bool, skip_last: bool, count_from: str
    ) -> tuple[dict[int, ObjectScore], list[str]]:
        """As `result`, but hands the problems back, so that those of several sequences make one report."""
        problems = list(self.problems)
        total = len(self._pairs)
        frames = range(int(skip_first), total - int(skip_last))
        if len(frames) == 0:
            left_out = " and ".join(n for n, skip in (("the first", skip_first), ("the last", skip_last)) if skip)
            without = f" without {left_out}" if left_out else ""
            problems.append(f"{self.name}: no frame to score; it has {total} frames{without}")

        known = {g for ids in self._gt_ids for g in ids}
        if self.mode == "prompted":
            for unknown in sorted({p for ids in self._pred_ids for p in ids} - known):
                first = next(t for t, ids in enumerate(self._pred_ids) if unknown in ids)
                problems.append(f"{self.name}: predicted id {unknown} (first in frame {first}) is not in ground truth")
        showing = [*frames, 0] if count_from == "start" and total else frames
        objects = sorted({g for t in showing for g in self._gt_ids[t]})
        if not known and len(frames):
            hint = "; all there is is void (255): is it black and white, as DAVIS 2016? (`binary`)"
            problems.append(f"{self.name}: ground truth has no object{hint if self._saw_void else ''}")
        if problems:
            return {}, problems

        if self.mode == "best-track":
            predicted = self._best_tracks(objects, frames)
        else:
            seen = {p for t in frames for p in self._pred_ids[t]}
            predicted = {g: g if g in seen else None for g in objects}
        scores = {}
        for g in objects:
            p = predicted[g]
            start = frames.start
            if count_from != "start":
                start = next(
                    t
                    for t in frames
                    if g in self._gt_ids[t] or (count_from == "first_seen" and p in self._pred_ids[t])
                )
            j, f = np.array([self._pair(t, p, g) for t in range(start, frames.stop)]).T
            scores[g] = ObjectScore(j=j, f=f, first_frame=start, predicted_id=p)
        return scores, []

    def _pair(self, t: int, p: int | None, g: int) -> tuple[float, float]:
        """J and F of prediction `p` and object `g` in frame `t`, either of which may be absent there."""
        here = p if p in self._pred_ids[t] else None, g if g in self._gt_ids[t] else None
        return (1.0, 1.0) if here == (None, None) else self._pairs[t].get(here, (0.0, 0.0))

    def _best_tracks(self, objects: list[int], frames: range) -> dict[int, int | None]:
        """One-to-one pairing of objects and predicted ids with the highest sum of mean J&F over `frames`."""
        tracks: list[int | None] = [*sorted({p for t in frames for p in self._pred_ids[t]})]
        # an object may also be left without a prediction, which is worth 1 in each frame where it is absent
        tracks += [None] * (len(objects) - len(tracks))
        mean_jf = np.array([[np.mean([self._pair(t, p, g) for t in frames]) for g in objects] for p in tracks])
        rows, columns = linear_sum_assignment(-mean_jf)
        return {objects[column]: tracks[row] for row, column in zip(rows, columns)}


class DataSetScorer:
    """Scores sequences whose frames come in any order of the sequences, each by its own [`SequenceScorer`].

    Args:
        mode (`str`): See [`SequenceScorer`].
    """

    def __init__(self, mode: str):
        self.mode = mode
        self._sequences: dict[str, SequenceScorer] = {}

    def add(self, sequence: str, pred: np.ndarray, gt: np.ndarray) -> None:
        """Adds the next frame of a sequence: see [`SequenceScorer.add`]."""
        if sequence not in self._sequences:
            self._sequences[sequence] = SequenceScorer(sequence, self.mode)
        self._sequences[sequence].add(np.asarray(pred), np.asarray(gt))

    def result(self, skip_first: bool, skip_last: bool, count_from: str) -> dict[str, dict[int, ObjectScore]]:
        """Scores by sequence and object: see [`SequenceScorer.result`]. Raises one report over all sequences."""
        scores, problems = {}, []
        for name, scorer in self._sequences.items():
            scores[name], of_sequence = scorer.result_or_problems(skip_first, skip_last, count_from)
            problems += of_sequence
        report_problems(problems)
        return scores


def score_sequence(
    pred_masks: Iterable[np.ndarray],
    gt_masks: Iterable[np.ndarray],
    skip_first: bool = True,
    skip_last: bool = True,
    mode: str = "prompted",
    count_from: str = "start",
    binary: bool = False,
    name: str = "sequence",
) -> dict[int, ObjectScore]:
    """Scores one sequence, given as two iterables of masks that are read one frame at a time.

    Args:
        pred_masks (iterable of `np.ndarray` of shape `(H, W)`): Predicted ids per pixel, 0 = background.
        gt_masks (iterable of `np.ndarray` of shape `(H, W)`): True ids per pixel, 0 = background, 255 = void.
        skip_first, skip_last, count_from: See [`SequenceScorer.result`].
        mode, binary, name: See [`SequenceScorer`].

    Returns:
        `dict[int, ObjectScore]`: Per object id, J and F of each frame that counts.

    Raises:
        ValueError: One report of everything that is wrong, a different number of frames included.
    """
    scorer = SequenceScorer(name, mode, binary)
    missing: Any = object()
    pred_count = gt_count = 0
    for pred, gt in zip_longest(pred_masks, gt_masks, fillvalue=missing):
        pred_count += pred is not missing
        gt_count += gt is not missing
        if pred is not missing and gt is not missing:
            scorer.add(pred, gt)
    if pred_count != gt_count:
        scorer.problems.append(f"{name}: {pred_count} predicted frames, {gt_count} frames of ground truth")
    return scorer.result(skip_first, skip_last, count_from)


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of the per-frame values of one object (DAVIS 2016, section 5.2).

    Recall is the fraction of frames above 0.5. Decay is the mean of the first quarter of the frames less that of the
    last. (The DAVIS toolkit counts quarters in 8 bits, which goes wrong above 256 frames; this does not.)

    Args:
        values (`np.ndarray` of shape `(frames,)`): J or F per frame.

    Returns:
        `tuple[float, float, float]`: Mean, recall, decay.
    """
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[: ends[1] + 1], values[ends[3] : ends[4] + 1]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


MEASURES = ("J&F", "J", "J_recall", "J_decay", "F", "F_recall", "F_decay")


def summarize(scores: dict[str, dict[int, ObjectScore]]) -> dict:
    """Means per object, per sequence and over the data set, as DAVIS takes them: every object weighs the same.

    Args:
        scores (`dict[str, dict[int, ObjectScore]]`): What `score_sequence` returned for each sequence.

    Returns:
        `dict`: `J&F`, `J`, `J_recall`, `J_decay`, `F`, `F_recall`, `F_decay`, fractions of 1, over all objects; and
        `sequences`: for each sequence the same and `objects`: for each object id the same and `frames` (how many
        counted) and `predicted_id`.

    Raises:
        ValueError: If there is no object to take a mean over.
    """
    sequences: dict[str, dict] = {}
    everyone: list[dict] = []
    for name, of_sequence in scores.items():
        objects = {}
        for object_id, score in of_sequence.items():
            row = dict(zip(MEASURES[1:], (*statistics(score.j), *statistics(score.f))))
            objects[object_id] = {
                "J&F": (row["J"] + row["F"]) / 2,
                **row,
                "frames": len(score.j),
                "predicted_id": score.predicted_id,
            }
        if objects:
            sequences[name] = {**mean_of(list(objects.values())), "objects": objects}
            everyone.extend(objects.values())
    if not everyone:
        raise ValueError("`scores` has no object: there is nothing to take a mean over.")
    return {**mean_of(everyone), "sequences": sequences}


def mean_of(rows: list[dict]) -> dict[str, float]:
    """Mean of each measure over objects."""
    return {measure: float(np.mean([row[measure] for row in rows])) for measure in MEASURES}


def seen_and_unseen(summary: dict, seen: dict[str, dict[int, bool]]) -> dict[str, float | None]:
    """G of YouTube-VOS: the mean of J and F over objects of seen and over those of unseen categories.

    Args:
        summary (`dict`): As [`summarize`] makes it.
        seen (`dict[str, dict[int, bool]]`): Sequence -> object -> is its category in the training set? Objects may be
            strings, as in JSON.

    Returns:
        `dict`: `G`, `J_seen`, `F_seen`, `J_unseen`, `F_unseen`: fractions of 1. Where there is no object of a kind,
        its J and F are `None` and G is the mean of the others.

    Raises:
        ValueError: If `seen` lacks objects; all are named.
    """
    rows: dict[str, list[dict]] = {"seen": [], "unseen": []}
    problems = []
    for name, of_sequence in summary["sequences"].items():
        known_here = {int(object_id): is_seen for object_id, is_seen in seen.get(name, {}).items()}
        for object_id, row in of_sequence["objects"].items():
            if object_id in known_here:
                rows["seen" if known_here[object_id] else "unseen"].append(row)
            else:
                problems.append(f"{name}: `seen` does not say whether object {object_id} is of a seen category")
    report_problems(problems)
    parts = {
        f"{measure}_{kind}": mean_of(of_kind)[measure] if of_kind else None
        for kind, of_kind in rows.items()
        for measure in ("J", "F")
    }
    known = [value for value in parts.values() if value is not None]
    return {"G": sum(known) / len(known), **parts}


def report_problems(problems: list[str]) -> None:
    """Raises one `ValueError` that lists all problems, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = [f"- {problem}" for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            listed.append(f"- and {len(problems) - MAX_PROBLEMS} more")
        raise ValueError(f"{count} with what is to be scored, so no score:\n" + "\n".join(listed))


# ---------------------------------------------------------------------------------------------------------------------
# One frame. All objects are treated at once: as bits of one image, eight at a time.
# ---------------------------------------------------------------------------------------------------------------------


def _score_frame(
    pred: np.ndarray, gt: np.ndarray, same_id: bool
) -> tuple[list[int], list[int], dict[tuple[int | None, int | None], tuple[float, float]]]:
    """Predicted ids, true ids, and J and F of each pair of them, or of those with the same id only.

    A pair with None stands for an object that only one of the two masks has. It scores 0 and is left out, unless it
    fills the image: then it has no outline that could be missed, and its F is 1.
    """
    size, radius = gt.size, _radius(gt.shape, BOUND_TH)
    # Nothing lies outside the box of all objects. An outline lies on pixels whose right or lower neighbour differs, so
    # one pixel of margin holds all of it.
    box = _box_of_either(pred, gt)
    pred_names, pred = _small_numbers(pred[box])
    gt_names, gt = _small_numbers(gt[box])

    numbers = pred.astype(np.intp) * len(gt_names) + gt
    counts = np.bincount(numbers.ravel(), minlength=len(pred_names) * len(gt_names))
    counts = counts.reshape(len(pred_names), len(gt_names))
    pred_areas, gt_areas = counts.sum(1), counts.sum(0)
    pred_numbers, gt_numbers = np.flatnonzero(pred_areas[1:]) + 1, np.flatnonzero(gt_areas[1:]) + 1
    pred_ids, gt_ids = pred_names[pred_numbers].tolist(), gt_names[gt_numbers].tolist()
    pairs: dict[tuple[int | None, int | None], tuple[float, float]]
    pairs = {(p, None): (0.0, 1.0) for p, number in zip(pred_ids, pred_numbers) if pred_areas[number] == size}
    pairs |= {(None, g): (0.0, 1.0) for g, number in zip(gt_ids, gt_numbers) if gt_areas[number] == size}

    if same_id:
        rows = [row for row, p in enumerate(pred_ids) if p in gt_ids]
        columns = [gt_ids.index(pred_ids[row]) for row in rows]
        # both in the same order, so that of their pairs only those on the diagonal are wanted
        pred_numbers, gt_numbers = pred_numbers[rows], gt_numbers[columns]
        wanted = [(i, i, pred_ids[row], pred_ids[row]) for i, row in enumerate(rows)]
    else:
        wanted = [(row, column, p, g) for row, p in enumerate(pred_ids) for column, g in enumerate(gt_ids)]
    if wanted:
        f = _boundary_accuracies(pred, gt, pred_numbers, gt_numbers, radius, diagonal=same_id)
        common = counts[np.ix_(pred_numbers, gt_numbers)]
        j = common / (pred_areas[pred_numbers][:, None] + gt_areas[gt_numbers] - common)
        pairs |= {(p, g): (float(j[row, column]), float(f[row, column])) for row, column, p, g in wanted}
    return pred_ids, gt_ids, pairs


def _box_of_either(pred: np.ndarray, gt: np.ndarray) -> tuple[slice, slice]:
    """The smallest box that holds all non-zero pixels of both masks, and one pixel more on each side."""
    rows = np.flatnonzero(pred.any(axis=1) | gt.any(axis=1))
    columns = np.flatnonzero(pred.any(axis=0) | gt.any(axis=0))
    if len(rows) == 0:
        return slice(0, 1), slice(0, 1)
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _small_numbers(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask with its ids numbered from 1 (not all of which need occur), and the id of each number; 0 stays 0."""
    if mask.dtype == bool:
        return np.arange(2), (mask != 0).view(np.uint8)  # Pillow hands out bools that are 255 inside
    highest = int(mask.max())
    if highest < 256:
        return np.arange(highest + 1), mask.astype(np.uint8, copy=False)
    names, numbers = np.unique(np.append(mask, 0), return_inverse=True)  # with a 0, so that it is number 0
    return names, numbers[:-1].reshape(mask.shape)


def _boundary_accuracies(
    pred: np.ndarray,
    gt: np.ndarray,
    pred_numbers: np.ndarray,
    gt_numbers: np.ndarray,
    radius: int,
    diagonal: bool = False,
) -> np.ndarray:
    """F of each of some objects of `pred` with each of some objects of `gt`.

    Returns:
        `np.ndarray` of shape `(len(pred_numbers), len(gt_numbers))`; with `diagonal`, only the diagonal is sure to be
        filled.
    """
    f = np.zeros((len(pred_numbers), len(gt_numbers)))
    pred_groups = [_Outlines(pred, pred_numbers[i : i + 8], radius) for i in range(0, len(pred_numbers), 8)]
    gt_groups = [_Outlines(gt, gt_numbers[i : i + 8], radius) for i in range(0, len(gt_numbers), 8)]
    for row, pred_group in enumerate(pred_groups):
        for column, gt_group in enumerate(gt_groups):
            if diagonal and row != column:
                continue
            pred_length, precise = pred_group.count_near(gt_group)
            gt_length, recalled = gt_group.count_near(pred_group)
            with np.errstate(invalid="ignore"):
                precision, recall = precise / pred_length[:, None], recalled.T / gt_length
                block = np.nan_to_num(2 * precision * recall / (precision + recall))
            pred_none, gt_none = (pred_length == 0)[:, None], gt_length == 0
            block[pred_none | gt_none] = 0.0
            block[pred_none & gt_none] = 1.0
            f[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = block
    return f


class _Outlines:
    """Outlines of up to eight objects, and what is near to them: images in which each object has a bit.

    Args:
        image (`np.ndarray` of shape `(H, W)`): Objects by number.
        numbers (`np.ndarray` of shape `(n,)`): Those that get bits 0, 1, ...; n is 8 at most.
        radius (`int`): How far from an outline is near, in pixels.
    """

    def __init__(self, image: np.ndarray, numbers: np.ndarray, radius: int):
        self.bits_used = len(numbers)
        bits = np.zeros(image.shape, np.uint8)
        for bit, number in enumerate(numbers):
            bits |= (image == number).view(np.uint8) << np.uint8(bit)
        # An outline lies on the pixels that differ from their right, lower or lower right neighbour.
        outline = np.zeros_like(bits)
        corner = bits[:-1, :-1]
        outline[:-1, :-1] = (corner ^ bits[:-1, 1:]) | (corner ^ bits[1:, :-1]) | (corner ^ bits[1:, 1:])
        # The last row and column of the image have fewer neighbours. (Where the box ends before, they are empty.)
        outline[-1, :-1] = bits[-1, :-1] ^ bits[-1, 1:]
        outline[:-1, -1] = bits[:-1, -1] ^ bits[1:, -1]
        self.near = _dilate(outline, radius)
        self.at = np.flatnonzero(outline != 0)
        self.outline = outline.ravel()[self.at]

    def count_near(self, other: "_Outlines") -> tuple[np.ndarray, np.ndarray]:
        """How many pixels each outline has, `(n,)`; and how many of them are near to each of `other`, `(n, m)`."""
        mine, theirs = 1 << self.bits_used, 1 << other.bits_used
        pairs = self.outline.astype(np.intp) * theirs + other.near.ravel()[self.at]
        histogram = np.bincount(pairs, minlength=mine * theirs).reshape(mine, theirs)
        own_bits, other_bits = _BITS[:mine, : self.bits_used], _BITS[:theirs, : other.bits_used]
        return histogram.sum(1) @ own_bits, own_bits.T @ (histogram @ other_bits)


_BITS = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(float)  # the bits of each byte


def _dilate(bits: np.ndarray, radius: int) -> np.ndarray:
    """Sets each bit within `radius` (a closed disk) of where it is set. uint8, shape of `bits`."""
    # a disk is a stack of row segments, the longer the nearer to the middle
    spread, half = bits.copy(), 0  # bits spread by `half` pixels to the left and right
    out = np.zeros_like(bits)
    for down in range(radius, -1, -1):
        while half < isqrt(radius * radius - down * down):
            # no further than leaves no gap, at the image's border too, where one side was cut off
            step = min(isqrt(radius * radius - down * down) - half, half + 1)
            wider = spread.copy()
            wider[:, step:] |= spread[:, :-step]
            wider[:, :-step] |= spread[:, step:]
            spread, half = wider, half + step
        out[down:] |= spread[: max(len(bits) - down, 0)]
        out[: max(len(bits) - down, 0)] |= spread[down:]
    return out


def _radius(shape: tuple[int, int], bound_th: float) -> int:
    return ceil(bound_th if bound_th >= 1 else bound_th * hypot(*shape))


def _what_is_wrong(pred: np.ndarray, gt: np.ndarray) -> str | None:
    for name, mask in (("the prediction", pred), ("ground truth", gt)):
        if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "biu":
            what = f"{mask.dtype} of shape {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            return f"{name} is {what}, not an integer mask (H, W)"
        if mask.dtype.kind == "i" and mask.size and mask.min() < 0:
            return f"{name} has negative ids"
    if pred.shape != gt.shape:
        return f"the prediction is {pred.shape[0]} x {pred.shape[1]}, ground truth {gt.shape[0]} x {gt.shape[1]}"
    if gt.size == 0:
        return "the masks have no pixels"
    return None


def _two_masks(pred: np.ndarray, gt: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    wrong = _what_is_wrong(pred, gt)
    if wrong is None and void is not None and void.shape != gt.shape:
        wrong = f"`void` has shape {void.shape}, ground truth {gt.shape}"
    if wrong:
        raise ValueError(f"{wrong[0].upper()}{wrong[1:]}.")
    pred, gt = pred != 0, gt != 0
    return (pred, gt) if void is None else (pred & (void == 0), gt & (void == 0))
