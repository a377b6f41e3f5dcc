"""YouTube-VOS 2018 and 2019, which share one layout."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from .clips import clip_object, clips_from_rows, reading
from .mask_folders import folder_row, need


def youtube_vos(root: str, split: str = "train") -> Dataset:
    """Index YouTube-VOS. Masks are prompts only; categories are kept as labels, but are no label set to train.

    Objects may appear after frame 0. In `train` every frame of `JPEGImages` has a mask PNG; `train_all_frames` has
    five times as many frames, of which one in five does; `valid` has masks of the frames in which an object first
    appears.

    Args:
        root: Folder with `<split>/JPEGImages/`, `<split>/Annotations/` and `<split>/meta.json`.
        split: Sub-folder of `root`.

    Raises:
        ValueError: The split, or its `meta.json`, isn't there.
    """
    folder = need(Path(root) / split, f"split {split!r} of YouTube-VOS")
    source = need(folder / "meta.json", "meta.json of YouTube-VOS")
    with reading(source):
        return clips_from_rows(
            folder_row(
                name,
                folder / "JPEGImages" / name,
                folder / "Annotations" / name,
                [clip_object(i, obj.get("category")) for i, obj in video["objects"].items()],
                names=[name for obj in video["objects"].values() for name in obj.get("frames", [])],
                exhaustive=False,
                first_frame_given=True,
            )
            for name, video in json.loads(source.read_bytes())["videos"].items()
        )
