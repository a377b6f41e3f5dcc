"""MOSE in the official directory layout."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .clips import clips_from_rows
from .mask_folders import folder_row, need


def mose(root: str, split: str = "train") -> Dataset:
    """Index MOSE. Masks are prompts only; `valid` has masks of first frames alone.

    Args:
        root: Folder with `<split>/JPEGImages/<video>/` and `<split>/Annotations/<video>/`.
        split: `"train"` or `"valid"`.

    Raises:
        ValueError: The split isn't there.
    """
    frames = need(Path(root) / split / "JPEGImages", f"split {split!r} of MOSE")
    masks = need(Path(root) / split / "Annotations", f"split {split!r} of MOSE")
    return clips_from_rows(
        folder_row(video.name, video, masks / video.name, exhaustive=False, first_frame_given=True)
        for video in sorted(frames.iterdir())
        if video.is_dir()
    )
