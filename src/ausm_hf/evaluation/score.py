"""Score folders of indexed PNGs by J and F.

    python -m ausm_hf.evaluation.score PRED_DIR GT_DIR [--sequences lucia car-turn | dev.txt] [--mode best-track]

Both folders have one folder per sequence with one PNG per frame, as `Annotations/480p` of DAVIS. Frames that only the
prediction has are left aside: ground truth may be sparse.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from ..data.clips import mask_values, open_image
from ..files import image_files, visible, write_text
from .metrics.jf import COUNT_FROM, MODES, SequenceScorer, report_problems, summarize


def read_mask(path: str | Path, binary: bool = False) -> np.ndarray:
    """Reads a mask, as clips do.

    Args:
        path (`str` or `Path`): The file.
        binary (`bool`, *optional*, defaults to `False`): What isn't black or transparent is the one object.

    Returns:
        `np.ndarray` of shape `(H, W)`, integers or bool: The stored values, which are ids, not colours.

    Raises:
        ValueError: If it can't be read, or its pixels are colours and not ids.
    """
    with open_image({"path": str(path), "bytes": None}) as image:
        return mask_values(image, str(path), binary)


def _read_prediction(path: Path, binary: bool) -> np.ndarray:
    """As [`read_mask`], but a binary one keeps its ids: only of colours it is asked whether they are black."""
    with open_image({"path": str(path), "bytes": None}) as image:
        return mask_values(image, str(path), binary and image.mode in ("RGB", "RGBA"))


def score_folder(
    pred_dir: str | Path,
    gt_dir: str | Path,
    sequences: list[str] | None = None,
    mode: str = "prompted",
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    count_from: str = "start",
    binary: bool = False,
) -> dict:
    """Scores a folder of predictions against a folder of ground truth, frame by frame.

    Args:
        pred_dir (`str` or `Path`): `<sequence>/<frame>.png` for each sequence.
        gt_dir (`str` or `Path`): Likewise. The frames that are scored are those in here.
        sequences (`list[str]`, *optional*): Names of sequences. All of `gt_dir` if not given; `pred_dir` must then
            have the same.
        mode, binary: See [`~ausm_hf.evaluation.metrics.jf.SequenceScorer`].
        skip_first, skip_last, count_from: See [`~ausm_hf.evaluation.metrics.jf.SequenceScorer.result`]. If not given,
            all frames are scored of best tracks (DAVIS 2017 unsupervised) unless `binary` (DAVIS 2016), otherwise all
            but the first and the last.

    Returns:
        `dict`: As [`~ausm_hf.evaluation.metrics.jf.summarize`] makes it.

    Raises:
        ValueError: One report of everything that is wrong: missing sequences and frames, files that are no masks,
            wrong sizes, ids that ground truth does not know.
    """
    pred_dir, gt_dir = Path(pred_dir), Path(gt_dir)
    skip = mode != "best-track" or binary
    skip_first = skip if skip_first is None else skip_first
    skip_last = skip if skip_last is None else skip_last
    for argument, folder in (("pred_dir", pred_dir), ("gt_dir", gt_dir)):
        if not folder.is_dir():
            raise ValueError(f"`{argument}` is {folder}, which is not a folder.")
    if mode not in MODES:
        raise ValueError(f"`mode` is {mode!r}; it must be one of {', '.join(MODES)}.")
    if count_from not in COUNT_FROM:
        raise ValueError(f"`count_from` is {count_from!r}; it must be one of {', '.join(COUNT_FROM)}.")

    problems = []
    if sequences is None:
        sequences = sorted(entry.name for entry in visible(gt_dir) if entry.is_dir())
        unknown = sorted(entry.name for entry in visible(pred_dir) if entry.is_dir() and entry.name not in sequences)
        problems += [f"{name}: predicted, but not in ground truth" for name in unknown]
        if not sequences:
            problems.append(f"{gt_dir} has no folders")

    scores = {}
    for name in sequences:
        frames = image_files(gt_dir / name, (".png",))
        if not frames:
            problems.append(f"{name}: no ground truth (no PNG in {gt_dir / name})")
            continue
        if not (pred_dir / name).is_dir():
            problems.append(f"{name}: not predicted (no folder {pred_dir / name})")
            continue
        scorer = SequenceScorer(name, mode, binary)
        missing = []
        for gt_path in frames:
            pred_path = pred_dir / name / gt_path.name
            if not pred_path.is_file():
                missing.append(gt_path.name)
                continue
            try:
                scorer.add(_read_prediction(pred_path, binary), read_mask(gt_path, binary), frame=gt_path.name)
            except (OSError, ValueError) as error:
                scorer.problems.append(f"{name}, frame {gt_path.name}: {error}")
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            scorer.problems.append(f"{name}: {len(missing)} of {len(frames)} frames are not predicted: {some}")
        scores[name], of_sequence = scorer.result_or_problems(skip_first, skip_last, count_from)
        problems += of_sequence
    report_problems(problems)
    return summarize(scores)


def format_table(summary: dict) -> str:
    """Table of a summary, in percent: one line per sequence and, last, the mean over all objects.

    Args:
        summary (`dict`): As [`~ausm_hf.evaluation.metrics.jf.summarize`] makes it.

    Returns:
        `str`: Lines of text.
    """
    columns = {"J&F": "J&F", "J": "J", "F": "F", "J_recall": "J rec", "F_recall": "F rec", "J_decay": "J dec"}
    width = max(len("sequence"), *(len(name) for name in summary["sequences"]))
    lines = [f"{'sequence':<{width}}  objects" + "".join(f"{title:>8}" for title in columns.values())]
    total = sum(len(row["objects"]) for row in summary["sequences"].values())
    rows = [(name, len(row["objects"]), row) for name, row in summary["sequences"].items()]
    for name, count, row in [*rows, ("mean", total, summary)]:
        lines.append(f"{name:<{width}}  {count:>7}" + "".join(f"{100 * row[column]:>8.1f}" for column in columns))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """`python -m ausm_hf.evaluation.score`"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pred_dir", type=Path)
    parser.add_argument("gt_dir", type=Path)
    parser.add_argument("--sequences", nargs="+", help="names, or a text file with one name per line; default: all")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="prompted",
        help="same ids as ground truth; or the best predicted id per object; or all predicted ids as one object",
    )
    parser.add_argument(
        "--all-frames",
        action="store_true",
        help="score the first and the last frame too, as of best tracks that aren't --binary",
    )
    parser.add_argument("--count-from", choices=COUNT_FROM, default="start", help="when an object begins to count")
    parser.add_argument("--binary", action="store_true", help="masks are black and white (DAVIS 2016)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    args = parser.parse_args(arguments)

    sequences = args.sequences
    if sequences and len(sequences) == 1 and Path(sequences[0]).is_file():
        sequences = Path(sequences[0]).read_text(encoding="utf-8").split()
    skip = False if args.all_frames else None
    try:
        summary = score_folder(
            args.pred_dir, args.gt_dir, sequences, args.mode, skip, skip, args.count_from, args.binary
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_text(args.json, json.dumps(summary, indent=2) + "\n")
    print(format_table(summary))


if __name__ == "__main__":
    main()
