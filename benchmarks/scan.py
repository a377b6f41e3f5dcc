"""
The scan over time on the CPU against a plain loop: `python benchmarks/scan.py`.

For T from 1 to 64 frames of few pixels and of many, Mamba-1's scan of this package and the loop over time that one
would write down. First the scan is checked against the loop in float64. Reports nanoseconds per state number (pixel x
frame x channel x state), forward, and forward with backward. The loop keeps everything for the backward pass: it gets
as many pixels as fit `--loop-memory`, and both times are per number.

The floor: one exponential per state number and pass (two where the states are computed again), at the rate of
`torch.exp2` in the cache, and inputs and outputs moved once at the rate of a large copy.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch
from common import copy_rate, machine, plot_lines, print_table, seconds, write_results

from ausm_hf.model.temporal_scan import selective_scan


def loop(x, dt, A, B, C, state=None):
    """Mamba-1's scan as in its paper, frame by frame."""
    h = x.new_zeros(len(x), *A.shape) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1), h


def random_inputs(n: int, t: int, c: int, s: int, dtype=torch.float32) -> list[torch.Tensor]:
    x, dt = torch.randn(n, t, c, dtype=dtype), torch.empty(n, t, c, dtype=dtype).uniform_(0.001, 0.1)
    A = -torch.arange(1, s + 1, dtype=dtype).repeat(c, 1)
    inputs = [x, dt, A, torch.randn(n, t, s, dtype=dtype), torch.randn(n, t, s, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in inputs]


def backward(scan, inputs, d_y):
    y, _ = scan(*inputs, None)
    return torch.autograd.grad([y], inputs, [d_y])


def check(c: int, s: int) -> None:
    inputs = random_inputs(37, 5, c, s, torch.float64)
    d_y = torch.randn(37, 5, c, dtype=torch.float64)
    wanted = [loop(*inputs)[0], *backward(loop, inputs, d_y)]
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    got = [selective_scan(*single, None)[0], *backward(selective_scan, single, d_y.float())]
    for a, b in zip(got, wanted):
        assert (a - b).norm() < 1e-5 * b.norm(), "the scan is wrong"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[1_000, 20_000])
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--state-size", type=int, default=16)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--numbers", type=float, default=5e7, help="at most this many state numbers at a time")
    parser.add_argument("--loop-memory", type=float, default=0.5, help="GiB that the loop may keep")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    c, s = args.channels, args.state_size
    check(c, s)
    in_cache = -torch.rand(32768)
    out = torch.empty_like(in_cache)
    exponential = seconds(lambda: [torch.exp2(in_cache, out=out) for _ in range(100)], 5) / 100 / len(out)
    moved = copy_rate()
    rows = []
    for pixels, t in product(args.pixels, args.frames):
        n = max(16, min(pixels, int(args.numbers / (t * c * s))))
        # A decay, a state and their product per frame.
        n_loop = max(min(n, 16), min(n, int(args.loop_memory * 2**30 / (12 * t * c * s))))
        row = {"frames": t, "pixels": n, "pixels of the loop": n_loop}
        for name, scan, number in (("scan", selective_scan, n), ("loop", loop, n_loop)):
            inputs, d_y = random_inputs(number, t, c, s), torch.randn(number, t, c)
            scale = 1e9 / (number * t * c * s)
            with torch.no_grad():
                row[f"{name} forward"] = seconds(partial(scan, *inputs, None), args.repeats) * scale
            row[f"{name} both"] = seconds(partial(backward, scan, inputs, d_y), args.repeats) * scale
        numbers_forward = 3 * t * c + 2 * t * s + c * s  # per pixel: x, dt and y; B and C; the last state
        row["floor forward"] = 1e9 * (exponential + 4 * numbers_forward / moved / (t * c * s))
        row["floor both"] = 1e9 * (2 * exponential + 4 * (7 * t * c + 6 * t * s + c * s) / moved / (t * c * s))
        row["faster forward"] = row["loop forward"] / row["scan forward"]
        row["faster both"] = row["loop both"] / row["scan both"]
        rows.append(row)
    print(f"{machine()}\nnanoseconds per state number, {c} channels, state size {s}\n")
    print_table(rows, rows[0])
    write_results("scan", rows, args.output, channels=c, state_size=s, exponential_ns=1e9 * exponential, copy=moved)
    lines = {
        f"{name}, {part}": (args.frames, [row[f"{name} {part}"] for row in rows[-len(args.frames) :]])
        for part in ("forward", "both")
        for name in ("loop", "scan", "floor")
    }
    plot_lines("scan", lines, "frames", "ns per state number", args.output)


if __name__ == "__main__":
    main()
