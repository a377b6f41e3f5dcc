"""DAVIS 2016 and 2017 in the official directory layout."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .clips import clip_object, clips_from_rows
from .mask_folders import folder_row, need


def davis(
    root: str, year: int = 2017, split: str = "train", resolution: str = "480p", annotations: str = "Annotations"
) -> Dataset:
    """Index DAVIS.

    2016 has one salient object (or group) per sequence: it is there to be found, so detection is trained. 2017 splits
    it into several objects that a prompt has to choose: masks are prompts only.

    Args:
        root: Folder with `JPEGImages/`, `Annotations/` and `ImageSets/<year>/<split>.txt`.
        year: 2016 or 2017.
        split: Name of the list of sequences, `"train"`, `"val"`, ...
        resolution: Folder of the frames, `"480p"` or `"Full-Resolution"`.
        annotations: Folder of the masks; `"Annotations_unsupervised"` has those of DAVIS 2017 unsupervised.

    Raises:
        ValueError: `year`, `split` or `resolution` isn't there.
    """
    if year not in (2016, 2017):
        raise ValueError(f"year is {year}, want 2016 or 2017")
    listing = need(Path(root) / "ImageSets" / str(year) / f"{split}.txt", f"split {split!r} of DAVIS {year}")
    frames = need(Path(root) / "JPEGImages" / resolution, f"resolution {resolution!r} of DAVIS")
    masks = Path(root) / annotations / resolution
    return clips_from_rows(
        folder_row(
            name,
            frames / name,
            masks / name,
            [clip_object(1)] if year == 2016 else [],
            binary_masks=year == 2016,
            exhaustive=year == 2016,
            first_frame_given=year == 2017,
            fps=24.0,
        )
        for name in listing.read_text().split()
    )
