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
# Every tenth photograph, in the order of their names, is kept out of training to measure on.
HELD_OUT_EVERY = 10


def held_out(index: int) -> bool:
    """Whether the photograph with that place in the sorted names of its set is kept out of training."""
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def stills(root: str, split: str = "all") -> Dataset:
    """Index a folder of stills as one-frame clips, for pseudo-video.

    Labels that are COCO names (or synonyms) are kept in the label set `"coco"`, others become unknown. Sets that are
    neither exhaustive nor salient-object sets give prompts only. What is salient is there to be found; that there is
    nothing else is said of exhaustive sets alone.

    Args:
        root: Folder with `images/`, `masks/` and `meta.json` (`{"exhaustive": bool, "instances": {stem: {id:
            name}}}`).
        split: `"all"` photographs, or two parts of them: `"held_out"` is every tenth (see `held_out`), `"train"` are
            the others.

    Raises:
        ValueError: `meta.json` is missing, or there is no such split.
    """
    if split not in ("all", "train", "held_out"):
        raise ValueError(f'split must be "all", "train" or "held_out", got {split!r}')
    meta = json.loads(need(Path(root) / "meta.json", "root of stills").read_bytes())
    images = {p.stem: p for p in (Path(root) / "images").iterdir()}
    masks = Path(root) / "masks"
    rows = []
    for index, (stem, instances) in enumerate(sorted(meta["instances"].items())):
        if split != "all" and held_out(index) != (split == "held_out"):
            continue
        salient = SALIENT in instances.values()
        objects = [clip_object(int(i), _coco_label(name)) for i, name in instances.items()]
        rows.append(
            clip_row(
                f"{meta['name']}/{stem}",
                [file(images.get(stem, Path(root) / "images" / f"{stem}.webp"))],
                objects,
                annotations=[file(masks / f"{stem}.png")],
                label_set=None if salient else "coco",
                exhaustive=meta["exhaustive"],
                first_frame_given=not (salient or meta["exhaustive"]),
            )
        )
    return clips_from_rows(rows)


def _coco_label(name: str) -> str | None:
    name = SYNONYMS.get(name, name)
    return name if name in COCO_LABELS else None
