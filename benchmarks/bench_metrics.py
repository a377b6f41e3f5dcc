"""Speed of the metrics against TrackEval and vos-benchmark, on the same files.

    python benchmarks/bench_metrics.py [--frames 20] [--repeats 3] [--output metrics.json]

Every tool goes from files to numbers: folders of indexed PNGs to J and F, a JSON file of run-length masks to AP. Times
are CPU seconds of one process, the best of the repeats, so that what else runs on the machine matters little. The
scores are compared too: a fast wrong number is worth nothing. Needs `trackeval` and `vos-benchmark`.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import trackeval
from PIL import Image
from pycocotools import mask as mask_utils
from scipy.ndimage import gaussian_filter
from vos_benchmark.benchmark import VideoEvaluator

from ausm_hf.evaluation.metrics.video_ap import IOU_THRESHOLDS
from ausm_hf.evaluation.score import score_folder
from ausm_hf.evaluation.vis import score_tracks
from ausm_hf.files import WholeOrNothing


def blobs(frames: int, shape: tuple[int, int], objects: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ground truth of smooth shapes that drift, and a prediction that is a few pixels off."""
    rng = np.random.default_rng(0)
    fields = np.stack([gaussian_filter(rng.standard_normal(shape), shape[0] / 12) for _ in range(objects + 1)])
    fields /= fields.std()
    fields[0] += 1.0  # background is more than half of the image
    start = fields.argmax(0).astype(np.uint8)
    truth = [np.roll(start, (t, 2 * t), (0, 1)) for t in range(frames)]
    return [np.roll(mask, (2, -3), (0, 1)) for mask in truth], truth


def noise(frames: int, shape: tuple[int, int], objects: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The worst case: nothing but outlines."""
    rng = np.random.default_rng(0)
    draw = [rng.integers(0, objects + 1, shape, dtype=np.uint8) for _ in range(2 * frames)]
    return draw[:frames], draw[frames:]


def write_pngs(folder: Path, masks: list[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for t, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{t:05d}.png")


def tracks(frames: int, shape: tuple[int, int], objects: int, videos: int) -> tuple[list[dict], dict]:
    """Results and annotations in the YouTube-VIS format; twice as many results as objects."""
    height, width = shape
    truth = {"videos": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    results = []
    for video in range(1, videos + 1):
        names = [f"v{video:03d}/{t}.jpg" for t in range(frames)]
        truth["videos"].append({"id": video, "height": height, "width": width, "file_names": names})
        predicted, true = blobs(frames, shape, objects)
        for i in range(1, objects + 1):
            true_masks = [np.asfortranarray(mask == i) for mask in true]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "video_id": video,
                    "category_id": 1 + i % 2,
                    "iscrowd": 0,
                    "height": height,
                    "width": width,
                    "areas": [int(mask.sum()) for mask in true_masks],
                    "segmentations": [plain_rle(mask) for mask in true_masks],
                }
            )
            for off, score in ((0, 0.9), (9, 0.4)):
                masks = [np.asfortranarray(np.roll(mask == i, off, 1), dtype=np.uint8) for mask in predicted]
                rles = [mask_utils.encode(mask) for mask in masks]
                results.append(
                    {
                        "video_id": video,
                        "category_id": 1 + i % 2,
                        "score": score,
                        "segmentations": [{"size": r["size"], "counts": r["counts"].decode()} for r in rles],
                    }
                )
    return results, truth


def plain_rle(mask: np.ndarray) -> dict:
    flat = mask.ravel(order="F")
    ends = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    counts = np.diff(ends).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def best_of(repeats: int, run) -> tuple[float, object]:
    """Fewest CPU seconds of some runs, and what the run returned."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            result = run()
        times.append(time.process_time() - start)
    return min(times), result


def bench_jf(folder: Path, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds and J&F in percent of each tool. TrackEval scores all frames, and pairs ids itself."""

    def trackeval_jf() -> float:
        dataset = trackeval.datasets.DAVIS(
            {"GT_FOLDER": str(folder / "gt"), "TRACKERS_FOLDER": str(folder / "trackers"), "PRINT_CONFIG": False}
        )
        metric = trackeval.metrics.JAndF()
        data = dataset.get_preprocessed_seq_data(dataset.get_raw_seq_data("ours", "a"), "general")
        return 100 * metric.eval_sequence(data)["J&F"]

    def vos_benchmark_jf() -> float:
        _, j, f = VideoEvaluator(str(folder / "gt"), str(predicted), skip_first_and_last=False)("a")
        return float(np.mean([*j.values(), *f.values()]))

    def ours(mode: str) -> float:
        return 100 * score_folder(predicted, folder / "gt", mode=mode, skip_first=False, skip_last=False)["J&F"]

    predicted = folder / "trackers" / "ours" / "data"
    return {
        "TrackEval": best_of(repeats, trackeval_jf),
        "ours, best-track": best_of(repeats, lambda: ours("best-track")),
        "vos-benchmark": best_of(repeats, vos_benchmark_jf),
        "ours, prompted": best_of(repeats, lambda: ours("prompted")),
    }


def bench_ap(folder: Path, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds and AP in percent of each tool."""

    def trackeval_ap() -> float:
        dataset = trackeval.datasets.YouTubeVIS(
            {
                "GT_FOLDER": f"{folder}/gt/",
                "TRACKERS_FOLDER": f"{folder}/trackers/",
                "SPLIT_TO_EVAL": "val",
                "PRINT_CONFIG": False,
            }
        )
        dataset.global_tid_counter = 1  # TrackEval takes a match with track 0 for none
        metric = trackeval.metrics.TrackMAP(
            {
                "USE_AREA_RANGES": False,
                "USE_TIME_RANGES": False,
                "IOU_THRESHOLDS": IOU_THRESHOLDS,
                "MAX_DETECTIONS": 100,
                "PRINT_CONFIG": False,
            }
        )
        raw = {video: dataset.get_raw_seq_data("ours", video) for video in dataset.seq_list}
        ap = []
        for name in dataset.class_list:
            data = {video: dataset.get_preprocessed_seq_data(raw[video], name) for video in raw}
            matched = {video: metric.eval_sequence(data[video]) for video in raw}
            ap.append(metric.combine_sequences(matched)["AP_all"].mean())
        return 100 * float(np.mean(ap))

    results = folder / "trackers" / "youtube_vis_val" / "ours" / "data" / "results.json"
    annotations = folder / "gt" / "youtube_vis_val" / "gt.json"
    return {
        "TrackEval": best_of(repeats, trackeval_ap),
        "ours": best_of(repeats, lambda: 100 * score_tracks(results, annotations)["AP"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("metrics.json"))
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cases = {
            "J&F, 854 x 480, 1 object": (blobs, (480, 854), 1),
            "J&F, 854 x 480, 3 objects": (blobs, (480, 854), 3),
            "J&F, 854 x 480, 10 objects": (blobs, (480, 854), 10),
            "J&F, 1920 x 1080, 3 objects": (blobs, (1080, 1920), 3),
            "J&F, 854 x 480, noise": (noise, (480, 854), 3),
        }
        for index, (name, (make, shape, objects)) in enumerate(cases.items()):
            folder = Path(temporary) / str(index)
            predicted, truth = make(args.frames, shape, objects)
            write_pngs(folder / "trackers" / "ours" / "data" / "a", predicted)
            write_pngs(folder / "gt" / "a", truth)
            rows += [(name, tool, *measured) for tool, measured in bench_jf(folder, args.repeats).items()]

        folder = Path(temporary) / "vis"
        results, truth = tracks(args.frames, (720, 1280), objects=4, videos=4)
        for path, content in (("gt/youtube_vis_val", truth), ("trackers/youtube_vis_val/ours/data", results)):
            (folder / path).mkdir(parents=True)
            (folder / path / ("gt.json" if content is truth else "results.json")).write_text(
                json.dumps(content), encoding="utf-8"
            )
        rows += [
            ("AP, 1280 x 720, 4 videos", tool, *measured) for tool, measured in bench_ap(folder, args.repeats).items()
        ]

    print(f"{'input':<30}{'tool':<20}{'CPU ms / frame':>15}{'score':>12}")
    for name, tool, seconds, score in rows:
        frames = args.frames * (4 if name.startswith("AP") else 1)
        print(f"{name:<30}{tool:<20}{1000 * seconds / frames:>15.2f}{score:>12.6f}")
    content = [dict(zip(("input", "tool", "cpu_seconds", "score"), row)) for row in rows]
    with WholeOrNothing(args.output) as file:
        file.partial.write_text(
            json.dumps({"frames": args.frames, "rows": content}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
