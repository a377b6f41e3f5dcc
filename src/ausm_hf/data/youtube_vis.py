"""YouTube-VIS 2019 and 2021 in the official layouts."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .vis_json import vis_json


def youtube_vis(root: str, year: int = 2019, split: str = "train") -> Dataset:
    """Index YouTube-VIS.

    Args:
        root: Folder with `<split>/JPEGImages/` and `<split>.json` (2019), `<split>/instances.json` (2021) or
            `annotations/instances_<split>.json` (mirrors).
        year: 2019 or 2021; picks the label set `youtube_vis_<year>`.
        split: `"train"`, `"valid"`, ...

    Raises:
        ValueError: An argument is unknown, or its files aren't there.
    """
    if year not in (2019, 2021):
        raise ValueError(f"year is {year}, want 2019 or 2021")
    images, annotations = youtube_vis_files(root, split)
    return vis_json(str(images), str(annotations), f"youtube_vis_{year}")


def youtube_vis_files(root: str, split: str) -> tuple[Path, Path]:
    """The folder of images and the JSON of a split. Raises ValueError if there is no such JSON."""
    folder = Path(root)
    places = [
        folder / f"{split}.json",
        folder / split / "instances.json",
        folder / "annotations" / f"instances_{split}.json",
    ]
    found = [place for place in places if place.is_file()]
    if not found:
        raise ValueError(f"split {split!r} of YouTube-VIS: none of {', '.join(map(str, places))} exists")
    return folder / split / "JPEGImages", found[0]
