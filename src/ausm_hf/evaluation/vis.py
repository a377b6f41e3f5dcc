"""Score a file of tracks in the YouTube-VIS format against its annotations."""

import json
from pathlib import Path
from typing import Any

from ..data.clips import encode_rle
from .metrics.video_ap import VideoAP


def score_tracks(results: str | Path | list[dict], annotations: str | Path | dict, images: bool = False) -> dict:
    """Video AP of results as the YouTube-VIS and OVIS servers take them.

    Args:
        results (`str`, `Path` or `list[dict]`): A JSON file or its content: tracks with `video_id`, `category_id`,
            `score` and `segmentations`: for each frame of the video a COCO RLE or `None`.
        annotations (`str`, `Path` or `dict`): A JSON file or its content: `videos` (`id`, `height`, `width`, `length`
            or `file_names`), `categories` (`id`) and `annotations` (`id`, `video_id`, `category_id`, `segmentations`
            as above or polygons, optionally `iscrowd`).
        images (`bool`, *optional*, defaults to `False`): The videos are images, scored as COCO does: see
            [`~ausm_hf.evaluation.metrics.video_ap.VideoAP.result`].

    Returns:
        `dict`: `AP`, `AP50`, `AP75`, `AR1`, `AR10` and `categories`, see
        [`~ausm_hf.evaluation.metrics.video_ap.VideoAP.result`].

    Raises:
        ValueError: One report of everything that is wrong: tracks that lack something, unknown videos and categories,
            wrong numbers of frames, wrong sizes, broken RLEs and polygons.
    """
    found, truth = _content(results), _content(annotations)
    if not isinstance(found, list) or not all(isinstance(track, dict) for track in found):
        raise ValueError("`results` must be a list of tracks (dicts).")
    lacking = {"videos", "categories", "annotations"} - set(truth if isinstance(truth, dict) else ())
    if lacking:
        raise ValueError(f"`annotations` lacks {', '.join(sorted(lacking))}.")

    videos = {video["id"]: video for video in truth["videos"]}
    scorer = VideoAP()
    tracks: dict[int, tuple[list, list]] = {video_id: ([], []) for video_id in videos}
    for kind, entries, wanted in (
        ("result", found, {"video_id", "category_id", "score", "segmentations"}),
        ("annotation", truth["annotations"], {"video_id", "category_id", "segmentations"}),
    ):
        for index, track in enumerate(entries):
            problem = _track_problem(track, wanted, videos)
            if not problem:
                try:
                    track = track | {"segmentations": _without_polygons(track, videos[track["video_id"]])}
                except ValueError as error:
                    problem = str(error)
            if problem:
                scorer.problems.append(f"{kind} {index}: {problem}")
            else:
                tracks[track["video_id"]][kind == "annotation"].append((index, track))

    for video_id, video in videos.items():
        predictions, references = tracks[video_id]
        for t in range(_length(video)):
            scorer.add(
                video_id,
                [_segment(index, track, t) | {"score": track["score"]} for index, track in predictions],
                [_segment(index, track, t) for index, track in references],
                fixed_categories=True,
            )
    return scorer.result([category["id"] for category in truth["categories"]], images)


def _content(source: str | Path | list | dict) -> Any:
    return json.loads(Path(source).read_bytes()) if isinstance(source, (str, Path)) else source


def _length(video: dict) -> int:
    return video["length"] if "length" in video else len(video["file_names"])


def _track_problem(track: dict, wanted: set[str], videos: dict[int, dict]) -> str | None:
    lacking = wanted - set(track)
    if lacking:
        return f"lacks {', '.join(sorted(lacking))}"
    if track["video_id"] not in videos:
        return f"unknown video {track['video_id']}"
    video, segmentations = videos[track["video_id"]], track["segmentations"]
    if not isinstance(segmentations, list) or len(segmentations) != _length(video):
        count = len(segmentations) if isinstance(segmentations, list) else "no"
        return f"{count} segmentations for the {_length(video)} frames of video {video['id']}"
    for t, mask in enumerate(segmentations):
        if isinstance(mask, dict) and "size" in mask and tuple(mask["size"]) != (video["height"], video["width"]):
            height, width = mask["size"]
            return (
                f"mask of {height} x {width} in frame {t} of video {video['id']}, which is "
                f"{video['height']} x {video['width']}"
            )
    return None


def _without_polygons(track: dict, video: dict) -> list:
    """The segmentations of a track, polygons as run lengths. Raises ValueError for polygons that are none."""
    segmentations = []
    for t, mask in enumerate(track["segmentations"]):
        try:
            is_polygons = isinstance(mask, list)
            segmentations.append(encode_rle(mask, video["height"], video["width"]) if is_polygons else mask)
        except ValueError as error:
            raise ValueError(f"frame {t} of video {video['id']}: {error}") from error
    return segmentations


def _segment(index: int, track: dict, t: int) -> dict:
    mask = track["segmentations"][t] or None
    return {"id": index, "category_id": track["category_id"], "mask": mask, "iscrowd": track.get("iscrowd", 0)}
