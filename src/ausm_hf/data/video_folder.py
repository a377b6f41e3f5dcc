"""A folder of one's own videos with mask PNGs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from .clips import clip_object, clip_row, clips_from_rows, file, reading
from .mask_folders import VIDEO_SUFFIXES, folder_row, need


def video_folder(
    root: str, label_set: str | None = None, exhaustive: bool = False, first_frame_given: bool | None = None
) -> Dataset:
    """Index a folder of videos.

        root/videos/dive.mp4        a video file, or
        root/videos/dive/00000.jpg  a folder of frames
        root/masks/dive/00012.png   an indexed PNG: the mask of frame 12 of the file, or of the frame of that name
        root/masks/dive/1/00012.png or binary PNGs in a folder per object, for a folder of frames
        root/labels.json            optional: {"dive": {"1": "fish"}}

    Not every frame needs a mask. A video file gives the frames that have one.

    Args:
        label_set: Name of the label set that `labels.json` draws from.
        exhaustive: Every object that counts has a mask.
        first_frame_given: Masks are prompts only, so detection isn't trained. Defaults to the opposite of
            `exhaustive`.

    Raises:
        ValueError: A folder is missing, a mask of a video file isn't named by its frame, labels name an unknown video.
    """
    folder = need(Path(root), "root")
    videos = need(folder / "videos", "root")
    masks = need(folder / "masks", "root")
    source = folder / "labels.json"
    labels = {}
    if source.is_file():
        with reading(source):
            labels = json.loads(source.read_text())
            labels = {name: {int(i): label for i, label in objects.items()} for name, objects in labels.items()}
    entries = [p for p in sorted(videos.iterdir()) if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    unknown = sorted(set(labels) - {p.stem if p.is_file() else p.name for p in entries})
    if unknown:
        raise ValueError(f"labels.json names videos that aren't in {videos}: {', '.join(unknown[:5])}")
    flags: dict[str, Any] = {
        "label_set": label_set,
        "exhaustive": exhaustive,
        "first_frame_given": not exhaustive if first_frame_given is None else first_frame_given,
    }
    rows = []
    for entry in entries:
        name = entry.name if entry.is_dir() else entry.stem
        objects = [clip_object(i, label) for i, label in labels.get(name, {}).items()]
        if entry.is_dir():
            rows.append(folder_row(name, entry, masks / name, objects, **flags))
            continue
        pngs = sorted((masks / name).glob("*.png"))
        strange = [p.name for p in pngs if not p.stem.isdecimal()]
        if strange:
            raise ValueError(f"masks of the video file {entry.name} must be named by frame number, got {strange[0]}")
        pngs.sort(key=lambda p: int(p.stem))
        numbers = [int(p.stem) for p in pngs]
        annotations = [file(p) for p in pngs]
        rows.append(
            clip_row(name, [], objects, video=file(entry), video_frames=numbers, annotations=annotations, **flags)
        )
    return clips_from_rows(rows)
