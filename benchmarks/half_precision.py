"""
The masks of ausm-nano in half precision beside those of float32, on the CPU: `python benchmarks/half_precision.py`.

By the rule of `gpu/step.py`, which does the same on a GPU: 100 frames of 256 x 448 of a view that sways over a
photograph, three objects, each stream following its own masks; and every frame begun from the history of float32.
Intersection over union, mean and least over the frames. Some minutes; it says nothing about speed.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import print_table, write_results

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from step import CHECKPOINT, agreement  # noqa: E402

from ausm_hf import AusmForUniversalSegmentation  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 448], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    if args.frames < 1:
        parser.error(f"--frames must be at least 1, not {args.frames}")

    model = AusmForUniversalSegmentation.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            row: dict = {"dtype": str(dtype).removeprefix("torch.")}
            for what, overlaps in agreement(model, dtype, "eager", tuple(args.size), args.frames).items():
                row |= {f"mean {what}": sum(overlaps) / len(overlaps), f"least {what}": min(overlaps)}
            rows.append(row)
    print_table(rows, rows[0])
    write_results("half_precision", rows, args.output, frame_size=args.size, frames=args.frames)


if __name__ == "__main__":
    main()
