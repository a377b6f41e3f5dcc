"""Predictions in the layouts that the servers of the benchmarks take."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from ..export import to_youtube_vis
from ..files import WholeOrNothing, write_text
from .benchmarks import Benchmark


def write_track_list(output: Path, benchmark: Benchmark) -> Path:
    """
    Joins the tracks of all videos: `tracks.json`, as the YouTube-VIS and OVIS servers take them, or COCO's.

    Args:
        output: Folder of the run, with `tracks/`.
        benchmark: What was run.

    Returns:
        The file.
    """
    truth = benchmark.annotations or {}
    categories = {category["name"]: category["id"] for category in truth["categories"]}
    listed = []
    for row, video in zip(benchmark.rows, truth["videos"]):
        content = json.loads(benchmark.place(output, row).read_bytes())
        # A label that the data set lacks can be neither right nor wrong there.
        content["objects"] = [item for item in content["objects"] if item["label"] in categories]
        listed += to_youtube_vis(content, video["id"], categories)
    if benchmark.name == "coco":
        listed = [
            {
                "image_id": track["video_id"],
                "category_id": track["category_id"],
                "segmentation": track["segmentations"][0],
                "score": track["score"],
            }
            for track in listed
        ]
    write_text(output / "tracks.json", json.dumps(listed))
    return output / "tracks.json"


def read_track_list(output: Path) -> list[dict]:
    """What `write_track_list` wrote, images as videos of one frame."""
    return [
        track
        if "video_id" in track
        else {
            "video_id": track["image_id"],
            "category_id": track["category_id"],
            "segmentations": [track["segmentation"]],
            "score": track["score"],
        }
        for track in json.loads((output / "tracks.json").read_bytes())
    ]


def write_submission(output: Path, benchmark: Benchmark) -> Path:
    """
    Packs the predictions for the server that scores them: `submission.zip`.

    YouTube-VOS wants its videos in a folder `Annotations`, DAVIS and MOSE want them at the top; YouTube-VIS and OVIS
    want one `results.json`, and COCO a name that says task and split.

    Args:
        output: Folder of the run.
        benchmark: What was run.

    Returns:
        The file.
    """
    with WholeOrNothing(output / "submission.zip") as file:
        with zipfile.ZipFile(file.partial, "w", zipfile.ZIP_DEFLATED) as archive:
            if benchmark.annotations is not None:
                prefix = f"detections_{benchmark.split}_ausm_" if benchmark.name == "coco" else ""
                archive.write(output / "tracks.json", f"{prefix}results.json")
            top = Path("Annotations" if benchmark.name.startswith("youtube_vos") else "")
            for row in benchmark.rows if benchmark.annotations is None else ():
                folder = benchmark.place(output, row)
                for path in sorted(folder.rglob("*.png")):
                    archive.write(path, top / path.relative_to(folder.parent))
    return output / "submission.zip"
