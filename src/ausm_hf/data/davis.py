"""DAVIS 2016 and 2017 in the official directory layouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from .clips import clip_object, clip_row, clips_from_rows, file
from .mask_folders import folder_row, need


def davis(
    root: str, year: int = 2017, split: str = "train", resolution: str = "480p", annotations: str = "Annotations"
) -> Dataset:
    """Index DAVIS.

    2016 has one salient object (or group) per sequence: it is there to be found, so detection is trained. 2017 splits
    it into several objects that a prompt has to choose: masks are prompts only.

    Args:
        root: Folder with `JPEGImages/`, `Annotations/` and `ImageSets/<year>/<split>.txt`, or in its place, as DAVIS
            2016 itself comes, `ImageSets/<resolution>/<split>.txt` with a frame and its mask per line.
        year: 2016 or 2017.
        split: Name of the list of sequences, `"train"`, `"val"`, ...
        resolution: Folder of the frames, `"480p"`, `"1080p"` (2016) or `"Full-Resolution"` (2017).
        annotations: Folder of the masks; `"Annotations_unsupervised"` has those of DAVIS 2017 unsupervised.

    Raises:
        ValueError: `year`, `split` or `resolution` isn't there, or a line of a list isn't a frame and its mask.
    """
    if year not in (2016, 2017):
        raise ValueError(f"year is {year}, want 2016 or 2017")
    pairs = Path(root) / "ImageSets" / resolution / f"{split}.txt"
    if year == 2016 and pairs.is_file():
        return clips_from_rows(_rows_of_pairs(Path(root), pairs))
    listing = need(Path(root) / "ImageSets" / str(year) / f"{split}.txt", f"split {split!r} of DAVIS {year}")
    frames = need(Path(root) / "JPEGImages" / resolution, f"resolution {resolution!r} of DAVIS")
    masks = Path(root) / annotations / resolution
    return clips_from_rows(
        folder_row(
            name,
            frames / name,
            masks / name,
            [clip_object(1)] if year == 2016 else [],
            every_frame=year == 2016 or split in ("train", "val"),
            binary_masks=year == 2016,
            exhaustive=year == 2016,
            first_frame_given=year == 2017,
        )
        for name in listing.read_text(encoding="utf-8").split()
    )


def _rows_of_pairs(root: Path, listing: Path) -> Iterator[dict]:
    """Rows of a list of DAVIS 2016: `/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png` per line."""
    sequences: dict[str, list[list[str]]] = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        pair = [part.lstrip("/") for part in line.split()]
        if not pair:
            continue
        if len(pair) != 2:
            raise ValueError(f"{listing}, line {number}: want a frame and its mask, got {line!r}")
        sequences.setdefault(Path(pair[0]).parent.name, []).append(pair)
    for name, of_sequence in sequences.items():
        yield clip_row(
            name,
            [file(root / frame) for frame, _ in of_sequence],
            [clip_object(1)],
            annotations=[file(root / mask) for _, mask in of_sequence],
            binary_masks=True,
            exhaustive=True,
            first_frame_given=False,
        )
