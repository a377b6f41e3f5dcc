"""Data sets that are folders of frames and of indexed mask PNGs, one sub-folder per video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..files import image_files, natural_order, visible
from .clips import clip_object, clip_row, file


def mask_files(folder: Path) -> list[Path]:
    """The PNGs of a folder; none if the folder isn't there."""
    return image_files(folder, (".png",))


def folder_row(
    video_id: str,
    frames: Path,
    masks: Path,
    known: Sequence[dict] = (),
    names: Iterable[str] = (),
    every_frame: bool = False,
    **flags,
) -> dict:
    """A row of frames in the folder `frames`, with the masks of the same names in the folder `masks`.

    Frames that must be there, as there is a mask of them or `names` has them, and masks that must be, are in the row
    also where they are missing: for `check_clips` to report.

    Args:
        masks: Holds indexed PNGs, or one sub-folder of binary PNGs per object, named by its number.
        known: The objects, if a list of them came with the data.
        names: Of frames that must be there, without their suffix.
        every_frame: Each frame must have a mask, unless the first one alone has.
        flags: More arguments of `clip_row`.
    """
    parts = sorted(p for p in visible(masks) if p.is_dir())
    masked = {p.stem for folder in parts or [masks] for p in mask_files(folder)}
    images = image_files(frames)
    missing = masked.union(names) - {image.stem for image in images}
    suffix = images[0].suffix if images else ".jpg"
    images = sorted([*images, *(frames / f"{name}{suffix}" for name in missing)], key=natural_order)
    if not parts:
        by_name = {p.stem: file(p) for p in mask_files(masks)}
        if every_frame and masked - {image.stem for image in images[:1]}:
            by_name = {image.stem: file(masks / f"{image.stem}.png") for image in images} | by_name
        annotations = [by_name.get(image.stem) for image in images]
        return clip_row(video_id, [file(p) for p in images], list(known), annotations=annotations, **flags)
    labels = {obj["id"]: obj["label"] for obj in known}
    objects, annotated = [], [False] * len(images)
    for part in parts:
        if not part.name.isdecimal():
            raise ValueError(f"masks of {video_id}: folder {part} isn't the number of an object")
        by_name = {p.stem: file(p) for p in mask_files(part)}
        own = [by_name.get(image.stem) for image in images]
        annotated = [before or mask is not None for before, mask in zip(annotated, own)]
        objects.append(clip_object(int(part.name), labels.get(int(part.name)), masks=own))
    return clip_row(video_id, [file(p) for p in images], objects, annotated=annotated, **flags)


def need(path: Path, what: str) -> Path:
    """The path, or a ValueError that says which argument asked for it."""
    if not path.exists():
        raise ValueError(f"{what}: {path} doesn't exist")
    return path
