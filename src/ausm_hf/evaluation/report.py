"""What is said about a run over a benchmark: scores, a table, a sheet of pictures and a plot."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from ..data.clips import encode_rle, load_frames, load_masks
from ..files import WholeOrNothing
from ..visualization import contact_sheet, draw_overlay
from .benchmarks import PROTOCOLS, Benchmark
from .metrics.jf import ObjectScore, SequenceScorer, report_problems, seen_and_unseen, summarize
from .metrics.video_ap import MEASURES
from .runner import frame_name, has_mask_folders, has_truth, id_offset
from .score import format_table, read_mask
from .submission import read_track_list
from .vis import score_tracks

SHEET_VIDEOS = 3  # so many of the best, and of the worst
SHEET_FRAMES = 4  # of each video
SHEET_HEIGHT = 240  # of a frame, in pixels, at most


def write_report(output: Path, benchmark: Benchmark) -> dict:
    """
    Scores the predictions of a run and draws `contact_sheet.png` and, for masks, `j_over_time.png`.

    Args:
        output: Folder of the run, with all predictions.
        benchmark: What was run.

    Returns:
        `{"scores": {measure: dict}, "not_scored": list}`. Scores are fractions of 1. For masks, of each measure what
        [`~ausm_hf.evaluation.metrics.jf.summarize`] makes, and `j_over_time`: mean J over the objects, frame by
        frame of those that are scored. For tracks, `AP` as [`~ausm_hf.evaluation.vis.score_tracks`] makes it, and
        `videos`: the AP of each video alone. No measure where there is no ground truth. `not_scored` names the videos
        without ground truth, if others have it.

    Raises:
        ValueError: one report of everything that can't be scored.
    """
    if benchmark.annotations is not None:
        scores, not_scored = _score_tracks(output, benchmark), []
        per_video = scores["AP"]["videos"] if scores else {}
        title = "AP"
    else:
        objects = score_masks(output, benchmark)
        scores = {measure: summarize(of_measure) for measure, of_measure in objects.items()}
        for measure, of_measure in objects.items():
            scores[measure]["j_over_time"] = j_over_time(of_measure)
        title = next(iter(scores), "")
        per_video = {name: row["J&F"] for name, row in scores[title]["sequences"].items()} if scores else {}
        not_scored = [row["video_id"] for row in benchmark.rows if scores and row["video_id"] not in objects[title]]
        if scores:
            _plot_j_over_time(output / "j_over_time.png", objects, benchmark)
        if scores and benchmark.seen is not None:
            scores["G"] = seen_and_unseen(scores["J&F"], benchmark.seen)
    _write_contact_sheet(output, benchmark, per_video, title)
    return {"scores": scores, "not_scored": not_scored}


def format_results(results: dict) -> str:
    """
    The table of a run, in percent.

    Args:
        results: As [`~ausm_hf.evaluation.run.evaluate`] returns them.

    Returns:
        Lines of text: one per sequence (or category) and the mean, for each measure; and whether only a part of the
        videos has been scored.
    """
    settings, parts = results["settings"], []
    for measure, scores in results["scores"].items():
        if measure == "AP":
            names = {**{str(key): row for key, row in scores["categories"].items()}, "mean": scores}
            width = max(len("category"), *map(len, names))
            lines = [f"{'category':<{width}}" + "".join(f"{name:>8}" for name in MEASURES)]
            for name, row in names.items():
                lines.append(f"{name:<{width}}" + "".join(f"{100 * row[key]:>8.1f}" for key in MEASURES))
            table = "\n".join(lines)
        elif measure == "G":
            table = "  ".join(f"{key} {'none' if v is None else format(100 * v, '.1f')}" for key, v in scores.items())
        else:
            table = format_table(scores)
        parts.append(f"{settings['benchmark']} {settings['split']}, {settings['mode']}: {measure}\n{table}")
    if not parts:
        parts.append(
            f"{settings['benchmark']} {settings['split']} has no ground truth here: its server scores submission.zip"
        )
    if without := results["not_scored"]:
        scored = settings["videos"] - len(without)
        parts.append(
            f"Only {scored} of {settings['videos']} videos have ground truth here, and the scores are of these alone. "
            "submission.zip has the predictions for all."
        )
    return "\n\n".join(parts)


def score_masks(output: Path, benchmark: Benchmark) -> dict[str, dict[str, dict[int, ObjectScore]]]:
    """
    J and F of the masks in `output/masks`.

    Returns:
        Measure -> video -> object -> score, of the videos that have ground truth.

    Raises:
        ValueError: one report of everything that is wrong, over all videos.
    """
    measures = PROTOCOLS[benchmark.name].scorers[benchmark.mode]
    scores: dict[str, dict] = defaultdict(dict)
    problems = []
    for row in benchmark.rows:
        if not has_truth(row):
            continue
        folder, name = benchmark.place(output, row), row["video_id"]
        for measure in measures:
            scores[measure][name] = {}
        for object_id, frames in _pairs_of_files(row):
            options = {measure: dict(how) for measure, how in measures.items()}
            of_object = name if object_id is None else f"{name}/{object_id:03d}"
            scorers = {
                measure: SequenceScorer(of_object, how.pop("mode"), how.pop("binary", False))
                for measure, how in options.items()
            }
            for file, truth in frames:
                try:
                    pred, gt = read_mask(folder / file), read_mask(truth, row["binary_masks"])
                except (OSError, ValueError) as error:
                    problems.append(f"{name}: {error}")
                    continue
                for scorer in scorers.values():
                    scorer.add(pred, gt, frame=file)
            for measure, scorer in scorers.items():
                found, wrong = scorer.result_or_problems(**options[measure])
                problems += wrong
                # One object at a time, it is number 1 in its files.
                scores[measure][name] |= found if object_id is None else {object_id: found[1]} if found else {}
    report_problems(list(dict.fromkeys(problems)))
    return dict(scores)


def _pairs_of_files(row: dict) -> list[tuple[int | None, list[tuple[str, str]]]]:
    """Predicted file (in the video's folder) and true file of each annotated frame; object by object for SA-V."""
    if not has_mask_folders(row):
        stored = enumerate(row["annotations"])
        return [(None, [(f"{frame_name(row, t)}.png", mask["path"]) for t, mask in stored if mask is not None])]
    return [
        (
            obj["id"],
            [
                (f"{obj['id']:03d}/{frame_name(row, t)}.png", mask["path"])
                for t, mask in enumerate(obj["masks"])
                if mask is not None
            ],
        )
        for obj in row["objects"]
    ]


def _score_tracks(output: Path, benchmark: Benchmark) -> dict[str, dict]:
    """AP over all videos and of each alone."""
    content = benchmark.annotations or {}
    if not content.get("annotations"):
        return {}
    tracks = read_track_list(output)
    images = benchmark.name == "coco"
    total = score_tracks(tracks, content, images)
    names = {category["id"]: category["name"] for category in content["categories"]}
    total["categories"] = {names[number]: row for number, row in total["categories"].items()}
    predicted, true = defaultdict(list), defaultdict(list)
    for track in tracks:
        predicted[track["video_id"]].append(track)
    for track in content["annotations"]:
        true[track["video_id"]].append(track)
    total["videos"] = {}
    for row, video in zip(benchmark.rows, content["videos"]):
        of_video = {"videos": [video], "annotations": true[video["id"]], "categories": content["categories"]}
        ap = score_tracks(predicted[video["id"]], of_video, images)["AP"]
        if ap >= 0:  # -1: there is nothing to find
            total["videos"][row["video_id"]] = ap
    return {"AP": total}


def j_over_time(scores: dict[str, dict[int, ObjectScore]]) -> list[float | None]:
    """
    Mean J over all objects that count in the first, second, ... annotated frame of their sequences.

    Args:
        scores: Video -> object -> score.

    Returns:
        One number per frame; None where no object counts.
    """
    everyone = [score for of_video in scores.values() for score in of_video.values()]
    length = max(score.first_frame + len(score.j) for score in everyone)
    table = np.full((len(everyone), length), np.nan)
    for line, score in zip(table, everyone):
        line[score.first_frame : score.first_frame + len(score.j)] = score.j
    columns = [column[~np.isnan(column)] for column in table.T]
    return [float(column.mean()) if len(column) else None for column in columns]


def _as_line(scores: dict[str, dict[int, ObjectScore]]) -> np.ndarray:
    return np.array(j_over_time(scores), dtype=float)


def _plot_j_over_time(path: Path, scores: dict[str, dict[str, dict[int, ObjectScore]]], benchmark: Benchmark) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (measure, of_measure) in enumerate(scores.items(), 1):
        axes = figure.add_subplot(len(scores), 1, number)
        for name, of_video in of_measure.items():
            if not of_video:  # its objects are to be seen in frames only that aren't scored
                continue
            label = name if len(of_measure) <= 10 else None
            axes.plot(_as_line({name: of_video}), linewidth=0.8, alpha=0.6, label=label)
        axes.plot(_as_line(of_measure), color="black", linewidth=2, label="mean over objects")
        axes.set(xlabel="annotated frame", ylabel="J", ylim=(0, 1))
        axes.set_title(f"{benchmark.name} {benchmark.split}, {benchmark.mode}: {measure}")
        axes.legend(fontsize="small", loc="lower left")
    with WholeOrNothing(path) as file:
        figure.savefig(file.partial, dpi=120)


def _write_contact_sheet(output: Path, benchmark: Benchmark, per_video: dict[str, float], measure: str) -> None:
    """
    Some frames of the best and the worst videos (of the first ones where nothing is scored): a line of predictions and
    below, where it is known, the truth.
    """
    index = {row["video_id"]: number for number, row in enumerate(benchmark.rows)}
    chosen = sorted(per_video, key=lambda name: -per_video[name]) or list(index)[: 2 * SHEET_VIDEOS]
    if len(chosen) > 2 * SHEET_VIDEOS:
        chosen = chosen[:SHEET_VIDEOS] + chosen[-SHEET_VIDEOS:]
    pictures, titles = [], []
    for name in chosen:
        row = benchmark.rows[index[name]]
        numbers = np.flatnonzero(row["annotated"]) if name in per_video else np.arange(len(row["frames"]))
        numbers = numbers[np.linspace(0, len(numbers) - 1, SHEET_FRAMES).round().astype(int)].tolist()
        frames = [load_frames(row, [t])[0] for t in numbers]
        score = f"{measure} {100 * per_video[name]:.1f}, " if name in per_video else ""
        for t, frame in zip(numbers, frames):
            pictures.append(_small_overlay(frame, _predicted_masks(output, benchmark, index[name], t, frame)))
            titles.append(f"{name}: {score}frame {t}")
        for t, frame in zip(numbers, frames) if name in per_video else ():
            pictures.append(_small_overlay(frame, _true_masks(benchmark, index[name], t, frame)))
            titles.append(f"{name}: truth")
    sheet = contact_sheet(pictures, SHEET_FRAMES, titles, f"{benchmark.name} {benchmark.split}, {benchmark.mode}")
    with WholeOrNothing(output / "contact_sheet.png") as file:
        sheet.save(file.partial)


def _small_overlay(frame: np.ndarray, masks: np.ndarray) -> np.ndarray:
    height = min(SHEET_HEIGHT, frame.shape[0])
    size = round(frame.shape[1] * height / frame.shape[0]), height
    small = np.array(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
    return draw_overlay(small, np.array(Image.fromarray(masks).resize(size, Image.Resampling.NEAREST)))


def _predicted_masks(output: Path, benchmark: Benchmark, number: int, t: int, frame: np.ndarray) -> np.ndarray:
    """What was written for frame `t` of a video: int32 (H, W)."""
    row = benchmark.rows[number]
    place = benchmark.place(output, row)
    if benchmark.annotations is not None:
        content = json.loads(place.read_bytes())
        masks = {item["id"]: item["segmentations"].get(str(t)) for item in content["objects"]}
        return _paint(masks, frame)
    if has_mask_folders(row):
        ids = [obj["id"] for obj in row["objects"]]
        masks = {i + id_offset(row): read_mask(place / f"{i:03d}" / f"{frame_name(row, t)}.png") for i in ids}
        return _paint(masks, frame)
    return read_mask(place / f"{frame_name(row, t)}.png").astype(np.int32)


def _true_masks(benchmark: Benchmark, number: int, t: int, frame: np.ndarray) -> np.ndarray:
    """The ground truth of frame `t` of a video: int32 (H, W)."""
    row = benchmark.rows[number]
    if benchmark.annotations is None:
        masks, _ = load_masks(row, t, *frame.shape[:2])
        return _paint({i + id_offset(row): mask for i, mask in masks.items()}, frame)
    video = benchmark.annotations["videos"][number]["id"]
    tracks = [track for track in benchmark.annotations["annotations"] if track["video_id"] == video]
    rles = [encode_rle(track["segmentations"][t], *frame.shape[:2]) for track in tracks]
    return _paint(dict(enumerate(rles, 1)), frame)


def _paint(masks: dict[int, np.ndarray | dict | None], frame: np.ndarray) -> np.ndarray:
    """One map of the ids of several masks (arrays or run lengths), the later ones on top: int32 (H, W)."""
    painted = np.zeros(frame.shape[:2], np.int32)
    for object_id, mask in masks.items():
        if mask is not None:
            painted[(rle_tools.decode(mask) if isinstance(mask, dict) else mask) > 0] = object_id
    return painted
