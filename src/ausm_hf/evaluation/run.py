"""From a data set on disk to the numbers that the official tools of its benchmark print: `ausm evaluate`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..files import remove_unfinished, visible, write_text
from ..segment import fingerprint, load_model
from .benchmarks import PROTOCOLS, Benchmark, load_benchmark
from .report import write_report
from .runner import Inference, frame_name, has_mask_folders, write_masks, write_tracks
from .submission import write_submission, write_track_list


def evaluate(
    benchmark: str,
    root: str | os.PathLike,
    split: str = "val",
    mode: str | None = None,
    model: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    passes: int = 1,
    traversal: bool = False,
    top_k: int | None = None,
    threshold: float | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> dict | None:
    """
    Runs a model on a benchmark, scores it as its official tools do and writes everything down.

    Into `output` go, beside `settings.json`:
    - `masks/<video>/<frame>.png` (SA-V: `masks/<video>/<object>/<frame>.png`), or `tracks/<video>.json` and all of
      them in `tracks.json` as YouTube-VIS or COCO take them;
    - `results.json`: what is returned; where only a part of the videos has ground truth, the scores are of that part,
      and `not_scored` names the others;
    - `contact_sheet.png`: the best and the worst videos; `j_over_time.png` for masks (AP is a
      figure of whole tracks and has no value per frame);
    - `submission.zip`, where the ground truth of videos is not published and a server scores.

    Several processes started by `torchrun` share the videos; the results are the same.

    Args:
        benchmark, root, split, mode: See [`load_benchmark`].
        model, device, dtype: See [`~ausm_hf.segment.load_model`].
        output: Folder to write into; `ausm-evaluation/<benchmark>-<split>-<mode>` by default.
        passes: 1 to 3: play each video (or image) forward, backward and forward again, and keep the last predictions.
        traversal: For images: play the image, four views of 90% of it, and the image again.
        top_k: How many objects of a frame are reported, the best ones; by default as many as in the paper.
        threshold: Foreground probability above which something is an object; the model's own by default.
        seed: Of the draws of ID vectors: how far figures move with it is what chance is worth in them.
        resume: Go on in an `output` that an interrupted run with the same settings left. Only videos that were
            finished are taken over.

    Returns:
        `{"settings": dict, "scores": dict, ...}` as in `results.json`; `None` in all processes but the first.

    Raises:
        ValueError: before anything is computed, for arguments or data that can't be; at the end, one report of all
            videos that failed, the others being finished.
    """
    inference = _check_arguments(benchmark, passes, traversal, top_k, threshold, seed)
    found = load_benchmark(benchmark, root, split, mode)
    inference = replace(inference, mode=found.mode, label_set=found.label_set)
    if found.mode == "prompted" and (top_k is not None or threshold is not None):
        raise ValueError("top_k and threshold are for finding objects; prompted objects are all reported")
    output = Path(output or f"ausm-evaluation/{benchmark}-{split}-{found.mode}")
    with _processes() as (rank, world_size), ExitStack() as held:
        network, processor = load_model(model, device, dtype)
        if found.label_set is not None and found.label_set not in network.config.label_sets:
            raise ValueError(
                f"model has no classes of {found.label_set!r}, which {benchmark} asks for; it has those of "
                f"{', '.join(network.config.label_sets)}. Wanted is one trained with these labels "
                f"(`model.label_sets: {{{found.label_set}: }}` in a recipe)"
            )
        settings = {
            "benchmark": benchmark,
            "split": split,
            "model": str(model or "ausm-nano"),
            "weights": fingerprint(network, processor),
            "dtype": str(network.dtype).removeprefix("torch."),
            "size": dict(processor.image_processor.size),
            "videos": len(found.rows),
            **asdict(inference),
            "threshold": network.config.foreground_threshold if threshold is None else threshold,
        }
        todo = _in_first_process(lambda: _claim(output, settings, found, resume, held), rank, world_size)

        failed = []
        mine = _deal([row for row in found.rows if row["video_id"] in todo], world_size)[rank]
        frames = sum(len(row["frames"]) for row in mine)
        with tqdm(total=frames, unit="frame", desc=benchmark, disable=rank > 0) as progress:
            for row in mine:
                try:
                    if found.annotations is not None:
                        write_tracks(found.place(output, row), row, network, processor, inference)
                    else:
                        number = PROTOCOLS[benchmark].max_tracks if found.mode == "unprompted" else None
                        write_masks(found.place(output, row), row, network, processor, inference, number)
                except (ValueError, OSError, torch.OutOfMemoryError) as error:
                    failed.append(f"{row['video_id']}: {error}")
                progress.update(len(row["frames"]))
        failed = _gather(failed, world_size)
    if rank > 0:
        return None
    if failed:
        listed = "\n".join(f"- {problem}" for problem in failed)
        raise ValueError(f"{len(failed)} of {len(found.rows)} videos failed, so no score:\n{listed}")

    if found.annotations is not None:
        write_track_list(output, found)
    results = {"settings": settings, **write_report(output, found)}
    if not results["scores"] or results["not_scored"]:
        write_submission(output, found)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def _check_arguments(
    benchmark: str, passes: int, traversal: bool, top_k: int | None, threshold: float | None, seed: int
) -> Inference:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('matplotlib is not installed; wanted is: pip install "ausm-hf[eval]"')
    if benchmark not in PROTOCOLS:
        raise ValueError(f"benchmark is {benchmark!r}; wanted is one of {', '.join(PROTOCOLS)}")
    if passes not in (1, 2, 3):
        raise ValueError(f"passes is {passes}; wanted is 1, 2 or 3")
    if traversal and (benchmark != "coco" or passes != 1):
        raise ValueError("traversal is for single images (coco), and is not combined with passes")
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"top_k is {top_k!r}; wanted is a number of at least 1")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; wanted is 0 to 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; wanted is 0 to {2**32 - 1}")
    top_k = PROTOCOLS[benchmark].top_k if top_k is None else top_k
    return Inference(threshold=threshold, top_k=top_k, passes=passes, traversal=traversal, seed=seed)


def _frames_digest(row: dict) -> str:
    """What tells a video from one that differs, wherever it lies: names and sizes of the files of its frames."""
    paths = [Path(stored["path"]) for stored in row["frames"]]
    named = json.dumps([(path.name, path.stat().st_size) for path in paths])
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _claim(output: Path, settings: dict, benchmark: Benchmark, resume: bool, held: ExitStack) -> set[str]:
    """Makes the output folder ready, and keeps other runs out until `held` ends. Returns the videos yet to be done."""
    noted = output / "settings.json"
    todo = {row["video_id"] for row in benchmark.rows if not _is_done(benchmark, output, row)}
    videos = {row["video_id"]: _frames_digest(row) for row in benchmark.rows}
    if noted.is_file():
        earlier = json.loads(noted.read_bytes())
        other = [key for key in settings if key != "model" and earlier.get(key) != settings[key]]
        if not resume:
            raise ValueError(f"output {str(output)!r} holds an earlier run; wanted is --resume or another folder")
        if other:
            changes = ", ".join(f"{key} {earlier.get(key)!r} -> {settings[key]!r}" for key in other)
            raise ValueError(f"output {str(output)!r} holds a run with other settings: {changes}")
        before = earlier.get("frames", videos)
        if other := sorted(name for name in videos.keys() - todo if videos[name] != before.get(name)):
            raise ValueError(
                f"output {str(output)!r} holds predictions for {len(other)} videos whose frames were others, such as "
                f"{other[0]}; wanted is another folder"
            )
    elif output.exists() and (not output.is_dir() or visible(output)):
        raise ValueError(f"output {str(output)!r} exists and holds no run; wanted is a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(output / ".lock", timeout=0))
    except Timeout:
        raise ValueError(f"output {str(output)!r} is being written by another run; wanted is another folder") from None
    except (OSError, NotImplementedError) as error:  # the latter of older versions, where locks are not known at all
        warnings.warn(f"{output} can't be locked ({error}): let no other run write into it", stacklevel=2)
    folder = benchmark.place(output, benchmark.rows[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    write_text(noted, json.dumps({**settings, "frames": videos}, indent=2) + "\n")
    return todo


def _is_done(benchmark: Benchmark, output: Path, row: dict) -> bool:
    """Whether the predictions for a video are there, for each of its frames."""
    place = benchmark.place(output, row)
    if benchmark.annotations is not None:
        return place.exists()
    folders = [place / f"{obj['id']:03d}" for obj in row["objects"]] if has_mask_folders(row) else [place]
    names = {frame_name(row, t) for t in range(len(row["frames"]))}
    return all(names <= {path.stem for path in folder.glob("*.png")} for folder in folders)


def _deal(rows: list[dict], world_size: int) -> list[list[dict]]:
    """Shares videos among processes: the longest first, each to who has the fewest frames yet."""
    shares: list[list[dict]] = [[] for _ in range(world_size)]
    frames = [0] * world_size
    for row in sorted(rows, key=lambda row: -len(row["frames"])):
        rank = frames.index(min(frames))
        shares[rank].append(row)
        frames[rank] += len(row["frames"])
    return shares


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Number of this process and how many there are: what `torchrun` says, or the only one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield 0, 1
        return
    # The quickest process waits at the end for the slowest.
    dist.init_process_group("gloo", timeout=timedelta(days=14))
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def _in_first_process(function: Callable, rank: int, world_size: int):
    """Calls a function in the first process; what it returns, or its ValueError, is that of all of them."""
    answer: list = [None, None]
    if rank == 0:
        try:
            answer = [function(), None]
        except (ValueError, OSError) as error:
            answer = [None, str(error)]
    if world_size > 1:
        dist.broadcast_object_list(answer)
    result, problem = answer
    if problem is not None:
        raise ValueError(problem)
    return result


def _gather(items: list, world_size: int) -> list:
    """The items of all processes. Waits for all of them."""
    if world_size == 1:
        return items
    parts: list = [None] * world_size
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


__all__ = ["evaluate"]
