"""A folder of one's own videos with mask PNGs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import VIDEO_SUFFIXES
from .clips import clip_object, clip_row, clips_from_rows, file, reading
from .mask_folders import folder_row, image_files, mask_files, need, visible


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
    Objects of less than 0.08% of the picture in all frames are not trained, nor are masks of fewer than 16 pixels in a
    clip: they are ignored.

    Args:
        label_set: Name of the label set that `labels.json` draws from.
        exhaustive: Every object that counts has a mask.
        first_frame_given: Masks are prompts only, so detection isn't trained. Defaults to the opposite of
            `exhaustive`.

    Raises:
        ValueError: A folder is missing, masks or labels belong to no video, a mask to none of its frames, two videos
            have one name, or `labels.json` isn't as above. When clips are loaded or checked: a PNG isn't such a mask,
            see `clips.mask_problem`.
    """
    folder = need(Path(root), "root")
    videos = need(folder / "videos", "root")
    masks = need(folder / "masks", "root")
    labels = _read_labels(folder / "labels.json")
    entries = [p for p in sorted(visible(videos)) if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    names = [p.name if p.is_dir() else p.stem for p in entries]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{videos} has several videos of the name {twice[0]}; want a name for each")
    masked = [p.name for p in visible(masks) if p.is_dir()] + [p.name for p in mask_files(masks)]
    for source, named in (("labels.json", labels), (str(masks), masked)):
        unknown = sorted(set(named) - set(names))
        if unknown:
            raise ValueError(
                f"{source} names videos that aren't in {videos}: {', '.join(unknown[:5])}; want folders of frames or "
                f"files that end in {', '.join(VIDEO_SUFFIXES)}"
            )
    flags: dict[str, Any] = {
        "label_set": label_set,
        "exhaustive": exhaustive,
        "first_frame_given": not exhaustive if first_frame_given is None else first_frame_given,
        "own_masks": True,
    }
    rows = []
    for name, entry in zip(names, entries):
        objects = [clip_object(i, label) for i, label in labels.get(name, {}).items()]
        if entry.is_dir():
            _check_names(masks / name, entry)
            rows.append(_annotated_frames(folder_row(name, entry, masks / name, objects, **flags)))
            continue
        pngs = mask_files(masks / name)
        strange = sorted({*visible(masks / name)} - {p for p in pngs if p.stem.isdecimal()})
        if strange:
            raise ValueError(
                f"masks of the video file {entry.name} must be PNGs named by frame number, got {strange[0].name}"
            )
        numbers = [int(p.stem) for p in pngs]
        annotations = [file(p) for p in pngs]
        rows.append(
            clip_row(name, [], objects, video=file(entry), video_frames=numbers, annotations=annotations, **flags)
        )
    return clips_from_rows(rows)


def _read_labels(source: Path) -> dict[str, dict[int, str | None]]:
    """Video to object to label; empty if there is no such file."""
    if not source.is_file():
        return {}
    with reading(source):
        labels = json.loads(source.read_text(encoding="utf-8-sig"))
        for name, objects in labels.items():
            for number, label in objects.items():
                if not number.isdecimal() or not isinstance(label, str | None):
                    raise ValueError(
                        f"{source} has {json.dumps({number: label})} in {name}; want the number of an object and its "
                        'label, as {"1": "fish"}'
                    )
        return {name: {int(number): label for number, label in objects.items()} for name, objects in labels.items()}


def _check_names(masks: Path, frames: Path) -> None:
    """Raises ValueError if something in a folder of masks would be passed over."""
    names = {p.stem for p in image_files(frames)}
    parts = [p for p in visible(masks) if p.is_dir()]
    wanted = {*parts, *(p for folder in parts or [masks] for p in mask_files(folder) if p.stem in names)}
    strange = sorted({p for folder in (masks, *parts) for p in visible(folder)} - wanted)
    if strange:
        raise ValueError(
            f"{strange[0]} is the mask of no frame of {frames}; want PNGs with the names of the frames, in one folder "
            "or in a folder per object"
        )


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
