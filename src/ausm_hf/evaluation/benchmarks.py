"""The benchmarks of the field, from a data set on disk to the numbers its official tools print: `ausm evaluate`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..segment import load_model
from .runner import Inference, whole_file, write_masks, write_tracks


@dataclass
class Benchmark:
    """
    A split of a data set, and how it is run and scored.

    Attributes:
        name, split, mode (`str`): As they were asked for.
        rows (`list[dict]`): The videos, in the clip format. `video_id` names what is written.
        annotations (`dict`, *optional*): For those that ask for tracks with classes: the JSON of YouTube-VIS, without
            `annotations` where they aren't published. `None` for those that ask for masks.
        label_set (`str`, *optional*): Label set of the classes.
        seen (`dict[str, dict[int, bool]]`, *optional*): Of YouTube-VOS, video -> object -> is its category one of the
            training set's? `None` if there is no training set to tell.
    """

    name: str
    split: str
    mode: str
    rows: list[dict]
    annotations: dict | None = None
    label_set: str | None = None
    seen: dict[str, dict[int, bool]] | None = None

    def place(self, output: Path, row: dict) -> Path:
        """Where the predictions for a video go. They appear there complete."""
        if self.annotations is None:
            return output / "masks" / row["video_id"]
        return output / "tracks" / f"{row['video_id']}.json"


@dataclass(frozen=True)
class Protocol:
    """
    What is agreed upon for a benchmark.

    Attributes:
        modes: Which modes it has; the first one is the default.
        index: `(root, split, mode)` -> rows, or rows and annotations.
        splits: What the data set calls the splits of others.
        label_set: See [`Benchmark`].
        top_k: How many objects per frame are reported: the paper's numbers.
        max_tracks: How many objects per video may be reported, without prompts.
        scorers: For masks: mode -> name of a measure -> how [`~ausm_hf.evaluation.metrics.jf.SequenceScorer`] is made
            and asked.
    """

    modes: tuple[str, ...]
    index: Callable[[str, str, str], Iterable[dict] | tuple[Iterable[dict], dict]]
    splits: dict[str, str] = field(default_factory=dict)
    label_set: str | None = None
    top_k: int | None = None
    max_tracks: int | None = None
    scorers: dict[str, dict[str, dict]] = field(default_factory=dict)


def _davis(year: int) -> Callable:
    def index(root: str, split: str, mode: str) -> Iterable[dict]:
        from ..data.davis import davis

        folder = "Annotations_unsupervised" if year == 2017 and mode == "unprompted" else "Annotations"
        if not (Path(root) / folder).is_dir():
            folder = "Annotations"
        return davis(root, year, split, annotations=folder)

    return index


def _youtube_vos(root: str, split: str, mode: str) -> Iterable[dict]:
    from ..data.youtube_vos import youtube_vos

    return youtube_vos(root, split)


def _mose(root: str, split: str, mode: str) -> Iterable[dict]:
    from ..data.mose import mose

    return mose(root, split)


def _sa_v(root: str, split: str, mode: str) -> Iterable[dict]:
    from ..data.sa_v import sa_v

    if split == "train":
        raise ValueError("split is 'train'; wanted is one of SA-V that is scored, 'val' or 'test'")
    return sa_v(root, split)


def _youtube_vis(year: int) -> Callable:
    def index(root: str, split: str, mode: str) -> tuple[Iterable[dict], dict]:
        from ..data.youtube_vis import youtube_vis_files

        return _video_instances(*youtube_vis_files(root, split), f"youtube_vis_{year}")

    return index


def _ovis(root: str, split: str, mode: str) -> tuple[Iterable[dict], dict]:
    from ..data.mask_folders import need

    annotations = need(Path(root) / f"annotations_{split}.json", f"split {split!r} of OVIS")
    return _video_instances(Path(root) / split, annotations, "ovis")


def _video_instances(images: Path, source: Path, label_set: str) -> tuple[Iterable[dict], dict]:
    """Rows of the videos of a YouTube-VIS JSON, and its content."""
    from ..data.clips import clip_row, file
    from ..data.vis_json import category_names

    content = json.loads(source.read_text())
    category_names(content["categories"], label_set, source)
    rows = [
        clip_row(str(video["id"]), [file(images / name) for name in video["file_names"]], [])
        for video in content["videos"]
    ]
    return rows, content


def _coco(root: str, split: str, mode: str) -> tuple[Iterable[dict], dict]:
    """Images as videos of one frame; all images of the JSON, those without objects too."""
    from ..data.clips import clip_row, file
    from ..data.mask_folders import need
    from ..data.vis_json import category_names

    folder = Path(root) / "annotations"
    source = folder / f"image_info_{split}.json"  # of test sets
    if not source.is_file():
        source = need(folder / f"instances_{split}.json", f"split {split!r} of COCO")
    content = json.loads(source.read_text())
    category_names(content["categories"], "coco", source)
    images = Path(root) / split.replace("test-dev", "test")
    rows = [clip_row(str(image["id"]), [file(images / image["file_name"])], []) for image in content["images"]]
    annotations = {
        "videos": [
            {"id": image["id"], "height": image["height"], "width": image["width"], "length": 1}
            for image in content["images"]
        ],
        "categories": content["categories"],
        "annotations": [
            {
                "id": item["id"],
                "video_id": item["image_id"],
                "category_id": item["category_id"],
                "iscrowd": item["iscrowd"],
                "segmentations": [item["segmentation"]],
            }
            for item in content.get("annotations", [])
        ],
    }
    return rows, annotations


_SKIP_ENDS = {"skip_first": True, "skip_last": True, "count_from": "start"}
_ALL_FRAMES = {"skip_first": False, "skip_last": False, "count_from": "start"}
_YOUTUBE_VOS = Protocol(
    modes=("prompted",),
    index=_youtube_vos,
    splits={"val": "valid"},
    scorers={"prompted": {"J&F": {**_ALL_FRAMES, "mode": "prompted", "count_from": "first_annotated"}}},
)
PROTOCOLS = {
    "davis2016": Protocol(
        modes=("prompted", "unprompted"),
        index=_davis(2016),
        scorers={
            "prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted", "binary": True}},
            # What is found may be one object or a group that together make the one of DAVIS 2016.
            "unprompted": {
                "best track": {**_SKIP_ENDS, "mode": "best-track", "binary": True},
                "union": {**_SKIP_ENDS, "mode": "union", "binary": True},
            },
        },
    ),
    "davis2017": Protocol(
        modes=("prompted", "unprompted"),
        index=_davis(2017),
        max_tracks=20,  # more are refused by the official tool
        scorers={
            "prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted"}},
            "unprompted": {"best track": {**_ALL_FRAMES, "mode": "best-track"}},
        },
    ),
    "youtube_vos_2018": _YOUTUBE_VOS,
    "youtube_vos_2019": _YOUTUBE_VOS,
    "mose": Protocol(
        modes=("prompted",),
        index=_mose,
        splits={"val": "valid"},
        scorers={"prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted", "count_from": "first_seen"}}},
    ),
    "sa_v": Protocol(
        modes=("prompted",),
        index=_sa_v,
        scorers={"prompted": {"J&F": {**_SKIP_ENDS, "mode": "prompted", "count_from": "first_seen", "binary": True}}},
    ),
    "youtube_vis_2019": Protocol(
        ("unprompted",), _youtube_vis(2019), {"val": "valid"}, label_set="youtube_vis_2019", top_k=10
    ),
    "youtube_vis_2021": Protocol(
        ("unprompted",), _youtube_vis(2021), {"val": "valid"}, label_set="youtube_vis_2021", top_k=10
    ),
    "ovis": Protocol(("unprompted",), _ovis, {"val": "valid"}, label_set="ovis", top_k=20),
    "coco": Protocol(("unprompted",), _coco, {"val": "val2017", "train": "train2017"}, label_set="coco", top_k=100),
}


def load_benchmark(name: str, root: str | os.PathLike, split: str = "val", mode: str | None = None) -> Benchmark:
    """
    Finds the videos of a benchmark and checks that all of their files are there.

    Args:
        name: One of `PROTOCOLS`.
        root: Folder of the data set in its official layout, see [`ausm_hf.data`].
        split: `"val"` is also what others call `"valid"` or `"val2017"`.
        mode: `"prompted"` or `"unprompted"`; the benchmark's usual one by default.

    Returns:
        [`Benchmark`]

    Raises:
        ValueError: if there is no such benchmark, mode or split; one report of all files that are missing or empty.
    """
    from ..data.check import check_clips

    if name not in PROTOCOLS:
        raise ValueError(f"benchmark is {name!r}; wanted is one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    mode = protocol.modes[0] if mode is None else mode
    if mode not in protocol.modes:
        raise ValueError(f"mode is {mode!r}; for {name} wanted is {' or '.join(protocol.modes)}")
    indexed = protocol.index(str(root), protocol.splits.get(split, split), mode)
    rows, annotations = indexed if isinstance(indexed, tuple) else (indexed, None)
    rows = list(rows)
    if not rows:
        raise ValueError(f"split {split!r} of {name} has no videos in {root}")
    check_clips(rows, name=f"{name} {split}")
    seen = _seen_objects(rows, Path(root)) if protocol is _YOUTUBE_VOS else None
    return Benchmark(name, split, mode, rows, annotations, protocol.label_set, seen)


def _seen_objects(rows: list[dict], root: Path) -> dict[str, dict[int, bool]] | None:
    training = root / "train" / "meta.json"
    if not training.is_file():
        return None
    videos = json.loads(training.read_text())["videos"].values()
    categories = {item.get("category") for video in videos for item in video["objects"].values()}
    return {row["video_id"]: {item["id"]: item["label"] in categories for item in row["objects"]} for row in rows}


def evaluate(
    benchmark: str,
    root: str | os.PathLike,
    split: str = "val",
    mode: str | None = None,
    model: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    passes: int = 1,
    traversal: bool = False,
    top_k: int | str = "auto",
    threshold: float | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> dict | None:
    """
    Runs a model on a benchmark with the paper's settings, scores it and writes everything down.

    Into `output` go, beside `settings.json`:
    - `masks/<video>/<frame>.png` (SA-V: `masks/<video>/<object>/<frame>.png`), or `tracks/<video>.json` and all of
      them in `tracks.json` as YouTube-VIS or COCO take them;
    - `results.json`: what is returned;
    - `contact_sheet.png`: the best and the worst videos; `j_over_time.png` for masks;
    - `submission.zip` in place of scores, where the ground truth is not published and a server scores.

    Several processes started by `torchrun` share the videos; the results are the same.

    Args:
        benchmark, root, split, mode: See [`load_benchmark`].
        model, device, dtype: See [`~ausm_hf.segment.load_model`].
        output: Folder to write into; `ausm-evaluation/<benchmark>-<split>-<mode>` by default.
        passes: 1 to 3: play each video (or image) forward, backward and forward again, and keep the last predictions.
        traversal: For images: play the image, four views of 90% of it, and the image again.
        top_k: How many objects of a frame are reported, the best ones; `"auto"` is what the paper does.
        threshold: Foreground probability above which something is an object; the model's own by default.
        resume: Go on in an `output` that an interrupted run with the same settings left. Only videos that were
            finished are taken over.

    Returns:
        `{"settings": dict, "scores": dict, ...}` as in `results.json`; `None` in all processes but the first.

    Raises:
        ValueError: before anything is computed, for arguments or data that can't be; at the end, one report of all
            videos that failed, the others being finished.
    """
    from .report import write_report
    from .submission import write_submission, write_track_list

    inference = _check_arguments(benchmark, passes, traversal, top_k, threshold)
    found = load_benchmark(benchmark, root, split, mode)
    inference = replace(inference, mode=found.mode, label_set=found.label_set)
    if found.mode == "prompted" and (top_k != "auto" or threshold is not None):
        raise ValueError("top_k and threshold are for finding objects; prompted objects are all reported")
    output = Path(output or f"ausm-evaluation/{benchmark}-{split}-{found.mode}")
    with _processes() as (rank, world_size):
        if device == "auto" and world_size > 1 and torch.accelerator.is_available():
            device = f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', rank)}"
        network, processor = load_model(model, device, dtype)
        if found.label_set is not None and found.label_set not in network.config.label_sets:
            raise ValueError(
                f"model has no classes of {found.label_set!r}, which {benchmark} asks for; it has those of "
                f"{', '.join(network.config.label_sets)}"
            )
        settings = {
            "benchmark": benchmark,
            "split": split,
            "model": str(model or "ausm-nano"),
            "weights": _fingerprint(network),
            "dtype": str(network.dtype).removeprefix("torch."),
            "size": dict(processor.image_processor.size),
            "videos": len(found.rows),
            **asdict(inference),
            "threshold": network.config.foreground_threshold if threshold is None else threshold,
        }
        todo = _in_first_process(lambda: _claim(output, settings, found, resume), rank, world_size)

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
                except (ValueError, OSError) as error:
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
    if not results["scores"]:
        write_submission(output, found)
    with whole_file(output / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _check_arguments(
    benchmark: str, passes: int, traversal: bool, top_k: int | str, threshold: float | None
) -> Inference:
    missing = [name for name in ("datasets", "evaluate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; wanted is: pip install 'ausm-hf[eval]'")
    if benchmark not in PROTOCOLS:
        raise ValueError(f"benchmark is {benchmark!r}; wanted is one of {', '.join(PROTOCOLS)}")
    if passes not in (1, 2, 3):
        raise ValueError(f"passes is {passes}; wanted is 1, 2 or 3")
    if traversal and (benchmark != "coco" or passes != 1):
        raise ValueError("traversal is for single images (coco), and is not combined with passes")
    if top_k != "auto" and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}; wanted is 'auto' or a number of at least 1")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; wanted is 0 to 1")
    number = PROTOCOLS[benchmark].top_k if top_k == "auto" else top_k
    return Inference(threshold=threshold, top_k=number, passes=passes, traversal=traversal)


def _fingerprint(model: torch.nn.Module) -> str:
    """What tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _claim(output: Path, settings: dict, benchmark: Benchmark, resume: bool) -> set[str]:
    """Makes the output folder ready. Returns the videos that are yet to be done."""
    noted = output / "settings.json"
    if noted.is_file():
        earlier = json.loads(noted.read_text())
        other = [key for key in settings if key != "model" and earlier.get(key) != settings[key]]
        if not resume:
            raise ValueError(f"output {str(output)!r} holds an earlier run; wanted is --resume or another folder")
        if other:
            changes = ", ".join(f"{key} {earlier.get(key)!r} -> {settings[key]!r}" for key in other)
            raise ValueError(f"output {str(output)!r} holds a run with other settings: {changes}")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {str(output)!r} exists and holds no run; wanted is a new or empty folder")
    folder = benchmark.place(output, benchmark.rows[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.partial-*"):  # see `WholeOrNothing`; a run that was killed leaves some
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    with whole_file(noted) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")
    return {row["video_id"] for row in benchmark.rows if not benchmark.place(output, row).exists()}


def _deal(rows: list[dict], world_size: int) -> list[list[dict]]:
    """Shares videos among processes: the longest first, each to who has the fewest frames yet."""
    shares, frames = [[] for _ in range(world_size)], [0] * world_size
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
    answer = [None, None]
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
    parts = [None] * world_size
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


__all__ = ["PROTOCOLS", "Benchmark", "Protocol", "evaluate", "load_benchmark"]
