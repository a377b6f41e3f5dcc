"""Can the model keep several objects apart that move, cross and leave?

    python benchmarks/pasted_objects.py --root ROOT [--split dev] [--model ID_OR_PATH] [--output DIR]
        [--own | --unmarked] [--draws N]

ROOT is what `python -m ausm_hf.data.prepare` wrote. DAVIS 2016 has one object per sequence; here two and then three
more are pasted into every sequence of the split, over its whole length: exactly masked objects cut out of the other
sequences of the split (moving ones) and out of photographs that are kept out of training. They drift, enter, leave or
cross the place of another object, and half of them go back the way they came, so that what left returns. The seeds
are fixed: the clips are the same in every run.

Each object is given by its mask in the first frame that shows a good part of it. Measured from the next frame on:

- **J** of each object, over all frames (1 where it is away and no pixel is claimed for it);
- **switched**: of the frames in which the object is to be seen, the share in which the id that covers most of it is
  that of another object;
- **lost**: the share of these frames in which no id covers any of it.

With `--own` only the sequence's own object is given: does its id keep off the others, which nobody marked?
With `--unmarked` none is given. What the model finds is paired with the objects, one to one, as in DAVIS 2017
unsupervised; whatever else it finds costs nothing, since much of what is in these pictures has no mask.
With `--draws 3` other objects are pasted into each sequence twice more: to choose between checkpoints, since with one
draw (35 objects) they differ by half a point for nothing.

Writes `pasted_objects.json`, `sheet.png` (truth above, prediction below) and `table.md`.
"""

import argparse
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ausm_hf.data.clips import Clip, load_clip
from ausm_hf.data.davis import davis
from ausm_hf.data.sampling import Cutout, cut_object, paste_object, paste_path
from ausm_hf.data.stills import stills
from ausm_hf.evaluation.metrics.jf import region_similarity, score_sequence
from ausm_hf.files import WholeOrNothing
from ausm_hf.segment import load_model, segment_video
from ausm_hf.visualization import contact_sheet, draw_overlay

PASTED = (2, 3)  # how many objects
STILLS = ("cats", "fashion", "balloon", "coco_mini")
GOOD_PART = 0.5  # of the largest area that an object has in the next frames: enough to prompt it
NEXT_FRAMES = 12
LEAST_PIXELS = 200  # at 240 x 426, at the best moment; smaller ones are drawn anew
SHEET_FRAMES = 6


def there_and_back(length: int) -> list[int]:
    """Frame numbers that play `length` frames forward at double speed and back again."""
    forward = list(range(0, length, 2))
    return (forward + forward[::-1])[:length]


def draw_cutout(donors: list[dict], photographs: list[dict], length: int, rng: np.random.Generator) -> Cutout:
    """An object of a photograph or, one time in two, of another sequence: that many frames, played to and fro."""
    while True:
        if donors and rng.random() < 0.5:
            row = donors[int(rng.integers(len(donors)))]
            frames = [*range(len(row["frames"])), *range(len(row["frames"]) - 2, 0, -1)]
            # Not all of a long sequence is fit to be cut out: a stretch of it is.
            start, stretch = int(rng.integers(len(row["frames"]))), int(rng.integers(8, 25))
            part = [frames[(start + k) % len(frames)] for k in range(stretch)]
            cutout = cut_object(load_clip(row, part), rng)
            if cutout is not None:
                turns = [*range(stretch), *range(stretch - 2, 0, -1)]
                order = [turns[k % len(turns)] for k in range(length)]
                return Cutout(cutout.frames[order], cutout.masks[order], cutout.label)
        else:
            row = photographs[int(rng.integers(len(photographs)))]
            cutout = cut_object(load_clip(row, [0]), rng)
            if cutout is not None:
                return cutout


def seed_of(sequence: str, pasted: int, draw: int) -> int:
    """Of the clip: a first draw is what it was before there were others."""
    return zlib.crc32((f"{sequence} {pasted}" + (f" {draw}" if draw else "")).encode())


def make_clip(row: dict, donors: list[dict], photographs: list[dict], pasted: int, seed: int) -> Clip:
    """A whole sequence with `pasted` objects more. The sequence's own object is the first one."""
    rng = np.random.default_rng(seed)
    length = len(row["frames"])
    clip = load_clip(row, list(range(length)))
    for _ in range(pasted):
        while True:
            cutout = draw_cutout(donors, photographs, length, rng)
            maps = paste_path(clip, cutout, rng)
            if rng.random() < 0.5:
                maps = maps[there_and_back(length)]
            candidate = paste_object(clip, cutout, maps, behind=bool(rng.random() < 0.5))
            areas = candidate.masks.flatten(2).sum(-1)
            scale = candidate.masks.shape[2] * candidate.masks.shape[3] / (240 * 426)
            if (areas.amax(dim=1) >= LEAST_PIXELS * scale).all():  # nobody is hidden from beginning to end
                clip = candidate
                break
    return clip


def first_frames(masks: torch.Tensor) -> list[int]:
    """The frame in which each object of (N, T, H, W) is given."""
    areas = masks.flatten(2).sum(-1)
    first = []
    for area in areas:
        soon = torch.stack([area[t : t + NEXT_FRAMES].max() for t in range(len(area))])
        first.append(int(((area > 0) & (area >= GOOD_PART * soon)).nonzero()[0]))
    return first


def follow(clip: Clip, model, processor, given: int) -> Iterator[np.ndarray]:
    """
    Yields the ids (H, W) of every frame. The first `given` objects of the clip are given, n with id n + 1; with 0 the
    model finds what it can.
    """
    session = processor.init_video_session(find_new_objects=given == 0, seed=0)
    size = tuple(clip.frames.shape[-2:])
    for n, t in enumerate(first_frames(clip.masks)[:given]):
        mask = clip.masks[n, t].numpy()
        processor.add_inputs_to_inference_session(session, t, [n + 1], input_masks=[mask], original_size=size)
    frames = list(clip.frames.permute(0, 2, 3, 1).numpy())
    for result in segment_video(frames, model, processor, session=session):
        yield result.masks


def index_map(masks: np.ndarray) -> np.ndarray:
    """Bool (N, T, H, W), no two of which share a pixel, as ids (T, H, W): n + 1 where object n is."""
    return (masks * np.arange(1, len(masks) + 1, dtype=np.int32)[:, None, None, None]).sum(0)


def name_tracks(masks: np.ndarray, predicted: list[np.ndarray]) -> list[np.ndarray]:
    """`predicted` with the id n + 1 for the track that is paired with object n, and higher ones for all others."""
    pairs = score_sequence(predicted, index_map(masks), skip_first=False, skip_last=False, mode="best-track")
    names = {pair.predicted_id: n for n, pair in pairs.items()}
    highest = max(int(ids.max()) for ids in predicted)
    table = np.array([0, *(names.get(track, len(masks) + track) for track in range(1, highest + 1))])
    return [table[ids] for ids in predicted]


def score(masks: np.ndarray, predicted: list[np.ndarray]) -> list[dict]:
    """
    How well each object was followed, from the frame after the one in which it was given.

    Args:
        masks: The true masks, bool (N, T, H, W).
        predicted: The ids (H, W) of every frame; object n has id n + 1.

    Returns:
        Of each object `J`, `frames` (that it is to be seen in), `switched` and `lost` (how many of these).
    """
    rows = []
    for n, first in enumerate(first_frames(torch.from_numpy(masks))):
        j, seen, switched, lost = [], 0, 0, 0
        for t in range(first + 1, len(predicted)):
            truth, ids = masks[n, t], predicted[t]
            j.append(region_similarity(ids == n + 1, truth))
            if truth.any():
                cover = np.bincount(ids[truth], minlength=2)
                cover[0] = 0  # background
                seen += 1
                lost += not cover.any()
                switched += bool(cover.any()) and int(cover.argmax()) != n + 1
        rows.append({"J": float(np.mean(j)), "frames": seen, "switched": switched, "lost": lost, "given": first})
    return rows


def summarize(objects: list[dict]) -> list[dict]:
    """Means per number of pasted objects, of the sequences' own objects, of the pasted ones and of all."""
    rows = []
    for pasted in (*PASTED, "all"):
        for kind in ("own", "pasted", "all"):
            mine = [x for x in objects if pasted in ("all", x["pasted"]) and kind in ("all", x["kind"])]
            if not mine:
                continue
            frames = max(sum(x["frames"] for x in mine), 1)
            row = {"pasted": pasted, "kind": kind, "objects": len(mine)}
            row |= {"J": float(np.mean([x["J"] for x in mine])), "worst J": min(x["J"] for x in mine)}
            row |= {key: sum(x[key] for x in mine) / frames for key in ("switched", "lost")}
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The summary as Markdown, in percent."""
    lines = ["| pasted | objects | how many | J | worst J | switched | lost |", "| --- " * 7 + "|"]
    for row in rows:
        numbers = [f"{100 * row[key]:.1f}" for key in ("J", "worst J", "switched", "lost")]
        cells = [row["pasted"], row["kind"], row["objects"], *numbers]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def pictures(clip: Clip, predicted: list[np.ndarray], name: str) -> tuple[list[np.ndarray], list[str]]:
    """Some frames of a clip with the truth drawn in, then the same with the prediction; and a title for each."""
    numbers = np.linspace(0, len(predicted) - 1, SHEET_FRAMES).round().astype(int).tolist()
    truth = index_map(clip.masks.numpy())
    frames = clip.frames.permute(0, 2, 3, 1).numpy()
    drawn, titles = [], []
    for kind, ids in (("truth", truth), ("predicted", predicted)):
        drawn += [draw_overlay(frames[t], ids[t]) for t in numbers]
        titles += [f"{name}, {kind}, frame {t}" for t in numbers]
    return drawn, titles


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="what ausm_hf.data.prepare wrote: davis/ and stills/")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--output", type=Path, default=Path("pasted-objects"))
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--own", action="store_true", help="give only the sequence's own object")
    given.add_argument("--unmarked", action="store_true", help="give no object: what is found, and how well?")
    parser.add_argument("--draws", type=int, default=1, help="how often each sequence is pasted into (default: 1)")
    args = parser.parse_args(arguments)
    if args.draws < 1:
        parser.error(f"--draws must be at least 1, not {args.draws}")

    rows = list(davis(os.path.join(args.root, "davis"), 2016, args.split))
    photographs = [row for name in STILLS for row in stills(os.path.join(args.root, "stills", name), "held_out")]
    model, processor = load_model(args.model)
    objects, drawn, titles = [], [], []
    clips = [(row, pasted, draw) for draw in range(args.draws) for row in rows for pasted in PASTED]
    for row, pasted, draw in tqdm(clips, desc="pasted objects"):
        donors = [other for other in rows if other is not row]
        clip = make_clip(row, donors, photographs, pasted, seed_of(row["video_id"], pasted, draw))
        if args.own:
            clip = replace(clip, masks=clip.masks[:1])
        masks = clip.masks.numpy()
        predicted = list(follow(clip, model, processor, given=0 if args.unmarked else len(masks)))
        if args.unmarked:
            predicted = name_tracks(masks, predicted)
        common = {"sequence": row["video_id"], "pasted": pasted, "draw": draw}
        for n, result in enumerate(score(masks, predicted)):
            objects.append({**common, "object": n + 1, "kind": "pasted" if n else "own", **result})
        of_clip = pictures(clip, predicted, f"{row['video_id']} + {pasted}")
        drawn += of_clip[0]
        titles += of_clip[1]

    summary = summarize(objects)
    args.output.mkdir(parents=True, exist_ok=True)
    contact_sheet(drawn, SHEET_FRAMES, titles, "Pasted objects").save(args.output / "sheet.png")
    (args.output / "table.md").write_text(table(summary), encoding="utf-8")
    content = {"model": args.model or "ausm-nano", "summary": summary, "objects": objects}
    with WholeOrNothing(args.output / "pasted_objects.json") as file:
        file.partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(table(summary))


if __name__ == "__main__":
    main()
