"""Videos annotated by a YouTube-VIS style JSON, one's own included."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from datasets import Dataset

from .clips import clip_object, clip_row, clips_from_rows, encode_rle, file, reading
from .labels import LABEL_SETS
from .mask_folders import need


def vis_json(
    images: str,
    annotations: str,
    label_set: str | None = None,
    exhaustive: bool = True,
    first_frame_given: bool = False,
) -> Dataset:
    """Index videos by a JSON as YouTube-VIS has it.

    The JSON holds `videos` (`id`, `file_names`, `height`, `width`), `categories` (`id`, `name`) and `annotations`
    (`id`, `video_id`, `category_id`, `iscrowd`, `segmentations`: one per frame, run lengths or polygons, null where
    the object is absent).

    Args:
        images: Folder that `file_names` are relative to.
        annotations: The JSON file.
        label_set: Name of the label set that the categories are from; None keeps the labels but trains no class.
        exhaustive: Every object of the categories is annotated.
        first_frame_given: Masks are prompts only; detection isn't trained.

    Raises:
        ValueError: A file or key is missing, a category isn't in a label set known here, an annotation names an
            unknown video or category or has more or fewer segmentations than its video has frames.
    """
    source = need(Path(annotations), "annotations")
    with reading(source):
        content = json.loads(source.read_bytes())
        for key in ("videos", "categories"):
            if key not in content:
                raise ValueError(f"annotations: {source} has no key {key!r}, want the JSON of YouTube-VIS")
        labels = category_names(content["categories"], label_set, source)
        videos = {video["id"]: video for video in content["videos"]}
        if len(videos) < len(content["videos"]):
            raise ValueError(f"annotations: {source} has several videos of one id; want an id for each")
        objects: defaultdict[int, list[dict]] = defaultdict(list)
        for annotation in content.get("annotations") or []:  # the JSONs of validation splits have none
            video = videos.get(annotation["video_id"])
            if video is None:
                raise ValueError(
                    f"annotation {annotation['id']} of {source} is of unknown video {annotation['video_id']}"
                )
            if any(obj["id"] == annotation["id"] for obj in objects[video["id"]]):
                raise ValueError(
                    f"annotation {annotation['id']} of {source} comes twice in video {video['id']}; want an id for "
                    "each object, and all its frames in one annotation"
                )
            label = label_of(annotation, labels, source)
            segmentations = annotation["segmentations"]
            if len(segmentations) != len(video["file_names"]):
                raise ValueError(
                    f"annotation {annotation['id']} of {source} has {len(segmentations)} segmentations, its video "
                    f"{video['id']} has {len(video['file_names'])} frames"
                )
            objects[video["id"]].append(
                clip_object(
                    annotation["id"],
                    label,
                    bool(annotation.get("iscrowd", 0)),
                    [
                        encode_rle(
                            segmentation,
                            video["height"],
                            video["width"],
                            f"annotation {annotation['id']} of {source}, frame {t}: ",
                        )
                        for t, segmentation in enumerate(segmentations)
                    ],
                )
            )
        # YouTube-VIS has a folder for each video, and its name is what people know the video by.
        folders = {video["id"]: Path(video["file_names"][0]).parent.as_posix() for video in content["videos"]}
        names = folders if len(set(folders.values())) == len(folders) else {number: str(number) for number in videos}
        return clips_from_rows(
            clip_row(
                names[video["id"]],
                [file(Path(images) / name) for name in video["file_names"]],
                objects[video["id"]],
                annotated=[bool(content.get("annotations"))] * len(video["file_names"]),
                label_set=label_set,
                exhaustive=exhaustive,
                first_frame_given=first_frame_given,
            )
            for video in content["videos"]
        )


def category_names(categories: list[dict], label_set: str | None, source: Path) -> dict[int, str]:
    """Category id to name, checked against the label set if it is one known here."""
    names = {category["id"]: category["name"] for category in categories}
    strange = sorted(set(names.values()) - set(LABEL_SETS[label_set])) if label_set in LABEL_SETS else []
    if strange:
        raise ValueError(
            f"label_set {label_set!r} lacks {len(strange)} categories of {source}: {', '.join(strange[:5])}"
        )
    return names


def label_of(annotation: dict, names: dict[int, str], source: Path) -> str:
    """The name of an annotation's category. Raises ValueError where there is none."""
    if annotation["category_id"] not in names:
        raise ValueError(
            f"annotation {annotation['id']} of {source} is of unknown category {annotation['category_id']}"
        )
    return names[annotation["category_id"]]
