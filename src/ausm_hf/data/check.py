"""Find what is missing or broken in a data set before training starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from datasets import Dataset
from PIL import Image

from .clips import mask_problem, open_mask, open_video, resolve_row


def find_problems(clips: Dataset, open_files: bool = False) -> dict[str, list[str]]:
    """Look at every file of every row.

    Args:
        clips: Rows in the clip format.
        open_files: Also decode every image and open every video and JSON. Slow, and finds all that is broken; without
            it only missing and empty files are found.

    Returns:
        What is wrong, by kind: `"missing"`, `"empty"` and `"broken"` files, masks of one's own that hold no numbers of
            objects (see `mask_problem`), and `"no frames"`, `"no masks"`, `"no objects"` for videos.
        Kinds without problems are left out.
    """
    problems: dict[str, list[str]] = {}
    for row in clips:
        sound = True
        for stored, kind in _files(row):
            problem = _problem(stored, kind, open_files)
            if problem:
                problems.setdefault(problem, []).append(stored["path"])
                sound = False
        if sound and open_files and row.get("own_masks"):
            ids = [obj["id"] for obj in row["objects"]]
            for stored in filter(None, row["annotations"]):
                with open_mask(stored) as image:
                    problem = mask_problem(image, ids)
                if problem:
                    problems.setdefault(f"masks {problem}", []).append(stored["path"])
                    sound = False
        if not sound:
            continue
        if row["annotation_file"] is not None:
            if not open_files:
                continue
            row = resolve_row(row)
        if not row["annotated"]:
            problems.setdefault("no frames", []).append(row["video_id"])
        elif not any(row["annotated"]):
            problems.setdefault("no masks", []).append(row["video_id"])
        elif not row["annotations"] and not row["objects"]:
            problems.setdefault("no objects", []).append(row["video_id"])
    return problems


def check_clips(clips: Dataset, open_files: bool = False, name: str = "data set", examples: int = 5) -> None:
    """Raise one ValueError that reports all problems of a data set together, with counts and some examples of each.

    Videos without any object are no error: they are nothing to learn from, but nothing is broken.
    """
    problems = find_problems(clips, open_files)
    problems.pop("no objects", None)
    if problems:
        lines = [f"{name}: problems in {len(clips)} videos"]
        for kind, where in problems.items():
            lines.append(f"  {len(where)} {kind}:")
            lines += [f"    {place}" for place in where[:examples]]
            if len(where) > examples:
                lines.append(f"    and {len(where) - examples} more")
        raise ValueError("\n".join(lines))


def _files(row: dict) -> Iterator[tuple[dict, str]]:
    images = [*row["frames"], *row["annotations"], *(mask for obj in row["objects"] for mask in obj["masks"])]
    yield from ((image, "image") for image in images if image is not None)
    if row["video"] is not None:
        yield row["video"], "video"
    if row["annotation_file"] is not None:
        yield {"path": row["annotation_file"], "bytes": None}, "json"


def _problem(stored: dict, kind: str, open_file: bool) -> str | None:
    if stored["bytes"] is not None:
        return None  # it came with the data set
    try:
        if os.path.getsize(stored["path"]) == 0:
            return "empty"
    except OSError:
        return "missing"
    if open_file:
        try:
            if kind == "image":
                with Image.open(stored["path"]) as image:
                    image.load()
            elif kind == "video":
                _decode_frame(stored)
            else:
                with open(stored["path"]) as text:
                    json.load(text)
        except (OSError, SyntaxError, ValueError):
            return "broken"
    return None


def _decode_frame(stored: dict) -> None:
    """Raises ValueError if the first frame can't be decoded."""
    import av  # where all clips are images it may be missing

    try:
        with open_video(stored) as (container, stream):
            next(container.decode(stream))
    except (StopIteration, av.FFmpegError) as error:
        raise ValueError(f"{stored['path']}: {error!r}") from error
