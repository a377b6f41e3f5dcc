"""Average precision of video instance segmentation: detections are tracks, and IoU is that of whole tracks.

As YouTube-VIS defines it (Yang, Fan and Xu, "Video Instance Segmentation", ICCV 2019, section 3.2), which is COCO's
definition with one change: the IoU of two tracks is the sum over frames of their intersections over the sum over
frames of their unions. An image is a video of one frame, so this is COCO's mask AP too, but for groups: COCO asks how
much of a detection lies within a group, where the tools for tracks ask for the IoU with it as with any other object.

The numbers are those of pycocotools, and of TrackEval with the same thresholds. (TrackEval's own lie up to 4e-16 above
0.85, 0.90 and 0.95, so that it rejects an IoU of exactly that, which pycocotools accepts.)

This file needs numpy and pycocotools only: it travels with the `evaluate` module that uses it.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as mask_utils

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
MAX_TRACKS = 100  # per video and category: the best ones, for AP

MEASURES = ("AP", "AP50", "AP75", "AR1", "AR10")


@dataclass
class _Track:
    category: int
    score: float = 1.0
    crowd: bool = False
    area: int = 0  # pixels, summed over frames


@dataclass
class _Video:
    """What is kept of a video: some numbers per track and per pair of tracks."""

    predictions: dict[Hashable, _Track] = field(default_factory=dict)
    references: dict[Hashable, _Track] = field(default_factory=dict)
    intersections: Counter = field(default_factory=Counter)  # (prediction, reference) -> pixels, summed over frames
    frames: int = 0


class VideoAP:
    """Collects videos, frame after frame, and computes their average precision. It keeps no mask."""

    def __init__(self):
        self._videos: dict[Any, _Video] = {}
        self.problems: list[str] = []

    def add(
        self,
        video: Hashable,
        predictions: Sequence[dict],
        references: Sequence[dict],
        fixed_categories: bool = False,
    ) -> None:
        """Adds the next frame of a video. What is wrong with it is noted in `problems` and reported by `result`.

        Args:
            video (`int` or `str`): Which video. Where two tracks have the same score, that of the lower video comes
                first, as in the official tools.
            predictions (`list[dict]`): The predicted objects in this frame: `id` (of the track), `category_id`,
                `score`, and `mask`: an `(H, W)` array whose non-zero pixels are the object's, a COCO RLE, or `None`
                (not in this frame). The score and category of a track are those that its last frame gave it.
            references (`list[dict]`): The true objects: `id`, `category_id`, `mask`, and where needed `iscrowd` (a
                group: what matches it is neither right nor wrong).
            fixed_categories (`bool`, *optional*, defaults to `False`): The caller knows that tracks have the same
                category in every frame; then only tracks of one category are compared, which is faster.
        """
        state = self._videos.setdefault(video, _Video())
        where = f"video {video}, frame {state.frames}"
        state.frames += 1
        problems: list[str] = []
        sizes: dict[tuple[int, int], str] = {}
        for kind, objects, tracks in (
            ("prediction", predictions, state.predictions),
            ("reference", references, state.references),
        ):
            seen = set()
            wanted = {"id", "category_id", "mask"} | ({"score"} if kind == "prediction" else set())
            for segment, covered in zip(objects, _pixels_covered([segment.get("mask") for segment in objects])):
                lacking = sorted(wanted - set(segment))
                if lacking:
                    problems.append(f"{where}: a {kind} lacks {', '.join(lacking)}")
                    continue
                name = f"{kind} {segment['id']}"
                if segment["id"] in seen:
                    problems.append(f"{where}: {name} comes twice")
                    continue
                seen.add(segment["id"])
                score = segment.get("score", 1.0)
                if isinstance(score, bool) or not isinstance(score, (int, float, np.number)) or not np.isfinite(score):
                    problems.append(f"{where}: {name} has score {score!r}, not a finite number")
                    continue
                wrong, size = _mask_size(segment["mask"], covered)
                if wrong:
                    problems.append(f"{where}: {name} {wrong}")
                elif size is not None:
                    sizes.setdefault(size, name)
                track = tracks.setdefault(segment["id"], _Track(segment["category_id"]))
                track.category, track.score = segment["category_id"], float(score)
                track.crowd = bool(segment.get("iscrowd", 0))
        if len(sizes) > 1:
            problems.append(
                f"{where}: masks differ in size: " + ", ".join(f"{n} is {h} x {w}" for (h, w), n in sizes.items())
            )
        if problems:
            self.problems += problems
            return

        predictions = [segment for segment in predictions if segment["mask"] is not None]
        references = [segment for segment in references if segment["mask"] is not None]
        pred_rles = _as_rles([segment["mask"] for segment in predictions])
        gt_rles = _as_rles([segment["mask"] for segment in references])
        pred_areas = mask_utils.area(pred_rles) if pred_rles else []
        for segment, area in zip(predictions, pred_areas):
            state.predictions[segment["id"]].area += int(area)
        for segment, area in zip(references, mask_utils.area(gt_rles) if gt_rles else []):
            state.references[segment["id"]].area += int(area)
        pred_categories = [segment["category_id"] if fixed_categories else None for segment in predictions]
        gt_categories = [segment["category_id"] if fixed_categories else None for segment in references]
        for category in set(pred_categories) & set(gt_categories):
            rows = [row for row, of_row in enumerate(pred_categories) if of_row == category]
            columns = [column for column, of_column in enumerate(gt_categories) if of_column == category]
            # IoU with a "crowd" is intersection over the prediction's area: one call gives all intersections
            crowds = [1] * len(columns)
            shares = mask_utils.iou([pred_rles[row] for row in rows], [gt_rles[column] for column in columns], crowds)
            for row, of_row in zip(rows, shares.tolist()):
                for column, share in zip(columns, of_row):
                    if share > 0:  # not of an empty mask, whose share is no number
                        pair = predictions[row]["id"], references[column]["id"]
                        state.intersections[pair] += round(share * int(pred_areas[row]))

    def result(self, categories: Sequence[int] | None = None, images: bool = False) -> dict:
        """Average precision and recall over everything added.

        Args:
            categories (`list[int]`, *optional*): Ids of all categories there are; other ids are then reported.
            images (`bool`, *optional*, defaults to `False`): The videos are images: groups match as in COCO.

        Returns:
            `dict`: `AP` (mean over IoU thresholds 0.50, 0.55 ... 0.95 and over categories), `AP50`, `AP75`, `AR1` and
            `AR10` (mean over the same of the highest recall that 1 or 10 tracks per video and category reach), all
            fractions of 1, or -1 where there is no ground truth, as pycocotools has it; and `categories`: the same
            for each category that has ground truth.

        Raises:
            ValueError: One report of everything that was wrong; or if nothing was added.
        """
        problems = list(self.problems)
        if not self._videos:
            problems.append("no frame was added")
        if categories is not None:
            known = set(categories)
            for video, state in self._videos.items():
                for kind, tracks in (("prediction", state.predictions), ("reference", state.references)):
                    for track_id, track in tracks.items():
                        if track.category not in known:
                            problems.append(f"video {video}: {kind} {track_id} has unknown category {track.category}")
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            listed = "\n".join(f"- {problem}" for problem in problems)
            raise ValueError(f"{count} with what is to be scored, so no score:\n{listed}")

        videos = [self._videos[video] for video in sorted(self._videos)]
        found = sorted({track.category for state in videos for track in state.references.values()})
        per_category = {}
        for category in found:
            measures = _category_ap([_match_video(state, category, images) for state in videos])
            if measures is not None:
                per_category[category] = measures
        rows = list(per_category.values())
        mean = {measure: float(np.mean([row[measure] for row in rows])) if rows else -1.0 for measure in MEASURES}
        return {**mean, "categories": per_category}


def _match_video(state: _Video, category: int, images: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Matches the tracks of one category in one video, best score first, each to the best track that is still free.

    Returns:
        `scores (P,)`, descending; `right (thresholds, P)` bool: matched; `ignored (thresholds, P)` bool: matched to a
        group, so neither right nor wrong; and the number of true tracks that are no groups.
    """
    predictions = [(i, track) for i, track in state.predictions.items() if track.category == category]
    predictions = sorted(predictions, key=lambda item: -item[1].score)[:MAX_TRACKS]  # stable, as in the official tools
    references = [(i, track) for i, track in state.references.items() if track.category == category]
    references.sort(key=lambda item: item[1].crowd)  # groups last

    iou = np.zeros((len(predictions), len(references)))
    for row, (pred_id, pred) in enumerate(predictions):
        for column, (gt_id, gt) in enumerate(references):
            intersection = state.intersections.get((pred_id, gt_id), 0)
            union = pred.area if gt.crowd and images else pred.area + gt.area - intersection
            iou[row, column] = intersection / union if union else 0.0

    crowd = np.array([track.crowd for _, track in references], dtype=bool)
    right = np.zeros((len(IOU_THRESHOLDS), len(predictions)), dtype=bool)
    ignored = np.zeros_like(right)
    for level, threshold in enumerate(IOU_THRESHOLDS):
        taken = np.zeros(len(references), dtype=bool)
        for row in range(len(predictions)):
            good = iou[row] >= min(threshold, 1 - 1e-10)
            free = np.flatnonzero(good & ~crowd & ~taken)
            if len(free):
                best = free[len(free) - 1 - np.argmax(iou[row, free][::-1])]  # the last of equals, as pycocotools does
                taken[best] = True
                right[level, row] = True
            else:
                ignored[level, row] = (good & crowd).any()  # a group may hold any number of tracks
    return np.array([track.score for _, track in predictions]), right, ignored, int((~crowd).sum())


def _category_ap(videos: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]) -> dict[str, float] | None:
    """Precision over recall of one category over all videos; `None` if it has no true track."""
    total = sum(count for *_, count in videos)
    if total == 0:
        return None

    def sorted_over_videos(limit: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-np.concatenate([scores[:limit] for scores, *_ in videos]), kind="stable")
        right = np.concatenate([right[:, :limit] for _, right, _, _ in videos], axis=1)[:, order]
        ignored = np.concatenate([ignored[:, :limit] for _, _, ignored, _ in videos], axis=1)[:, order]
        return right, ignored

    right, ignored = sorted_over_videos(MAX_TRACKS)
    true_positives = np.cumsum(right, axis=1).astype(float)
    false_positives = np.cumsum(~right & ~ignored, axis=1).astype(float)
    recall = true_positives / total
    precision = true_positives / (true_positives + false_positives + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best that a higher recall still has
    at_recall = np.zeros((len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS)))
    for level in range(len(IOU_THRESHOLDS)):
        index = np.searchsorted(recall[level], RECALL_THRESHOLDS, side="left")
        reached = index < recall.shape[1]
        at_recall[level, reached] = precision[level, index[reached]]
    return {
        "AP": float(at_recall.mean()),
        "AP50": float(at_recall[0].mean()),
        "AP75": float(at_recall[5].mean()),
        "AR1": float((sorted_over_videos(1)[0].sum(axis=1) / total).mean()),
        "AR10": float((sorted_over_videos(10)[0].sum(axis=1) / total).mean()),
    }


def _mask_size(mask: np.ndarray | dict | None, covered: int | None) -> tuple[str | None, tuple[int, int] | None]:
    """What is wrong with a mask, if anything, and its size. `covered`: how many pixels it has, if it is an RLE."""
    if mask is None:
        return None, None
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2:
            return f"has a mask of shape {mask.shape}, not (H, W)", None
        return None, mask.shape
    if not _is_rle(mask):
        return "has a mask that is neither an array (H, W) nor a COCO RLE (size, counts) nor None", None
    size = tuple(mask["size"])
    # pycocotools reads whatever it gets: only by its length does a broken RLE show
    if covered is None:
        return "has an RLE that is not valid", None
    if covered != size[0] * size[1]:
        return f"has an RLE of {covered} pixels for a mask of {size[0]} x {size[1]}", None
    return None, size


def _is_rle(mask: np.ndarray | dict | None) -> TypeGuard[dict]:
    return isinstance(mask, dict) and {"size", "counts"} <= set(mask) and len(mask["size"]) == 2


def _pixels_covered(masks: list[np.ndarray | dict | None]) -> list[int | None]:
    """How many pixels each mask that is an RLE covers, ones and zeros; `None` for broken RLEs and other masks."""
    covered = [sum(m["counts"]) if _is_rle(m) and isinstance(m["counts"], list) else None for m in masks]
    compressed = {n: m["counts"] for n, m in enumerate(masks) if _is_rle(m) and not isinstance(m["counts"], list)}
    counts = [c if isinstance(c, bytes) else c.encode() for c in compressed.values()]
    for n, length in zip(compressed, _rle_lengths(counts)):
        covered[n] = length
    return covered


def _rle_lengths(counts: list[bytes]) -> list[int | None]:
    """How many pixels compressed RLEs cover; `None` for those that are not valid.

    Each number of an RLE is in groups of 5 bits, low ones first; a sixth bit says that more follow, and the highest of
    the last group is the sign. From the fourth on, numbers are differences to the last but one. All RLEs are read in
    one go; if there is a broken one among them, each by itself.
    """
    if any(len(c) == 0 for c in counts):
        lengths = iter(_rle_lengths([c for c in counts if c]))
        return [next(lengths) if c else 0 for c in counts]
    if not counts:
        return []
    broken: list[int | None] = [None] if len(counts) == 1 else []
    groups = np.frombuffer(b"".join(counts), np.uint8) - np.uint8(48)
    ends = np.cumsum([len(c) for c in counts])
    if groups.max() > 63 or groups[ends - 1].max() >= 32:
        return broken or [_rle_lengths([c])[0] for c in counts]
    at = np.flatnonzero(groups < 32)  # the last group of each number
    starts = np.searchsorted(at, np.concatenate([[0], ends[:-1]]))  # the first number of each RLE
    numbers = (groups[at].astype(np.int64) ^ 16) - 16
    longer = np.arange(len(at))
    for _ in range(12):  # from there back through the groups that said that more follow
        at = at - 1  # -1 is the very last group, which said that none follows
        more = np.flatnonzero(groups[at] >= 32)
        at, longer = at[more], longer[more]
        if len(at) == 0:
            break
        numbers[longer] = numbers[longer] * 32 + (groups[at] & 31)
    for of_rle in np.split(numbers, starts[1:]):
        of_rle[1::2].cumsum(out=of_rle[1::2])
        of_rle[2::2].cumsum(out=of_rle[2::2])
    if len(at) or numbers.min() < 0:
        return broken or [_rle_lengths([c])[0] for c in counts]
    return np.add.reduceat(numbers, starts).tolist()


def _as_rles(masks: list[np.ndarray | dict]) -> list[dict]:
    rles = []
    for mask in masks:
        if isinstance(mask, np.ndarray):
            mask = mask_utils.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
        elif isinstance(mask["counts"], list):
            mask = mask_utils.frPyObjects(mask, *mask["size"])
        rles.append(mask)
    return rles
