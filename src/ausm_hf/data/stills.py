"""Still photographs with instance masks: `images/*.webp`, `masks/*.png` (instance ids, 255 = ignore), `meta.json`."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from .clips import clip_object, clip_row, clips_from_rows, file
from .labels import COCO_LABELS
from .mask_folders import need

# Sets whose masks are the salient object or group: it is what there is to be found, without a class.
SALIENT = "salient object"
SYNONYMS = {"pedestrian": "person"}


def stills(root: str) -> Dataset:
    """Index a folder of stills as one-frame clips, for pseudo-video.

    Labels that are COCO names (or synonyms) are kept in the label set `"coco"`, others become unknown. Sets that are
    neither exhaustive nor salient-object sets give prompts only.

    Args:
        root: Folder with `images/`, `masks/` and `meta.json` (`{"exhaustive": bool, "instances": {stem: {id:
            name}}}`).

    Raises:
        ValueError: `meta.json` is missing.
    """
    meta = json.loads(need(Path(root) / "meta.json", "root of stills").read_text())
    images = {p.stem: p for p in (Path(root) / "images").iterdir()}
    masks = Path(root) / "masks"
    rows = []
    for stem, instances in meta["instances"].items():
        salient = SALIENT in instances.values()
        objects = [clip_object(int(i), _coco_label(name)) for i, name in instances.items()]
        rows.append(
            clip_row(
                f"{meta['name']}/{stem}",
                [file(images.get(stem, Path(root) / "images" / f"{stem}.webp"))],
                objects,
                annotations=[file(masks / f"{stem}.png")],
                label_set=None if salient else "coco",
                exhaustive=salient or meta["exhaustive"],
                first_frame_given=not (salient or meta["exhaustive"]),
            )
        )
    return clips_from_rows(rows)


def _coco_label(name: str) -> str | None:
    name = SYNONYMS.get(name, name)
    return name if name in COCO_LABELS else None
