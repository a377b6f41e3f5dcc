"""Find what is missing or broken in a data set before training starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from datasets import Dataset

from .clips import file, load_clip, mask_problem, open_image, open_video, resolve_row

FRAMES_AT_ONCE = 8
EXAMPLES = 5  # of each problem, in a report


def find_problems(clips: Dataset, open_files: bool = False) -> dict[str, list[str]]:
    """Look at every file of every row.

    Args:
        clips: Rows in the clip format.
        open_files: Also decode all frames and masks, as training would. Slow, and finds all that is broken; without it
            only missing and empty files are found.

    Returns:
        What is wrong, by kind: `"missing"`, `"empty"` and `"broken"` files, masks of one's own that hold no numbers of
            objects (see `mask_problem`), videos with `"no frames"`, `"no masks"`, `"no objects"`, and why a video
            doesn't load although its files are sound (a mask of another size, a number beyond the last frame).
        Kinds without problems are left out.
    """
    problems: dict[str, list[str]] = {}
    for row in clips:
        found = _problems_of_files(row, opened=False)
        if open_files and (found or not row["annotated"]):
            found = _problems_of_files(row, opened=True)
        if open_files and not found:
            try:
                row = resolve_row(row)
                for start in range(0, len(row["annotated"]), FRAMES_AT_ONCE):
                    load_clip(row, list(range(len(row["annotated"])))[start : start + FRAMES_AT_ONCE])
            except (OSError, SyntaxError, ValueError) as error:
                found = _problems_of_files(row, opened=True) or [("not to be loaded", f"{row['video_id']}: {error}")]
        if not found and row["annotation_file"] is None:
            if not row["annotated"]:
                found = [("no frames" if row["video"] is None else "no masks", row["video_id"])]
            elif not any(row["annotated"]):
                found = [("no masks", row["video_id"])]
            elif not row["annotations"] and not row["objects"]:
                found = [("no objects", row["video_id"])]
        for kind, where in found:
            problems.setdefault(kind, []).append(where)
    return problems


def check_clips(clips: Dataset, open_files: bool = False, name: str = "data set") -> None:
    """Raise one ValueError that reports all problems of a data set together, with counts and some examples of each.

    Videos without any object are no error: they are nothing to learn from, but nothing is broken.
    """
    problems = find_problems(clips, open_files)
    problems.pop("no objects", None)
    if problems:
        lines = [f"{name}: problems in {len(clips)} videos"]
        for kind, where in problems.items():
            lines.append(f"  {len(where)} {kind}:")
            lines += [f"    {place}" for place in where[:EXAMPLES]]
            if len(where) > EXAMPLES:
                lines.append(f"    and {len(where) - EXAMPLES} more")
        raise ValueError("\n".join(lines))


def _problems_of_files(row: dict, opened: bool) -> list[tuple[str, str]]:
    """The kind of problem and the path of each file of the row that has one."""
    masks = [mask for mask in row["annotations"] if mask is not None]
    images = [*row["frames"], *(mask for obj in row["objects"] for mask in obj["masks"])]
    files = [(image, "image") for image in images if image is not None]
    files += [(mask, "own mask" if row.get("own_masks") else "image") for mask in masks]
    if row["video"] is not None:
        files.append((row["video"], "video"))
    if row["annotation_file"] is not None:
        files.append((file(row["annotation_file"]), "json"))
    ids = [obj["id"] for obj in row["objects"]]
    found = ((_problem(stored, kind, ids, opened), stored["path"]) for stored, kind in files)
    return [(problem, path) for problem, path in found if problem]


def _problem(stored: dict, kind: str, ids: list[int], opened: bool) -> str | None:
    if stored["bytes"] is None:  # otherwise it came with the data set
        try:
            if os.path.getsize(stored["path"]) == 0:
                return "empty"
        except OSError:
            return "missing"
    if opened:
        try:
            if kind == "video":
                with open_video(stored) as (container, stream):
                    if next(container.decode(stream), None) is None:
                        return "broken"
            elif kind == "json":
                json.loads(Path(stored["path"]).read_bytes())
            else:
                with open_image(stored) as image:
                    image.load()
                    problem = mask_problem(image, ids) if kind == "own mask" else None
                return f"masks {problem}" if problem else None
        except (OSError, SyntaxError, ValueError):
            return "broken"
    return None
