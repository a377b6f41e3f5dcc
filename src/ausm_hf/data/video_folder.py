"""A folder of one's own videos with mask PNGs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from .clips import clip_object, clip_row, clips_from_rows, file, reading
from .mask_folders import VIDEO_SUFFIXES, folder_row, need, visible


def video_folder(
    root: str, label_set: str | None = None, exhaustive: bool = False, first_frame_given: bool | None = None
) -> Dataset:
    """Index a folder of videos.

        root/videos/dive.mp4        a video file, or
        root/videos/dive/00000.jpg  a folder of frames
        root/masks/dive/00012.png   an indexed PNG: the mask of frame 12 of the file, or of the frame of that name
        root/masks/dive/1/00012.png or binary PNGs in a folder per object, for a folder of frames
        root/labels.json            optional: {"dive": {"1": "fish"}}

    The pixels of an indexed PNG are the numbers of objects, 1 to 254, the same ones in all frames of the video,
    whether `labels.json` lists them or not. 0 is background, and 255 marks pixels of which nothing is known. Frames
    are counted and turned as `ausm_hf.read_video` does. Not every frame needs a mask: those without are left out.

    Args:
        label_set: Name of the label set that `labels.json` draws from.
        exhaustive: Every object that counts has a mask.
        first_frame_given: Masks are prompts only, so detection isn't trained. Defaults to the opposite of
            `exhaustive`.

    Raises:
        ValueError: A folder is missing, a mask of a video file isn't named by its frame, labels name an unknown video.
            When clips are loaded or checked: a PNG isn't such a mask, see `clips.mask_problem`.
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
    entries = [p for p in sorted(visible(videos)) if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    unknown = sorted(set(labels) - {p.stem if p.is_file() else p.name for p in entries})
    if unknown:
        raise ValueError(f"labels.json names videos that aren't in {videos}: {', '.join(unknown[:5])}")
    flags: dict[str, Any] = {
        "label_set": label_set,
        "exhaustive": exhaustive,
        "first_frame_given": not exhaustive if first_frame_given is None else first_frame_given,
        "own_masks": True,
    }
    rows = []
    for entry in entries:
        name = entry.name if entry.is_dir() else entry.stem
        objects = [clip_object(i, label) for i, label in labels.get(name, {}).items()]
        if entry.is_dir():
            rows.append(_annotated_frames(folder_row(name, entry, masks / name, objects, **flags)))
            continue
        pngs = sorted(visible(masks / name, "*.png"))
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


def _annotated_frames(row: dict) -> dict:
    """A row of its frames with a mask alone: clips are to be made of them, as of those of a video file."""
    kept = [t for t, known in enumerate(row["annotated"]) if known]
    if not kept:
        return row  # for the check to report

    def of_kept(values: list) -> list:
        return [values[t] for t in kept] if values else []

    return row | {
        "frames": of_kept(row["frames"]),
        "annotations": of_kept(row["annotations"]),
        "annotated": of_kept(row["annotated"]),
        "objects": [obj | {"masks": of_kept(obj["masks"])} for obj in row["objects"]],
    }
