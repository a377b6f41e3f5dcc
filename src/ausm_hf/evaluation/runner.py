"""The model on one video of a benchmark, as the paper runs it, and what is written of it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.clips import load_frames, load_masks
from ..export import ObjectsJsonWriter
from ..files import WholeFolder, WholeOrNothing
from ..model.modeling_ausm import AusmForUniversalSegmentation
from ..model.processing_ausm import AusmProcessor
from ..segment import FrameSegments, segment_video
from ..visualization import indexed_image

# Four overlapping views of 90% of an image: (left, top) as a fraction of what lies outside of a view.
TRAVERSAL = ((0, 0), (1, 0), (1, 1), (0, 1))
VIEW = 0.9


@dataclass(frozen=True)
class Inference:
    """
    How the model is run.

    Attributes:
        mode (`str`): `"prompted"`: each object is given in the frame where it first appears. `"unprompted"`: the model
            finds them.
        label_set (`str`, *optional*): Label set of the classes; the model's default one if not given.
        threshold (`float`, *optional*): Foreground probability above which something is an object; the model's own if
            not given.
        top_k (`int`, *optional*): How many objects of a frame are reported; all if not given.
        passes (`int`): How often a video is played: forward, backward, forward. The last prediction of each frame
            counts.
        traversal (`bool`): Play an image, four views of 90% of it, and the image again. The last prediction counts.
        seed (`int`): Of the draws of ID vectors, together with each video's name.
    """

    mode: str = "prompted"
    label_set: str | None = None
    threshold: float | None = None
    top_k: int | None = None
    passes: int = 1
    traversal: bool = False
    seed: int = 0

    def order(self, num_frames: int) -> list[int]:
        """The frame numbers in the order in which they are played. The last `num_frames` of them cover each frame."""
        if num_frames == 1:
            return [0] * (len(TRAVERSAL) + 2 if self.traversal else self.passes)
        forward = list(range(num_frames))
        turns = [forward, forward[-2::-1], forward[1:]]
        return [t for turn in turns[: self.passes] for t in turn]


def annotated_masks(row: dict) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """
    The masks that the data set has of a video, one frame at a time.

    Args:
        row: A row in the clip format, with masks as images.

    Yields:
        The number of each annotated frame, and the bool mask (H, W) of each object in it, by the data set's id.
    """
    for t in np.flatnonzero(row["annotated"]).tolist():
        stored = row["annotations"][t] if row["annotations"] else None
        stored = stored or next(obj["masks"][t] for obj in row["objects"] if obj["masks"][t] is not None)
        with Image.open(stored["path"]) as image:
            width, height = image.size
        masks, _ = load_masks(row, t, height, width)
        yield t, {object_id: mask for object_id, mask in masks.items() if mask.any()}


def first_prompts(row: dict) -> dict[int, dict[int, np.ndarray]]:
    """The mask of each object in the frame where it first appears: frame number -> object id -> bool mask (H, W)."""
    prompts, seen = {}, set()
    for t, masks in annotated_masks(row):
        new = {object_id: mask for object_id, mask in masks.items() if object_id not in seen}
        if new:
            prompts[t] = new
            seen |= set(new)
    return prompts


def has_truth(row: dict) -> bool:
    """Whether the data set has more masks of a video than prompts: a frame with objects of which none is new."""
    seen: set[int] = set()
    for _, masks in annotated_masks(row):
        if masks and set(masks) <= seen:
            return True
        seen |= set(masks)
    return len(row["annotated"]) > 1 and all(row["annotated"])


def predict_video(
    row: dict, model: AusmForUniversalSegmentation, processor: AusmProcessor, inference: Inference
) -> Iterator[tuple[int, FrameSegments]]:
    """
    Runs the model over one video.

    Args:
        row: A row in the clip format.
        model, processor: As [`~ausm_hf.segment.load_model`] returns them.
        inference: How.

    Yields:
        The number of each frame and what was found in it, in the order of the last pass. Object ids are those of the
        data set plus `id_offset(row)` for prompted objects, else those that the model gave.

    Raises:
        ValueError, OSError: if there is no object to follow, or frames or masks can't be read or don't fit together.
    """
    num_frames = len(row["frames"])
    order = inference.order(num_frames)
    # The seed hangs on the video, so that it matters to no result which process runs it, and after what.
    session = processor.init_video_session(
        foreground_threshold=inference.threshold,
        find_new_objects=inference.mode == "unprompted",
        label_set=inference.label_set,
        seed=zlib.crc32(row["video_id"].encode(), inference.seed),
    )
    first_frame: dict[int, int] = {}
    if inference.mode == "prompted":
        for t, masks in first_prompts(row).items():
            ids = [object_id + id_offset(row) for object_id in masks]
            first_frame |= dict.fromkeys(ids, t)
            size = next(iter(masks.values())).shape
            processor.add_inputs_to_inference_session(
                session, t, ids, input_masks=list(masks.values()), original_size=size
            )
        if not first_frame:
            raise ValueError("there is no object to follow: its masks are empty")
    frames = _Frames(row, order, inference.traversal)
    for result in segment_video(frames, model, processor, session=session, max_objects=inference.top_k):
        if result.index < len(order) - num_frames:
            continue
        t = order[result.index]
        # A video played backward shows objects before they appeared; they are known not to be there yet.
        early = [object_id for object_id, first in first_frame.items() if t < first]
        if early and inference.passes > 1:
            result.masks = np.where(np.isin(result.masks, early), 0, result.masks)
            result.objects = [item for item in result.objects if item["id"] not in early]
        yield t, result


def id_offset(row: dict) -> int:
    """What is added to the data set's ids while the model runs, for whom 0 is background: SA-V counts from 0."""
    return int(has_mask_folders(row))


def has_mask_folders(row: dict) -> bool:
    """Whether the row has a binary mask per object, which may overlap, in a folder each (SA-V)."""
    return any(obj["masks"] for obj in row["objects"])


class _Frames:
    """The frames of a row in the order of `order`, each decoded when its turn comes."""

    def __init__(self, row: dict, order: list[int], traversal: bool):
        self.row, self.order, self.traversal = row, order, traversal

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        for play, t in enumerate(self.order):
            frame = load_frames(self.row, [t])[0]
            if self.traversal and 0 < play < len(self.order) - 1:
                frame = _view(frame, *TRAVERSAL[play - 1])
            yield frame


def _view(frame: np.ndarray, right: int, down: int) -> np.ndarray:
    """90% of a frame, enlarged to its size; at the right edge or the left, at the lower or the upper."""
    height, width = frame.shape[:2]
    left, top = right * (1 - VIEW) * width, down * (1 - VIEW) * height
    box = (left, top, left + VIEW * width, top + VIEW * height)
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box))


class MaskFolder(WholeFolder):
    """Writes the masks of one video as indexed PNGs under the names of its frames: a folder, whole or not at all."""

    def write(self, name: str, masks: np.ndarray) -> None:
        """
        Writes the masks of one frame.

        Args:
            name: Its file's name without suffix; may have a folder before it.
            masks: Integers (H, W), 0..65535.
        """
        self._check_open()
        path = self.partial / f"{name}.png"
        if path.parent != self.partial:  # which is there, unless another process has removed it
            path.parent.mkdir(exist_ok=True)
        indexed_image(masks).save(path)

    def keep_best(self, weights: dict[int, float], number: int) -> None:
        """Leaves only the ids of the highest weights, if there are more than `number`, and numbers them from 1."""
        if len(weights) <= number and max(weights, default=0) <= number:
            return
        best = sorted(sorted(weights, key=lambda object_id: -weights[object_id])[:number])
        table = np.zeros(max(weights) + 1, dtype=np.uint8)
        table[best] = np.arange(1, len(best) + 1)
        for path in sorted(self.partial.rglob("*.png")):
            with Image.open(path) as image:
                masks = table[np.array(image)]
            self.write(path.relative_to(self.partial).with_suffix("").as_posix(), masks)


def write_masks(
    path: Path,
    row: dict,
    model: AusmForUniversalSegmentation,
    processor: AusmProcessor,
    inference: Inference,
    max_tracks: int | None = None,
) -> None:
    """
    Runs the model over one video and writes its masks: `<path>/<frame>.png`, or `<path>/<object>/<frame>.png` for data
    that comes so.

    Args:
        path: A folder to make.
        max_tracks: How many objects of a video are kept: the best ones.
    """
    with MaskFolder(path) as folder:
        weights: dict[int, float] = {}
        for t, result in predict_video(row, model, processor, inference):
            name = frame_name(row, t)
            if has_mask_folders(row):
                for obj in row["objects"]:
                    mine = result.masks == obj["id"] + id_offset(row)
                    folder.write(f"{obj['id']:03d}/{name}", mine)
            else:
                folder.write(name, result.masks)
            for item in result.objects:
                weights[item["id"]] = weights.get(item["id"], 0.0) + item["score"]
        if max_tracks is not None:
            folder.keep_best(weights, max_tracks)


def write_tracks(
    path: Path, row: dict, model: AusmForUniversalSegmentation, processor: AusmProcessor, inference: Inference
) -> None:
    """Runs the model over one video and writes its objects as an [`~ausm_hf.export.ObjectsJsonWriter`] does."""
    played: list[int] = []
    with WholeOrNothing(path) as file:
        with ObjectsJsonWriter(file.partial, row["video_id"]) as writer:
            for t, result in predict_video(row, model, processor, inference):
                writer.write(len(played), result.frame, result.masks, result.objects)
                played.append(t)
        if played != sorted(played):  # the last pass went backward
            content = json.loads(file.partial.read_bytes())
            for item in content["objects"]:
                segments = {played[int(number)]: segment for number, segment in item["segmentations"].items()}
                item["segmentations"] = {str(t): segments[t] for t in sorted(segments)}
                item["first_frame"], item["last_frame"] = min(segments), max(segments)
            file.partial.write_text(json.dumps(content) + "\n", encoding="utf-8")


def frame_name(row: dict, t: int) -> str:
    """Name of frame `t` without its suffix, which predictions share."""
    return Path(row["frames"][t]["path"]).stem
