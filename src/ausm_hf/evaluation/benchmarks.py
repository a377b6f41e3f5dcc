"""The benchmarks of the field: what each consists of on disk, and what is agreed upon for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags

from ..data.check import check_clips
from ..data.clips import clip_row, file, open_image, reading
from ..data.davis import davis
from ..data.mask_folders import folder_row, need
from ..data.mose import mose
from ..data.sa_v import sa_v
from ..data.vis_json import category_names
from ..data.youtube_vis import youtube_vis_files
from ..data.youtube_vos import youtube_vos


@dataclass
class Benchmark:
    """
    A split of a data set, and how it is run and scored.

    Attributes:
        name, split, mode (`str`): As they were asked for.
        rows (`list[dict]`): The videos, in the clip format. `video_id` names what is written.
        annotations (`dict`, *optional*): For those that ask for tracks with classes: the JSON of YouTube-VIS, without
            `annotations` where they aren't published. `None` for those that ask for masks.
        label_set (`str`, *optional*): Label set of the classes.
        seen (`dict[str, dict[int, bool]]`, *optional*): Of YouTube-VOS, video -> object -> is its category one of the
            training set's? `None` if there is no training set to tell.
    """

    name: str
    split: str
    mode: str
    rows: list[dict]
    annotations: dict | None = None
    label_set: str | None = None
    seen: dict[str, dict[int, bool]] | None = None

    def place(self, output: Path, row: dict) -> Path:
        """Where the predictions for a video go. They appear there complete."""
        if self.annotations is None:
            return output / "masks" / row["video_id"]
        return output / "tracks" / f"{row['video_id']}.json"


@dataclass(frozen=True)
class Protocol:
    """
    What is agreed upon for a benchmark.

    Attributes:
        modes: Which modes it has; the first one is the default.
        index: `(root, split, mode)` -> rows, or rows and annotations.
        splits: What the data set calls the splits of others.
        label_set: See [`Benchmark`].
        top_k: How many objects per frame are reported: the paper's numbers.
        max_tracks: How many objects per video may be reported, without prompts.
        scorers: For masks: mode -> name of a measure -> how [`~ausm_hf.evaluation.metrics.jf.SequenceScorer`] is made
            and asked.
    """

    modes: tuple[str, ...]
    index: Callable[[str, str, str], Iterable[dict] | tuple[Iterable[dict], dict]]
    splits: dict[str, str] = field(default_factory=dict)
    label_set: str | None = None
    top_k: int | None = None
    max_tracks: int | None = None
    scorers: dict[str, dict[str, dict]] = field(default_factory=dict)


def _davis_2016(root: str, split: str, mode: str) -> Iterable[dict]:
    need(Path(root) / "Annotations", "masks of DAVIS 2016")
    return davis(root, 2016, split)


def _davis_2017(root: str, split: str, mode: str) -> Iterable[dict]:
    if mode == "prompted":
        return davis(root, 2017, split)
    masks = Path(root) / "Annotations_unsupervised"  # those for prompts are of other objects
    listing = Path(root) / "ImageSets" / "2019" / f"{split}.txt"
    if listing.is_file():  # a test set of the unsupervised challenge: without masks
        frames = Path(root) / "JPEGImages"
        return [
            folder_row(n, frames / "480p" / n, masks / "480p" / n) for n in listing.read_text(encoding="utf-8").split()
        ]
    if not split.startswith("test"):
        need(masks, "masks of DAVIS 2017, unprompted")
    return davis(root, 2017, split, annotations=masks.name)


def _sa_v(root: str, split: str, mode: str) -> Iterable[dict]:
    if split == "train":
        raise ValueError("split is 'train'; wanted is one of SA-V that is scored, 'val' or 'test'")
    return sa_v(root, split)


def _youtube_vis(year: int) -> Callable:
    def index(root: str, split: str, mode: str) -> tuple[Iterable[dict], dict]:
        return _video_instances(*youtube_vis_files(root, split), f"youtube_vis_{year}")

    return index


def _ovis(root: str, split: str, mode: str) -> tuple[Iterable[dict], dict]:
    annotations = need(Path(root) / f"annotations_{split}.json", f"split {split!r} of OVIS")
    return _video_instances(Path(root) / split, annotations, "ovis")


def _video_instances(images: Path, source: Path, label_set: str) -> tuple[Iterable[dict], dict]:
    """Rows of the videos of a YouTube-VIS JSON, and its content."""
    with reading(source):
        content = json.loads(source.read_bytes())
        category_names(content["categories"], label_set, source)
        rows = [
            clip_row(str(video["id"]), [file(images / name) for name in video["file_names"]], [])
            for video in content["videos"]
        ]
    return rows, content


def _coco(root: str, split: str, mode: str) -> tuple[Iterable[dict], dict]:
    """Images as videos of one frame; all images of the JSON, those without objects too."""
    folder = Path(root) / "annotations"
    source = folder / f"image_info_{split}.json"  # of test sets
    if not source.is_file():
        source = need(folder / f"instances_{split}.json", f"split {split!r} of COCO")
    images = Path(root) / split.replace("test-dev", "test")
    with reading(source):
        content = json.loads(source.read_bytes())
        category_names(content["categories"], "coco", source)
        rows = [clip_row(str(image["id"]), [file(images / image["file_name"])], []) for image in content["images"]]
        annotations = {
            "videos": [
                {"id": image["id"], "height": image["height"], "width": image["width"], "length": 1}
                for image in content["images"]
            ],
            "categories": content["categories"],
            "annotations": [
                {
                    "id": item["id"],
                    "video_id": item["image_id"],
                    "category_id": item["category_id"],
                    "iscrowd": item.get("iscrowd", 0),
                    "segmentations": [item["segmentation"]],
                }
                for item in content.get("annotations", [])
            ],
        }
    return rows, annotations


_SKIP_ENDS = {"skip_first": True, "skip_last": True, "count_from": "start"}
_ALL_FRAMES = {"skip_first": False, "skip_last": False, "count_from": "start"}
_YOUTUBE_VOS = Protocol(
    modes=("prompted",),
    index=lambda root, split, mode: youtube_vos(root, split),
    splits={"val": "valid"},
    scorers={"prompted": {"J&F": {**_ALL_FRAMES, "mode": "prompted", "count_from": "first_annotated"}}},
)
PROTOCOLS = {
    "davis2016": Protocol(
        modes=("prompted", "unprompted"),
        index=_davis_2016,
        scorers={
            "prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted", "binary": True}},
            # What is found may be one object or a group that together make the one of DAVIS 2016.
            "unprompted": {
                "best track": {**_SKIP_ENDS, "mode": "best-track", "binary": True},
                "union": {**_SKIP_ENDS, "mode": "union", "binary": True},
            },
        },
    ),
    "davis2017": Protocol(
        modes=("prompted", "unprompted"),
        index=_davis_2017,
        max_tracks=20,  # more are refused by the official tool
        scorers={
            "prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted"}},
            "unprompted": {"best track": {**_ALL_FRAMES, "mode": "best-track"}},
        },
    ),
    "youtube_vos_2018": _YOUTUBE_VOS,
    "youtube_vos_2019": _YOUTUBE_VOS,
    "mose": Protocol(
        modes=("prompted",),
        index=lambda root, split, mode: mose(root, split),
        splits={"val": "valid"},
        scorers={"prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted", "count_from": "first_seen"}}},
    ),
    "sa_v": Protocol(
        modes=("prompted",),
        index=_sa_v,
        scorers={"prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted", "count_from": "first_seen", "binary": True}}},
    ),
    "youtube_vis_2019": Protocol(
        ("unprompted",), _youtube_vis(2019), {"val": "valid"}, label_set="youtube_vis_2019", top_k=10
    ),
    "youtube_vis_2021": Protocol(
        ("unprompted",), _youtube_vis(2021), {"val": "valid"}, label_set="youtube_vis_2021", top_k=10
    ),
    "ovis": Protocol(("unprompted",), _ovis, {"val": "valid"}, label_set="ovis", top_k=20),
    "coco": Protocol(("unprompted",), _coco, {"val": "val2017", "train": "train2017"}, label_set="coco", top_k=100),
}


def load_benchmark(name: str, root: str | os.PathLike, split: str = "val", mode: str | None = None) -> Benchmark:
    """
    Finds the videos of a benchmark and checks that all of their files are there.

    Args:
        name: One of `PROTOCOLS`.
        root: Folder of the data set in its official layout, see [`ausm_hf.data`].
        split: `"val"` is also what others call `"valid"` or `"val2017"`.
        mode: `"prompted"` or `"unprompted"`; the benchmark's usual one by default.

    Returns:
        [`Benchmark`]

    Raises:
        ValueError: if there is no such benchmark, mode or split; one report of all files that are missing or empty.
    """

    if name not in PROTOCOLS:
        raise ValueError(f"benchmark is {name!r}; wanted is one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    mode = protocol.modes[0] if mode is None else mode
    if mode not in protocol.modes:
        raise ValueError(f"mode is {mode!r}; for {name} wanted is {' or '.join(protocol.modes)}")
    indexed = protocol.index(str(root), protocol.splits.get(split, split), mode)
    rows, annotations = indexed if isinstance(indexed, tuple) else (indexed, None)
    rows = list(rows)
    if not rows:
        raise ValueError(f"split {split!r} of {name} has no videos in {root}")
    # What is to be found needs no masks.
    checked = rows if mode == "prompted" else [row | {"annotated": [True] * len(row["frames"])} for row in rows]
    check_clips(checked, name=f"{name} {split}")
    if annotations is not None:
        _check_sizes(rows, annotations["videos"])
    seen = _seen_objects(rows, Path(root)) if protocol is _YOUTUBE_VOS else None
    return Benchmark(name, split, mode, rows, annotations, protocol.label_set, seen)


def _check_sizes(rows: list[dict], videos: list[dict]):
    """Raises ValueError if frames aren't of the size that masks are scored in: a resized copy of the data set."""

    for row, video in zip(rows, videos, strict=True):
        with open_image(row["frames"][0]) as image:
            lies = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # a photograph that is shown upright
            width, height = image.size[::-1] if lies else image.size
        if (video["width"], video["height"]) != (width, height):
            raise ValueError(
                f"{row['frames'][0]['path']} is {width} x {height} pixels (width x height), annotated are "
                f"{video['width']} x {video['height']}; wanted are the frames as they are published"
            )


def _seen_objects(rows: list[dict], root: Path) -> dict[str, dict[int, bool]] | None:
    training = root / "train" / "meta.json"
    if not training.is_file():
        return None
    with reading(training):
        videos = json.loads(training.read_bytes())["videos"].values()
        categories = {item.get("category") for video in videos for item in video["objects"].values()}
    return {row["video_id"]: {item["id"]: item["label"] in categories for item in row["objects"]} for row in rows}


__all__ = ["PROTOCOLS", "Benchmark", "Protocol", "load_benchmark"]
