"""Does the model lose what it follows on streams much longer than those it was trained on?

    python benchmarks/long_streams.py --root DAVIS [--split dev] [--model ID_OR_PATH] [--output DIR] [--processes 2]

Two studies on DAVIS 2016, whose sequences have one object each:

- **There and back again.** A clip is played forward and backward until it is 10 times its length, with the object
  given in the first frame. J of each frame tells whether quality falls with time, since the pictures repeat.
- **The needle.** An object is cut out of its clip and shown for 10 frames in front of another clip; then it is away
  for n frames, and then comes back for 10. Given in the first frame, or found by the model itself: does it have its id
  again? With the id it had (kept), with another (new id), or not at all (lost), at an IoU of at least 0.5 in the last
  frame. Objects that were not found before they left don't count. Also noted is in what part of the frames without the
  object its id still claimed pixels.

Writes `long_streams.json`, `there_and_back.png`, `needle.png` and `tables.md`.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ausm_hf.data.clips import load_frames, load_masks
from ausm_hf.data.davis import davis
from ausm_hf.evaluation.metrics.jf import region_similarity
from ausm_hf.files import WholeOrNothing
from ausm_hf.model.pipeline_ausm import start_session
from ausm_hf.segment import load_model, segment_video

SHOWN = 10  # frames of the needle before it leaves, and after it is back
FOUND = 0.5  # least IoU
OUTCOMES = ("kept", "new id", "lost")
STUDIES = ("there and back", "prompted", "unprompted")  # the needle, in two modes


def there_and_back(length: int, k: int) -> int:
    """The frame that is shown as number `k` when a clip is played 0, 1, ..., length - 1, ..., 1, 0, 1, ..."""
    k %= max(2 * length - 2, 1)
    return min(k, 2 * length - 2 - k)


class Frames:
    """Frames that are made when their turn comes."""

    def __init__(self, make, number: int):
        self.make, self.number = make, number

    def __len__(self):
        return self.number

    def __iter__(self):
        return (self.make(k) for k in range(self.number))


def picture_and_mask(row: dict, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame `t`, and where the object is in it: uint8 (H, W, 3) and bool (H, W)."""
    frame = load_frames(row, [t])[0]
    masks, _ = load_masks(row, t, *frame.shape[:2])
    return frame, masks.get(1, np.zeros(frame.shape[:2], bool))


def run_there_and_back(row: dict, model, processor, times: int) -> list[float]:
    """J of each frame of the long stream; the first one is the prompt."""
    length = len(row["frames"])
    first = picture_and_mask(row, 0)[1].astype(np.uint8)
    frames = Frames(lambda k: picture_and_mask(row, there_and_back(length, k))[0], times * length)
    scores = []
    for result in segment_video(frames, model, processor, first):
        truth = picture_and_mask(row, there_and_back(length, result.index))[1]
        scores.append(region_similarity(result.masks == 1, truth))
    return scores


def needle_frame(row: dict, other: dict, k: int, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame `k` of a needle's stream, and where the needle is: uint8 (H, W, 3) and bool (H, W)."""
    # The needle's own clip stands still while it is away.
    frame, needle = picture_and_mask(row, there_and_back(len(row["frames"]), k if k < SHOWN else max(k - gap, SHOWN)))
    if SHOWN <= k < SHOWN + gap:
        needle = np.zeros_like(needle)
    background = picture_and_mask(other, there_and_back(len(other["frames"]), k))[0]
    if background.shape != frame.shape:
        background = np.array(Image.fromarray(background).resize(frame.shape[1::-1], Image.Resampling.BILINEAR))
    return np.where(needle[:, :, None], frame, background), needle


def id_at(masks: np.ndarray, needle: np.ndarray) -> int | None:
    """The id that covers the needle best, if its IoU is high enough."""
    ids = [object_id for object_id in np.unique(masks[needle]).tolist() if object_id]
    scores = {object_id: region_similarity(masks == object_id, needle) for object_id in ids}
    best = max(scores, key=scores.get, default=None)
    return best if best is not None and scores[best] >= FOUND else None


def run_needles(row: dict, other: dict, model, processor, gaps: list[int], prompted: bool) -> list[dict]:
    """
    The needle of a clip, away for each number of frames in `gaps`.

    The stream is played once, until the longest gap is over; at the end of each gap a copy of it goes on with the
    needle back again.

    Returns:
        For each gap `{"gap": int, "outcome": one of OUTCOMES, or None where it wasn't found at first, "claimed": part
        of the frames}`.
    """
    first, mask = needle_frame(row, other, 0, 0)
    session = start_session(processor, first.shape[:2], mask.astype(np.uint8) if prompted else None)
    longest = max(gaps)
    frames = Frames(lambda k: needle_frame(row, other, k, longest)[0], SHOWN + longest)
    needles, claimed, before = [], 0, None
    for result in segment_video(frames, model, processor, session=session):
        if result.index < SHOWN - 1:
            continue
        if result.index == SHOWN - 1:
            before = id_at(result.masks, needle_frame(row, other, result.index, longest)[1])
            if before is None:
                return [{"gap": gap, "outcome": None, "claimed": 0.0} for gap in gaps]
            continue
        claimed += bool((result.masks == before).any())
        gap = result.index - SHOWN + 1
        if gap in gaps:
            back = Frames(lambda k, gap=gap: needle_frame(row, other, SHOWN + gap + k, gap)[0], SHOWN)
            *_, last = segment_video(back, model, processor, session=copy.deepcopy(session))
            after = id_at(last.masks, needle_frame(row, other, 2 * SHOWN + gap - 1, gap)[1])
            outcome = "lost" if after is None else "kept" if after == before else "new id"
            needles.append({"gap": gap, "outcome": outcome, "claimed": claimed / gap})
    return needles


loaded_model = functools.cache(load_model)


class Work:
    """Plays the stream of a task (clip, other clip, study); the model is loaded once per process."""

    def __init__(self, model: str | None, times: int, gaps: list[int]):
        self.model, self.times, self.gaps = model, times, gaps

    def __call__(self, task: tuple[dict, dict, str]) -> list:
        row, other, study = task
        model, processor = loaded_model(self.model)
        if study == STUDIES[0]:
            return run_there_and_back(row, model, processor, self.times)
        return run_needles(row, other, model, processor, self.gaps, prompted=study == "prompted")


def summarize_there_and_back(scores: dict[str, list[float]], times: int) -> list[float]:
    """Mean J over the sequences in each of the `times` turns, without the prompt."""
    turns = []
    for turn in range(times):
        parts = [np.array_split(np.array(j), times)[turn] for j in scores.values()]
        turns.append(float(np.mean([part[1:].mean() if turn == 0 else part.mean() for part in parts])))
    return turns


def summarize_needles(needles: list[dict], gaps: list[int]) -> list[dict]:
    """Per mode and gap, how many objects were kept, renamed and lost, of how many that had been found."""
    rows = []
    for mode in ("prompted", "unprompted"):
        for gap in gaps:
            mine = [item for item in needles if item["mode"] == mode and item["gap"] == gap]
            counted = [item for item in mine if item["outcome"] is not None]
            row = {"mode": mode, "gap": gap, "needles": len(mine), "found": len(counted)}
            row |= {name: sum(item["outcome"] == name for item in counted) for name in OUTCOMES}
            row["claimed"] = float(np.mean([item["claimed"] for item in counted])) if counted else None
            rows.append(row)
    return rows


def tables(turns: list[float], needles: list[dict]) -> str:
    """Both studies as Markdown."""
    lines = ["| turn | " + " | ".join(str(n) for n in range(1, len(turns) + 1)) + " |"]
    lines += ["| --- " * (len(turns) + 1) + "|", "| J | " + " | ".join(f"{100 * j:.1f}" for j in turns) + " |", ""]
    lines += ["| mode | frames away | needles | found | kept | new id | lost | pixels claimed while away |"]
    lines += ["| --- " * 8 + "|"]
    for row in needles:
        claimed = "" if row["claimed"] is None else f"{100 * row['claimed']:.0f}% of frames"
        cells = [row["mode"], row["gap"], row["needles"], row["found"], *(row[name] for name in OUTCOMES), claimed]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def draw(output: Path, scores: dict[str, list[float]], needles: list[dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, j in scores.items():
        axes.plot(range(1, len(j)), j[1:], linewidth=0.8, label=name if len(scores) <= 10 else None)
    axes.set(xlabel="frame of the stream", ylabel="J", ylim=(0, 1), title="Played forward and backward")
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(output / "there_and_back.png", dpi=120)

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for mode, style in (("prompted", "o-"), ("unprompted", "s--")):
        rows = [row for row in needles if row["mode"] == mode and row["found"]]
        axes.plot([r["gap"] for r in rows], [r["kept"] / r["found"] for r in rows], style, label=mode)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="frames away", ylabel="share that keeps its id", ylim=(-0.02, 1.02), title="The needle")
    axes.legend(fontsize="small")
    figure.savefig(output / "needle.png", dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="DAVIS, with ImageSets/2016")
    parser.add_argument("--split", default="val")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--output", type=Path, default=Path("long-streams"))
    parser.add_argument("--times", type=int, default=10, help="length of the long stream, in lengths of the clip")
    parser.add_argument("--longest-gap", type=int, default=256, help="gaps are 1, 2, 4, ... up to this")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="streams played at the same time")
    args = parser.parse_args(arguments)

    rows = list(davis(args.root, 2016, args.split))
    if len(rows) < 2:
        parser.error(f"split {args.split!r} has {len(rows)} sequences; the needle needs at least 2")
    gaps = [2**n for n in range(args.longest_gap.bit_length())]
    others = [*rows[1:], rows[0]]
    tasks = [(row, other, study) for study in STUDIES for row, other in zip(rows, others)]
    work = Work(args.model, args.times, gaps)
    if args.processes == 1:
        done = [work(task) for task in tqdm(tasks, "streams")]
    else:
        # Frames follow one another: a second core is of more use to a second stream than to the same one.
        with multiprocessing.get_context("spawn").Pool(args.processes, torch.set_num_threads, (1,)) as pool:
            done = list(tqdm(pool.imap(work, tasks), "streams", len(tasks)))
    scores, needles = {}, []
    for (row, _, study), result in zip(tasks, done):
        if study == STUDIES[0]:
            scores[row["video_id"]] = result
        else:
            needles += [{"sequence": row["video_id"], "mode": study, **needle} for needle in result]

    turns, summary = summarize_there_and_back(scores, args.times), summarize_needles(needles, gaps)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output, scores, summary)
    (args.output / "tables.md").write_text(tables(turns, summary), encoding="utf-8")
    rounded = {name: np.round(j, 4).tolist() for name, j in scores.items()}
    content = {"times": args.times, "turns": turns, "j": rounded, "needle": summary, "needles": needles}
    with WholeOrNothing(args.output / "long_streams.json") as file:
        file.partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(tables(turns, summary))


if __name__ == "__main__":
    main()
