"""
Training in parallel against training frame by frame: `python benchmarks/training.py`.

The same network, the same clip, the same given history: all frames in one pass, or one step after another with the
state carried on. Both forms are checked to give the same masks and the same gradients first. The iterative form runs
without padding, copies or recomputation. The loss is a plain mean over masks, since the real one is the same work in
both. The floor is the floating point operations of a step over the rate of a large matrix product.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from common import machine, matmul_rate, memory, plot_lines, print_table, seconds, write_results
from torch.utils.flop_counter import FlopCounterMode

from ausm_hf import AusmConfig, AusmModel


def clip(model, frames: int, size: tuple[int, int], objects: int) -> dict:
    """Random frames, and a given history in which every object is known from the start."""
    torch.manual_seed(0)
    device, dtype = model.device, model.dtype
    return {
        "pixel_values_videos": torch.randn(1, frames, 3, *size, device=device, dtype=dtype),
        "history_masks": (torch.rand(1, frames, objects, size[0] // 8, size[1] // 8, device=device) > 0.7).to(dtype),
        "id_slots": torch.arange(objects, device=device)[None],
        "taken": torch.ones(1, frames, objects, dtype=torch.bool, device=device),
    }


def parallel(model, batch) -> torch.Tensor:
    return model(**batch).masks_queries_logits


def iterative(model, batch) -> torch.Tensor:
    history, masks = model.init_history(), []
    for t in range(batch["pixel_values_videos"].shape[1]):
        history = history.replace_objects(batch["id_slots"], batch["taken"][:, t], batch["history_masks"][:, t])
        output = model.step(batch["pixel_values_videos"][:, t], history)
        history = output.history
        masks.append(output.masks_queries_logits)
    return torch.stack(masks, 1)


def train_step(form, model, batch) -> None:
    model.zero_grad(set_to_none=True)
    form(model, batch).square().mean().backward()


def training_flops(model, batch) -> int:
    """
    Floating point operations of a step: three times those of the forward pass. torch's counter takes a depthwise
    convolution for a full one in the backward pass, so that is not counted but derived.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        parallel(model, batch)
    return 3 * counter.get_total_flops()


def check(model, size, objects: int) -> None:
    batch, found = clip(model, 3, size, objects), []
    for form in (parallel, iterative):
        train_step(form, model, batch)
        with torch.no_grad():
            masks = form(model, batch)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((masks.double(), grads.double()))
    for a, b, name in zip(*found, ("masks", "gradients")):
        assert (a - b).norm() < 1e-3 * b.norm(), f"the two forms differ in {name}"


def make_model(preset: str) -> AusmModel:
    torch.manual_seed(0)
    # Dropped paths and normalisation by batch would make the two forms two functions.
    return AusmModel(AusmConfig.from_preset(preset)).eval()


FORMS = {"parallel": parallel, "iterative": iterative}


def added_memory(args, form: str, frames: int) -> float:
    """MiB that one training step adds to a process that has done nothing but make the model and the clip."""
    command = [sys.executable, __file__, "--peak-of", form, "--frames", str(frames), "--preset", args.preset]
    command += ["--size", *map(str, args.size), "--objects", str(args.objects)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--size", type=int, nargs=2, default=[96, 160], help="height and width, multiples of 32")
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-of", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    model = make_model(args.preset)
    if args.peak_of:
        batch = clip(model, args.frames[0], args.size, args.objects)
        before = memory("peak")
        train_step(FORMS[args.peak_of], model, batch)
        print(json.dumps(memory("peak") - before))
        return
    check(model, args.size, args.objects)
    rate = matmul_rate()
    rows = []
    for t in args.frames:
        batch, row = clip(model, t, args.size, args.objects), {"frames": t}
        for name, form in FORMS.items():
            row[f"{name} ms"] = 1e3 * seconds(partial(train_step, form, model, batch), args.repeats)
            row[f"{name} MiB"] = added_memory(args, name, t)
        row["faster"] = row["iterative ms"] / row["parallel ms"]
        row["floor ms"] = 1e3 * training_flops(model, batch) / rate
        rows.append(row)
    print(f"{machine()}\n{args.preset}, {args.size[0]} x {args.size[1]}, {args.objects} objects, batch of 1\n")
    print_table(rows, rows[0])
    write_results("training", rows, args.output, preset=args.preset, size=args.size, matmul_gflops=rate / 1e9)
    lines = {name: (args.frames, [row[f"{name} ms"] for row in rows]) for name in ("iterative", "parallel", "floor")}
    plot_lines("training", lines, "frames of the clip", "ms per training step", args.output)


if __name__ == "__main__":
    main()
