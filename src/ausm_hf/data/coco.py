"""COCO instances as one-frame clips, for pseudo-video."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from datasets import Dataset

from .clips import clip_object, clip_row, clips_from_rows, encode_rle, file, reading
from .mask_folders import need
from .vis_json import category_names, label_of


def coco(root: str, split: str = "train2017", annotations: str | None = None, label_set: str = "coco") -> Dataset:
    """Index COCO, or a data set in its layout. Images without annotations are left out; crowds are ignored regions.

    Args:
        root: Folder with `<split>/` (the images) and `annotations/instances_<split>.json`.
        split: `"train2017"`, `"val2017"`, ...
        annotations: Another JSON file.
        label_set: Name of the label set that the categories are from.

    Raises:
        ValueError: A file is missing, or a category isn't in the label set.
    """
    source = need(Path(annotations or Path(root) / "annotations" / f"instances_{split}.json"), "annotations of COCO")
    with reading(source):
        content = json.loads(source.read_bytes())
        labels = category_names(content["categories"], label_set, source)
        by_image = defaultdict(list)
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append(annotation)

        def rows():
            for image in content["images"]:
                objects = []
                # Ids of COCO outgrow pixel values and repeat nothing here, so objects are numbered in their image.
                for number, annotation in enumerate(by_image.pop(image["id"], []), start=1):
                    where = f"annotation {annotation.get('id')} of {source}, image {image['file_name']}: "
                    segmentation = encode_rle(annotation["segmentation"], image["height"], image["width"], where)
                    label = label_of(annotation, labels, source)
                    objects.append(clip_object(number, label, bool(annotation.get("iscrowd", 0)), [segmentation]))
                if objects:
                    yield clip_row(
                        f"{split}/{image['id']:012d}",
                        [file(Path(root) / split / image["file_name"])],
                        objects,
                        label_set=label_set,
                    )

        return clips_from_rows(rows())
