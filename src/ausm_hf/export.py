"""Results to files while they come: indexed PNG, overlay video, JSON with run-length masks; COCO and YouTube-VIS.

All writers are used alike, and each output appears complete or not at all ([`~ausm_hf.files.WholeOrNothing`]):

```python
with PngMaskWriter("out/masks") as masks, ObjectsJsonWriter("out/objects.json") as objects_json:
    for index, frame in enumerate(source):
        ...
        for writer in (masks, objects_json):
            writer.write(index, frame, indexed_mask, objects)
```

- `frame_index`: 0, 1, 2, ...; always growing, gaps are allowed.
- `frame`: uint8 RGB array (H, W, 3).
- `indexed_mask`: integer array (H, W) of the frame's size: 0 background, else the id of the object that has the pixel.
- `objects`: a dict `{"id": int, "label": str | None, "score": float | None}` for each object in the frame. Objects
  that are followed but not seen may be listed too.
- `time`: seconds since the first frame, for videos of variable rate; kept by the formats that know of time.
"""

import json
import math
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TextIO

import numpy as np
from pycocotools import mask as rle_tools

from .files import WholeFolder, WholeOrNothing
from .video import VideoWriter
from .visualization import draw_overlay, indexed_image, object_labels


class _ResultWriter(WholeOrNothing):
    """What the writers share: each frame is checked before anything of it is written; one frame there must be."""

    _last_index = -1

    def _check(self, frame_index: int, frame: np.ndarray, indexed_mask: np.ndarray, objects: list[dict]):
        self._check_open()
        if frame_index <= self._last_index:
            raise ValueError(f"frame_index is {frame_index}; wanted is more than the last one, {self._last_index}")
        if not np.issubdtype(indexed_mask.dtype, np.integer) or indexed_mask.shape != frame.shape[:2]:
            raise ValueError(
                f"indexed_mask is {indexed_mask.dtype} {indexed_mask.shape}; "
                f"wanted are integers of the frame's height and width, {frame.shape[:2]}"
            )
        ids = [int(item["id"]) for item in objects]
        if len(set(ids)) < len(ids) or min(ids, default=1) < 1:
            raise ValueError(f"objects have the ids {ids}; wanted are different numbers from 1")
        for item in objects:
            if item["score"] is not None and not math.isfinite(item["score"]):
                raise ValueError(f"object {item['id']} has the score {item['score']}; wanted is a number or None")
        self._last_index = int(frame_index)

    def _finish(self):
        if self._last_index < 0:
            raise ValueError(f"no frame was written to {str(self.path)!r}")
        super()._finish()


class PngMaskWriter(_ResultWriter, WholeFolder):
    """Writes one PNG of indexed masks per frame into a folder: `00000.png`, `00001.png`, ...

    The value of a pixel is the id of its object, 0 is background. Frames with ids up to 255 become 8-bit images with
    the palette of DAVIS; a frame with a larger id becomes a 16-bit grey image (no palette holds so many). Either way
    `numpy.array(PIL.Image.open(path))` gives the ids.

    Args:
        path: the folder. An existing one is replaced at the end; for safety only if it holds nothing but such PNGs.

    Raises:
        ValueError: if `path` is a file, or a folder with other things in it.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        if self.path.exists():
            for file in self.path.iterdir():
                # or of who looked at it
                if file.is_dir() or not re.fullmatch(r"\d+\.png|\..*|Thumbs\.db|desktop\.ini", file.name):
                    raise ValueError(f"folder {str(path)!r} holds {file.name!r}, so it isn't replaced by masks")

    def write(self, frame_index, frame, indexed_mask, objects, time=None) -> None:
        """Writes the masks of one frame; see the top of this module. A PNG has no time: `time` isn't kept.

        Raises:
            ValueError: for arguments that don't fit together, and for ids below 0 or above 65535.
        """
        self._check(frame_index, frame, indexed_mask, objects)
        low, high = (int(indexed_mask.min()), int(indexed_mask.max())) if indexed_mask.size else (0, 0)
        if low < 0 or high > 65535:
            raise ValueError(f"indexed_mask spans {low} to {high}; a PNG holds 0 to 65535")
        # A third larger than by default, and five times as fast.
        indexed_image(indexed_mask).save(self.partial / f"{frame_index:05d}.png", compress_level=3)


class OverlayVideoWriter(_ResultWriter, VideoWriter):
    """Writes the video with its objects drawn on it ([`~ausm_hf.visualization.draw_overlay`]).

    Args:
        path, fps, size, pixel_aspect, sound: as in [`~ausm_hf.video.VideoWriter`].
    """

    def write(self, frame_index, frame, indexed_mask, objects, time=None) -> None:
        """Draws and appends one frame; see the top of this module. `time` comes with every frame or with none.

        Raises:
            ValueError: for arguments that don't fit together, or a frame of another size.
        """
        self._check(frame_index, frame, indexed_mask, objects)
        super().write(draw_overlay(frame, indexed_mask, object_labels(objects)), time)


class JsonlWriter(_ResultWriter):
    """Writes one line of JSON per frame, flushed as it comes:

    `{"frame": 0, "time": null, "objects": [{"id": 1, "label": "dog", "score": 0.97, "segmentation": RLE or null}]}`

    RLE is COCO's compressed run-length encoding, `{"size": [height, width], "counts": str}`; `null` stands for an
    object that is followed but not seen in this frame.

    Args:
        path: the file. While it is being written it can be read under `writer.partial`.
    """

    _file: TextIO | None = None

    def _start(self):
        self._file = open(self.partial, "w", encoding="utf-8", buffering=1)

    def write(self, frame_index, frame, indexed_mask, objects, time=None) -> None:
        """Appends the line of one frame; see the top of this module.

        Raises:
            ValueError: for arguments that don't fit together, and for an id in the mask that `objects` doesn't list.
        """
        self._check(frame_index, frame, indexed_mask, objects)
        rles = _encode(indexed_mask, objects)
        line = {
            "frame": int(frame_index),
            "time": None if time is None else float(time),
            "objects": [
                {
                    "id": int(item["id"]),
                    "label": item["label"],
                    "score": None if item["score"] is None else float(item["score"]),
                    "segmentation": rles.get(item["id"]),
                }
                for item in objects
            ],
        }
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")

    def _finish(self):
        super()._finish()
        assert self._file is not None
        self._file.close()

    def _release(self):
        if self._file is not None:
            with suppress(OSError):  # what is left to be written, on a full disk
                self._file.close()


class ObjectsJsonWriter(_ResultWriter):
    """Writes all objects of a video to one JSON file, object by object. Only run-lengths are kept in memory.

        {"video": {"name": str or null, "height": int, "width": int, "fps": float or null, "num_frames": int,
                   "times": [float or null, ...] or null},
         "objects": [{"id": int, "label": str or null, "score": float or null,
                      "first_frame": int, "last_frame": int, "segmentations": {"FRAME": RLE, ...}}, ...]}

    - `objects` are in order of their ids; an object that was never seen (no pixel in any frame) is left out.
    - `score` is the mean over the frames in which the object is seen and has a score, as is usual for YouTube-VIS.
    - `label` is the one that the object got in most of the frames in which it is seen, each counted with its score.
    - `segmentations` hold the frames in which the object is seen; RLE is COCO's compressed run-length encoding,
      `{"size": [height, width], "counts": str}`, which `pycocotools.mask.decode` takes as it is.
    - `num_frames` is the last frame index plus one; `times` are seconds since the first frame, one per index, if they
      were given; `null` stands for a frame that was left out.

    Args:
        path: the file to write.
        name: the video's name.
        fps: the video's frames per second.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None, fps: float | Fraction | None = None):
        super().__init__(path)
        self.name, self.fps = name, fps

    def _start(self):
        self._size: tuple[int, ...] = ()
        self._times = array("d")
        self._tracks: dict[int, _Track] = {}

    def write(self, frame_index, frame, indexed_mask, objects, time=None) -> None:
        """Takes in the objects of one frame; see the top of this module. `time` comes with every frame or with none.

        Raises:
            ValueError: for arguments that don't fit together, for an id in the mask that `objects` doesn't list, for a
                frame of another size than the first one, and for a `time` sometimes given and sometimes not.
        """
        first = self._last_index < 0
        self._check(frame_index, frame, indexed_mask, objects)
        if not first and self._size != indexed_mask.shape:
            raise ValueError(f"frame {frame_index} has size {indexed_mask.shape}, those before it {self._size}")
        if not first and bool(self._times) != (time is not None):
            raise ValueError("time is given for some frames and not for others")
        rles = _encode(indexed_mask, objects)
        self._size = indexed_mask.shape
        if time is not None:
            self._times.extend([math.nan] * (frame_index - len(self._times)))  # frames that were left out
            self._times.append(time)
        for item in objects:
            if item["id"] in rles:
                track = self._tracks.setdefault(int(item["id"]), _Track())
                track.add(frame_index, item["label"], item["score"], rles[item["id"]]["counts"])

    def _video(self) -> dict:
        height, width = self._size
        return {
            "name": self.name,
            "height": height,
            "width": width,
            "fps": None if self.fps is None else float(self.fps),
            "num_frames": self._last_index + 1,
            "times": [None if math.isnan(time) else time for time in self._times] or None,
        }

    def _objects(self) -> Iterator[dict]:
        for object_id in sorted(self._tracks):
            yield {"id": object_id, **self._tracks[object_id].summary(self._size)}

    def _finish(self):
        super()._finish()
        with open(self.partial, "w", encoding="utf-8") as file:
            self._write_out(file)

    def _write_out(self, file: TextIO):
        file.write(f'{{"video": {json.dumps(self._video())},\n"objects": [')
        for number, entry in enumerate(self._objects()):
            file.write((",\n" if number else "\n") + json.dumps(entry))
        file.write("\n]}\n")


class CocoWriter(ObjectsJsonWriter):
    """Writes all objects of a video to one file in COCO's annotation format, see [`to_coco`]."""

    def _write_out(self, file: TextIO):
        json.dump(to_coco({"video": self._video(), "objects": list(self._objects())}), file)


class YoutubeVisWriter(ObjectsJsonWriter):
    """Writes all objects of a video to one file in YouTube-VIS's annotation format, see [`to_youtube_vis_data`]."""

    def _write_out(self, file: TextIO):
        json.dump(to_youtube_vis_data({"video": self._video(), "objects": list(self._objects())}), file)


class _Track:
    """What is kept of one object until its video ends."""

    def __init__(self):
        self.frames = array("q")
        self.counts: list[str] = []
        self.score_sum, self.num_scores = 0.0, 0
        self.votes: dict[str | None, float] = {}

    def add(self, frame_index: int, label: str | None, score: float | None, counts: str):
        self.frames.append(frame_index)
        self.counts.append(counts)
        self.votes[label] = self.votes.get(label, 0.0) + (1.0 if score is None else float(score))
        if score is not None:
            self.score_sum += float(score)
            self.num_scores += 1

    def summary(self, size: tuple[int, ...]) -> dict:
        return {
            "label": max(self.votes, key=lambda label: self.votes[label]),
            "score": self.score_sum / self.num_scores if self.num_scores else None,
            "first_frame": self.frames[0],
            "last_frame": self.frames[-1],
            "segmentations": {
                str(frame): {"size": list(size), "counts": counts} for frame, counts in zip(self.frames, self.counts)
            },
        }


def _encode(indexed_mask: np.ndarray, objects: list[dict]) -> dict[int, dict]:
    """The RLE of every object that has pixels, by id."""
    by_columns = np.asfortranarray(indexed_mask)  # the order in which COCO counts
    rles: dict[int, dict] = {}
    num_pixels = 0
    for item in objects:
        mine = by_columns == item["id"]
        area = int(np.count_nonzero(mine))
        if area:
            rle = rle_tools.encode(mine.view(np.uint8))
            rles[item["id"]] = {"size": list(indexed_mask.shape), "counts": rle["counts"].decode("ascii")}
            num_pixels += area
    if num_pixels < np.count_nonzero(indexed_mask):
        unknown = sorted(set(np.unique(indexed_mask).tolist()) - {0} - {int(item["id"]) for item in objects})
        raise ValueError(f"indexed_mask holds the ids {unknown}, which objects doesn't list")
    return rles


UNNAMED = "object"


def to_coco(objects_json: str | os.PathLike | dict, categories: dict[str, int] | None = None) -> dict:
    """Turns the file of an [`ObjectsJsonWriter`] into COCO's annotation format, one image per frame.

    Args:
        objects_json: the file's path, or its content.
        categories: category id of each label, for data sets that have their own. By default the labels that occur are
            numbered from 1 in alphabetical order. Objects without a label count as `"object"`.

    Returns:
        dict with `images`, `annotations` and `categories`. An image's id is its frame index + 1. Annotations have
        COCO's keys and also `track_id`, the object's id, and `score`, the object's (1.0 where none is known).

    Raises:
        ValueError: if `categories` lacks a label that occurs.
    """
    content, categories = _content_and_categories(objects_json, categories)
    video = content["video"]
    name = f"{video['name']}/" if video["name"] else ""
    images = [
        {"id": i + 1, "file_name": f"{name}{i:05d}.jpg", "height": video["height"], "width": video["width"]}
        for i in range(video["num_frames"])
    ]
    annotations: list[dict] = []
    for item in content["objects"]:
        for frame, rle in item["segmentations"].items():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": int(frame) + 1,
                    "category_id": categories[item["label"] or UNNAMED],
                    "track_id": item["id"],
                    "segmentation": rle,
                    "area": int(rle_tools.area(rle)),
                    "bbox": rle_tools.toBbox(rle).tolist(),
                    "iscrowd": 0,
                    "score": _score(item),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
    }


def to_youtube_vis(
    objects_json: str | os.PathLike | dict, video_id: int = 1, categories: dict[str, int] | None = None
) -> list[dict]:
    """Turns the file of an [`ObjectsJsonWriter`] into results as the YouTube-VIS and OVIS benchmarks take them.

    Args:
        objects_json: the file's path, or its content.
        video_id: the video's id in the benchmark.
        categories: as in [`to_coco`].

    Returns:
        per object `{"video_id", "category_id", "score", "segmentations"}`; `segmentations` hold one entry per frame of
        the video: an RLE, or `None` where the object isn't seen. Scores that aren't known are 1.0. Results of several
        videos are concatenated.

    Raises:
        ValueError: if `categories` lacks a label that occurs.
    """
    content, categories = _content_and_categories(objects_json, categories)
    return [
        {
            "video_id": video_id,
            "category_id": categories[item["label"] or UNNAMED],
            "score": _score(item),
            "segmentations": [item["segmentations"].get(str(i)) for i in range(content["video"]["num_frames"])],
        }
        for item in content["objects"]
    ]


def to_youtube_vis_data(objects_json: str | os.PathLike | dict, categories: dict[str, int] | None = None) -> dict:
    """Turns the file of an [`ObjectsJsonWriter`] into a data set of one video in YouTube-VIS's and OVIS's format: what
    their tools read as ground truth. (For results to be handed in, see [`to_youtube_vis`].)

    Args:
        objects_json, categories: as in [`to_coco`].

    Returns:
        dict with `videos`, `annotations` and `categories`. The video has the id 1. Annotations have YouTube-VIS's
        keys, `id` being the object's, and also `score`; `segmentations`, `bboxes` and `areas` hold one entry per
        frame, `None` where the object isn't seen.

    Raises:
        ValueError: if `categories` lacks a label that occurs.
    """
    content, categories = _content_and_categories(objects_json, categories)
    video = content["video"]
    size = {"height": video["height"], "width": video["width"]}
    length = video["num_frames"]
    name = f"{video['name']}/" if video["name"] else ""
    annotations: list[dict] = []
    for item in content["objects"]:
        rles = [item["segmentations"].get(str(i)) for i in range(length)]
        annotations.append(
            {
                "id": item["id"],
                "video_id": 1,
                "category_id": categories[item["label"] or UNNAMED],
                "segmentations": rles,
                "areas": [rle and int(rle_tools.area(rle)) for rle in rles],
                "bboxes": [rle and rle_tools.toBbox(rle).tolist() for rle in rles],
                "iscrowd": 0,
                **size,
                "length": length,
                "score": _score(item),
            }
        )
    return {
        "videos": [{"id": 1, **size, "length": length, "file_names": [f"{name}{i:05d}.jpg" for i in range(length)]}],
        "annotations": annotations,
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
    }


def to_supervision(segments):
    """Turns what was found in one frame into the `Detections` of the package `supervision`.

    Args:
        segments ([`~ausm_hf.segment.FrameSegments`]): one frame, as [`~ausm_hf.segment.segment_video`] yields them.

    Returns:
        `supervision.Detections`, in the order of `segments.objects`: `tracker_id` is the object's id, `mask` (N, H, W)
        bool, `xyxy` the mask's box in pixels, `confidence` the score, `data["class_name"]` the label (`"object"`
        where there is none), and `class_id` the object's index in the model's labels, -1 where there is none.

    Raises:
        ImportError: if the package isn't installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError("to_supervision needs the package supervision: `pip install supervision`") from error
    objects = segments.objects
    if not objects:
        return supervision.Detections.empty()
    ids = np.array([item["id"] for item in objects])
    masks = segments.masks[None] == ids[:, None, None]
    return supervision.Detections(
        xyxy=supervision.mask_to_xyxy(masks).astype(np.float32),
        mask=masks,
        confidence=np.array([item["score"] for item in objects], dtype=np.float32),
        class_id=np.array([item["label_id"] for item in objects]),
        tracker_id=ids,
        data={"class_name": np.array([item["label"] or UNNAMED for item in objects])},
    )


def _content_and_categories(objects_json, categories):
    content = objects_json
    if not isinstance(content, dict):
        content = json.loads(Path(objects_json).read_text(encoding="utf-8"))
    labels = sorted({item["label"] or UNNAMED for item in content["objects"]})
    if categories is None:
        categories = {label: number for number, label in enumerate(labels, 1)}
    missing = [label for label in labels if label not in categories]
    if missing:
        raise ValueError(f"categories lacks the labels {missing}")
    return content, categories


def _score(item: dict) -> float:
    return 1.0 if item["score"] is None else item["score"]
