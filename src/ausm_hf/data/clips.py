"""The clip format: one row per video (or still), the same for every data set. Indexing reads no image.

A row says where its frames and masks are; `load_clip` decodes those that are asked for. Frames are image files or
frames of one video file. Masks come in the way the data set is published: an indexed PNG per frame (`annotations`),
run lengths per object and frame (`objects[i]["segmentations"]`), or a binary PNG per object and frame
(`objects[i]["masks"]`).

`push_to_hub` and `save_to_disk` take the files along, and what they wrote loads as it was; `to_parquet` keeps the
paths.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, Video, concatenate_datasets
from PIL import Image as PILImage
from PIL import ImageOps

from ..model.upright_ausm import upright

IGNORE_VALUE = 255  # pixel value of an indexed PNG that means "no ground truth here", unless an object has that id
ROWS_PER_CHUNK = 2000  # rows held as Python objects while indexing
ANNOTATED_EVERY = 4  # videos of SA-V run at 24 frames per second and are annotated at 6

FEATURES = Features(
    {
        "video_id": Value("string"),
        "frames": List(Image(decode=False)),  # one file per frame; decode=False keeps indexing lazy
        "video": Video(decode=False),  # or one file for all frames,
        "video_frames": List(Value("int32")),  # and which of its frames the row's frames are
        "annotations": List(Image(decode=False)),  # an indexed PNG per frame, null where a frame has none; or empty
        "annotated": List(Value("bool")),  # per frame: is there ground truth?
        # Empty for indexed PNGs whose ids nobody lists: the objects are then the ids found in the PNGs.
        "objects": List(
            {
                "id": Value("int32"),
                "label": Value("string"),
                "crowd": Value("bool"),  # a region of many objects: ignored, never an object to find
                "segmentations": List({"size": List(Value("int32")), "counts": Value("string")}),
                "masks": List(Image(decode=False)),
            }
        ),
        "annotation_file": Value("string"),  # a JSON of SA-V that `resolve_row` has yet to read
        "label_set": Value("string"),  # name of the label set the labels are from; null: no class is trained
        "exhaustive": Value("bool"),  # every object that counts is annotated
        "first_frame_given": Value("bool"),  # masks are prompts only: detection is not trained on this video
        "binary_masks": Value("bool"),  # any non-zero pixel of an annotation is the first object (DAVIS 2016)
        "own_masks": Value("bool"),  # one's own: ids need not be listed; a `mask_problem` is an error
    }
)


@dataclass
class Clip:
    """T decoded frames of one video with N objects.

    Attributes:
        frames: `(T, 3, H, W)` uint8, RGB.
        masks: `(N, T, H, W)` bool. Masks may overlap.
        ignore: `(T, H, W)` bool, pixels without ground truth.
        annotated: `(T,)` bool, frames with ground truth.
        labels: N class names, None where the class isn't known.
        label_set, exhaustive, first_frame_given, video_id: as in `FEATURES`.
    """

    frames: torch.Tensor
    masks: torch.Tensor
    ignore: torch.Tensor
    annotated: torch.Tensor
    labels: list[str | None]
    label_set: str | None = None
    exhaustive: bool = True
    first_frame_given: bool = False
    video_id: str = ""


def file(path: str | os.PathLike | None) -> dict | None:
    """A file as the `Image` and `Video` features store it: by its path, unread."""
    return None if path is None else {"path": os.fspath(path), "bytes": None}


def clip_object(
    object_id: int,
    label: str | None = None,
    crowd: bool = False,
    segmentations: Sequence[dict | None] = (),
    masks: Sequence[dict | None] = (),
) -> dict:
    """One entry of a row's `objects`."""
    return {
        "id": int(object_id),
        "label": label,
        "crowd": bool(crowd),
        "segmentations": list(segmentations),
        "masks": list(masks),
    }


def clip_row(
    video_id: str,
    frames: Sequence[dict | None],
    objects: list[dict],
    *,
    annotations: Sequence[dict | None] = (),
    annotated: list[bool] | None = None,
    video: dict | None = None,
    video_frames: Sequence[int] = (),
    annotation_file: str | None = None,
    label_set: str | None = None,
    exhaustive: bool = True,
    first_frame_given: bool = False,
    binary_masks: bool = False,
    own_masks: bool = False,
) -> dict:
    """One row of the format. `annotated` defaults to the frames that have an annotation file (run lengths: all)."""
    if annotated is None:
        annotated = [a is not None for a in annotations] if annotations else [True] * (len(frames) + len(video_frames))
    return {
        "video_id": video_id,
        "frames": frames,
        "video": video,
        "video_frames": list(video_frames),
        "annotations": list(annotations),
        "annotated": annotated,
        "objects": objects,
        "annotation_file": annotation_file,
        "label_set": label_set,
        "exhaustive": exhaustive,
        "first_frame_given": first_frame_given,
        "binary_masks": binary_masks,
        "own_masks": own_masks,
    }


def clips_from_rows(rows: Iterable[dict]) -> Dataset:
    """The rows as a `datasets.Dataset` with the features of the clip format."""
    rows, chunks = iter(rows), []
    while chunk := list(islice(rows, ROWS_PER_CHUNK)):
        chunks.append(Dataset.from_list(chunk, features=FEATURES))
    if not chunks:
        return Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    return concatenate_datasets(chunks)


def resolve_row(row: dict) -> dict:
    """A row with everything in it: reads the JSON of rows that only name it.

    `clips.map(resolve_row)` does so for a whole data set, before it goes to the Hub.
    """
    return row if row["annotation_file"] is None else _read_annotation_file(row)


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever is wrong with the content of an annotation file is a ValueError too, that names the file."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} can't be read: {error}") from error
    except KeyError as error:
        raise ValueError(f"{source} can't be read: it lacks {error}, or what it refers to isn't there") from error
    except (TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{source} can't be read: {error}") from error


def _read_annotation_file(row: dict) -> dict:
    """Fill a train row of SA-V from its JSON: which frames there are, and the run lengths of each object in them."""
    source = Path(row["annotation_file"])
    with reading(source):
        annotation = json.loads(source.read_bytes())
        size = int(annotation["video_height"]), int(annotation["video_width"])
        masklets = annotation["masklet"]  # per annotated frame, per object
        objects = [
            clip_object(object_id, segmentations=[encode_rle(frame[n], *size) for frame in masklets])
            for n, object_id in enumerate(annotation["masklet_id"])
        ]
    return row | {
        "video_frames": [ANNOTATED_EVERY * n for n in range(len(masklets))],
        "annotated": [True] * len(masklets),
        "objects": objects,
        "annotation_file": None,
    }


def load_clip(row: dict, indices: list[int]) -> Clip:
    """Decode some frames of a row, in the given order, with the masks of all its objects.

    Args:
        row: A resolved row.
        indices: Frame numbers.

    Raises:
        ValueError: A mask and its frame differ in size, or frames of one video do; a mask of one's own holds no ids.
    """
    frames = load_frames(row, indices)
    size = frames[0].shape[:2]
    layers = [load_masks(row, t, *size) for t in indices]  # per frame: {object id: mask}, ignored pixels
    for t, frame, (masks, ignore) in zip(indices, frames, layers):
        for shape in [frame.shape[:2], ignore.shape, *(mask.shape for mask in masks.values())]:
            if shape != size:
                raise ValueError(f"frame {t} of {row['video_id']}, or a mask of it, is {shape}, want {size} (H, W)")

    objects = {obj["id"]: obj["label"] for obj in row["objects"] if not obj["crowd"]}
    if not row["objects"] or row.get("own_masks"):  # rows stored by older versions don't say
        objects |= dict.fromkeys(sorted({i for masks, _ in layers for i in masks} - objects.keys()))
    stacked = np.zeros((len(objects), len(frames), *size), dtype=bool)
    for t, (found, _) in enumerate(layers):
        for n, object_id in enumerate(objects):
            if object_id in found:
                stacked[n, t] = found[object_id]
    return Clip(
        frames=torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(),
        masks=torch.from_numpy(stacked),
        ignore=torch.from_numpy(np.stack([ignore for _, ignore in layers])),
        annotated=torch.tensor([row["annotated"][t] for t in indices]),
        labels=list(objects.values()),
        label_set=row["label_set"],
        exhaustive=row["exhaustive"],
        first_frame_given=row["first_frame_given"],
        video_id=row["video_id"],
    )


def load_frames(row: dict, indices: list[int]) -> list[np.ndarray]:
    """Decode frames of a row: uint8 RGB, `(H, W, 3)` each, upright as `ausm_hf.read_video` shows them."""
    if row["video"] is not None:
        return _read_video(row["video"], [row["video_frames"][t] for t in indices])
    frames = []
    for t in indices:
        with open_image(row["frames"][t]) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{row['frames'][t]['path']} is of mode {image.mode}; want 8 bits per channel")
            frames.append(np.array(ImageOps.exif_transpose(image).convert("RGB")))
    return frames


def load_masks(row: dict, t: int, height: int, width: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Decode the masks of frame `t`.

    Returns:
        `{object id: bool (H, W)}` of the objects in this frame (none where the frame has no ground truth) and the
        ignored pixels, bool `(H, W)`: crowds, and pixels marked as unknown.
    """
    masks: dict[int, np.ndarray] = {}
    ignore = np.zeros((height, width), dtype=bool)
    if not row["annotated"][t]:
        return masks, ignore
    if row["annotations"] and row["annotations"][t] is not None:
        ids = [obj["id"] for obj in row["objects"]]
        with open_image(row["annotations"][t]) as image:
            if row.get("own_masks") and (problem := mask_problem(image, ids)):
                raise ValueError(f"{row['annotations'][t]['path']} is a mask {problem}")
            index = mask_values(image, row["annotations"][t]["path"], row["binary_masks"])
        if row["binary_masks"]:
            index = index.astype(np.uint8) * ids[0]
        elif IGNORE_VALUE not in ids:
            ignore = index == IGNORE_VALUE
            index = np.where(ignore, 0, index)
        masks = {i: index == i for i in np.flatnonzero(np.bincount(index.ravel())).tolist() if i != 0}
    for obj in row["objects"]:
        if obj["segmentations"] and obj["segmentations"][t] is not None:
            stored = tuple(obj["segmentations"][t]["size"])
            if stored != (height, width):  # before so much memory is taken
                raise ValueError(
                    f"frame {t} of {row['video_id']}, or a mask of it, is {stored}, want {(height, width)} (H, W)"
                )
            masks[obj["id"]] = decode_rle(obj["segmentations"][t])
        elif obj["masks"] and obj["masks"][t] is not None:
            with open_image(obj["masks"][t]) as image:
                masks[obj["id"]] = mask_values(image, obj["masks"][t]["path"], binary=True)

    crowds = [masks.pop(obj["id"]) for obj in row["objects"] if obj["crowd"] and obj["id"] in masks]
    if crowds:
        # An object that stands in a crowd is known; the rest of the crowd isn't.
        known = np.any(list(masks.values()), axis=0) if masks else np.zeros_like(ignore)
        ignore = ignore | (np.any(crowds, axis=0) & ~known)
    return masks, ignore


def decode_rle(segmentation: dict) -> np.ndarray:
    """COCO run lengths (`{"size": [H, W], "counts": str}`) to a bool mask `(H, W)`.

    Raises:
        ValueError: The run lengths are broken, or don't cover the mask.
    """
    from pycocotools import mask as coco_mask

    height, width = segmentation["size"]
    covered = _pixels_covered(segmentation["counts"])
    if covered != height * width:
        wrong = "are broken" if covered is None else f"cover {covered} pixels"
        raise ValueError(f"run lengths of a mask of {height} x {width} {wrong}: {segmentation['counts']!r:.50}")
    return coco_mask.decode({"size": segmentation["size"], "counts": segmentation["counts"].encode()}).astype(bool)


def _pixels_covered(counts: str) -> int | None:
    """How many pixels compressed run lengths cover; None if they are broken. pycocotools would draw anything.

    A number is in groups of 5 bits, low ones first; a sixth bit says that more follow, and the highest of the last
    group is the sign. From the fourth on, numbers are differences to the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 30:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        if value < 0:
            return None
        lengths.append(value)
        value = shift = 0
    return None if shift else sum(lengths)


def encode_rle(segmentation: dict | list | None, height: int, width: int, where: str = "") -> dict | None:
    """Any segmentation of a COCO or YouTube-VIS JSON as compressed run lengths.

    Args:
        segmentation: Run lengths (compressed or as a list of counts), a list of polygons, or None: the object is
            absent.
        where: Its place, which a message begins with.

    Raises:
        ValueError: It is none of these, or of another size.
    """
    from pycocotools import mask as coco_mask

    if not segmentation:
        return None
    height, width = (int(side) if isinstance(side, float) and side.is_integer() else side for side in (height, width))
    try:
        _check_segmentation(segmentation, height, width)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # a line has no area
        if not polygons:
            return None
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    else:
        rle = segmentation
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts if isinstance(counts, str) else counts.decode()}


def _check_segmentation(segmentation: dict | list, height: int, width: int) -> None:
    """pycocotools believes whatever it is given: wrong lengths and places far off cost memory, or the process."""
    if not all(type(side) is int and 0 < side < 2**16 for side in (height, width)):
        raise ValueError(f"a mask is {height} x {width}, want a height and a width")
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 4 or len(polygon) % 2:
                raise ValueError(f"a polygon is {polygon!r:.50}, want x and y of each of its points")
            for number in polygon:
                if type(number) not in (int, float) or not -(2**16) < number < 2**16:
                    raise ValueError(f"a polygon has a point at {number!r:.50} in a frame of {height} x {width}")
        return
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(f"a segmentation is {segmentation!r:.50}, want polygons, or run lengths (size, counts)")
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"run lengths are for a mask of {size}, want {[height, width]} (H, W)")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"run lengths are {counts!r:.50}, want numbers that sum to {height} x {width}")
    elif not isinstance(counts, str):
        raise ValueError(f"run lengths are {counts!r:.50}, want a list or a string")


def _source(stored: dict):
    """What to open: the path, or the bytes that a trip through the Hub put in its place."""
    return stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])


@contextmanager
def open_image(stored: dict) -> Iterator[PILImage.Image]:
    """The image of a frame or a mask, not decoded yet. What is wrong with it is a ValueError that names it."""
    try:
        with PILImage.open(_source(stored)) as image:
            yield image
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{stored['path']} can't be read: {error}") from error


def mask_values(image: PILImage.Image, path: str, binary: bool) -> np.ndarray:
    """The pixels of a mask: numbers of objects, integers (H, W); of a binary one whether they are the object, bool.

    Raises:
        ValueError: The pixels are colours.
    """
    values = np.array(image)  # of an indexed image the indices, not their colours
    if binary and values.ndim == 3 and image.mode.endswith("A"):
        *colours, alpha = np.moveaxis(values, -1, 0)
        return np.any(np.array(colours) != 0, axis=0) & (alpha > 0)
    if binary:
        return np.any(np.atleast_3d(values) != 0, axis=-1)
    if image.mode == "LA":
        values = np.where(values[..., 1] > 0, values[..., 0], 0)
    if values.ndim > 2:
        raise ValueError(f"{path} is a mask {mask_problem(image)}")
    return (values != 0).astype(np.uint8) if values.dtype == bool else values


def mask_problem(image: PILImage.Image, ids: Sequence[int] = ()) -> str | None:
    """What keeps the pixels of a PNG from being the numbers of objects, as the end of "a mask ...", or None.

    Args:
        ids: The objects that are listed.
    """
    index = np.array(image)
    if index.ndim > 2:
        return f"of mode {image.mode}; each pixel must be the number of its object, as in an indexed PNG"
    if index.max() > IGNORE_VALUE:
        return "with a value above 255; number objects from 1 to 254"
    if IGNORE_VALUE not in ids and index.max() == IGNORE_VALUE and not np.any((index > 0) & (index < IGNORE_VALUE)):
        return "with no value but 0 and 255; number objects from 1 to 254: 255 marks pixels of which nothing is known"
    return None


@contextmanager
def open_video(stored: dict):
    """The container of a video file and its stream of pictures. Raises ValueError if there is none to be decoded."""
    import av  # where all clips are images it may be missing

    try:
        with av.open(_source(stored)) as container:
            if not container.streams.video:
                raise ValueError(f"{stored['path']} can't be decoded: there are no pictures in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:  # PyAV before version 18 would crash
                raise ValueError(f"{stored['path']} can't be decoded: its codec is unknown")
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{stored['path']} can't be decoded: {error}") from error


def _read_video(stored: dict, wanted: list[int]) -> list[np.ndarray]:
    """Decode frames of a video file by number, in any order; they are counted as `ausm_hf.read_video` shows them."""
    found = {}
    with open_video(stored) as (container, stream):
        stream.thread_type = "NONE"  # loader workers are the parallelism
        # Times of all frames from the packets, which needs no decoding and holds for a varying frame rate too.
        # Discarded ones are hidden by an edit list: the video was cut without coding it anew.
        coded = [p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        times = sorted(coded)
        # AVI doesn't say when frames are shown. What FFmpeg guesses is wrong where they are coded in another order.
        guessed = stream.codec_context.has_b_frames and coded == times
        if max(wanted) < len(times) and not guessed:
            missing = {times[number]: number for number in wanted}
            container.seek(min(missing), stream=stream)
            for frame in container.decode(stream):
                if frame.pts in missing:
                    found[missing.pop(frame.pts)] = upright(frame)
                if not missing:
                    break
    if not found.keys() >= set(wanted):
        found = _count_frames(stored, wanted)
    return [found[number] for number in wanted]


def _count_frames(stored: dict, wanted: list[int]) -> dict[int, np.ndarray]:
    """Decode frames of a video file by number, all those before them too: slow, but right whatever times it tells."""
    import av

    found: dict[int, np.ndarray] = {}
    number = 0
    with open_video(stored) as (container, stream):
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                decoded = [None]  # it counts, though it can't be shown
            for frame in decoded:
                if frame is not None and number in wanted:
                    found[number] = upright(frame)
                number += 1
            if found.keys() >= set(wanted):
                return found
    if max(wanted) >= number:
        raise ValueError(f"frame {max(wanted)} is wanted of {stored['path']}, which has {number} frames")
    raise ValueError(f"{stored['path']}: frames {sorted(set(wanted) - found.keys())} can't be decoded")
