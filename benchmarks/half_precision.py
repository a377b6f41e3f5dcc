"""
The masks of ausm-nano in half precision beside those of float32, on the CPU: `python benchmarks/half_precision.py`.

By the rule of `gpu/step.py`, which does the same on a GPU: 100 frames of 256 x 448 of a view that sways over a
photograph, three objects, each stream following its own masks; and every frame begun from the history of float32.
With `--root DAVIS` also the DAVIS 2016 dev sequences, at most 60 frames of each, the object marked in the first frame
by its mask. Intersection over union, mean and least over the frames. It takes minutes, with DAVIS ten; it says nothing
about speed.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import print_table, write_results
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from step import CHECKPOINT, agreement  # noqa: E402

from ausm_hf import load_model, segment_video  # noqa: E402
from ausm_hf.data.clips import load_clip  # noqa: E402
from ausm_hf.data.davis import davis  # noqa: E402
from ausm_hf.evaluation.metrics.jf import region_similarity  # noqa: E402

DTYPES = ["float16", "bfloat16"]


def on_davis(root: str, num_frames: int) -> list[dict]:
    """A row for each sequence and type: overlap with the masks of float32, and J of both."""
    models = {dtype: load_model(CHECKPOINT, "cpu", dtype) for dtype in ["float32", *DTYPES]}
    rows = []
    for row in tqdm(list(davis(root, 2016, "dev")), desc="DAVIS dev"):
        clip = load_clip(row, list(range(min(num_frames, len(row["frames"])))))
        video, truth = list(clip.frames.permute(0, 2, 3, 1).numpy()), clip.masks[0].numpy()
        masks = {
            dtype: [
                r.masks == 1 for r in islice(segment_video(video, *loaded, masks=truth[0].astype(np.uint8)), 1, None)
            ]
            for dtype, loaded in models.items()
        }
        j = {
            dtype: float(np.mean([region_similarity(*pair) for pair in zip(masks[dtype], truth[1:])]))
            for dtype in masks
        }
        for dtype in DTYPES:
            overlaps = [float(region_similarity(*pair)) for pair in zip(masks[dtype], masks["float32"])]
            rows.append(
                {
                    "sequence": row["video_id"],
                    "dtype": dtype,
                    "mean IoU": sum(overlaps) / len(overlaps),
                    "least IoU": min(overlaps),
                    "J": j[dtype],
                    "J of float32": j["float32"],
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="DAVIS, for its dev sequences too")
    parser.add_argument("--frames", type=int, default=100, help="of the swaying view (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 448], metavar=("HEIGHT", "WIDTH"), help="its size")
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    if args.frames < 1:
        parser.error(f"--frames must be at least 1, not {args.frames}")

    model, _ = load_model(CHECKPOINT, "cpu", "float32")
    rows = []
    with torch.no_grad():
        for dtype in DTYPES:
            row: dict = {"dtype": dtype}
            overlaps = agreement(model, getattr(torch, dtype), "eager", tuple(args.size), args.frames)
            for what, values in overlaps.items():
                row |= {f"mean {what}": sum(values) / len(values), f"least {what}": min(values)}
            rows.append(row)
    print_table(rows, rows[0])
    of_davis = on_davis(args.root, 60) if args.root else []
    if of_davis:
        print_table(of_davis, of_davis[0])
    write_results("half_precision", rows, args.output, frame_size=args.size, frames=args.frames, davis=of_davis)


if __name__ == "__main__":
    main()
