"""
Training in parallel against training frame by frame with Swin-B: time and peak memory at T = 1 to 32, in bfloat16
autocast. The two forms are those of `benchmarks/training.py`, checked there and here to give the same masks and
gradients in float32 first. At the 480 x 864 of real footage the iterative form wants more than 79 GiB at T = 16: with
less than 120 GB of memory frames are of 256 x 448.

    benchmarks/gpu/training.sh [--dry-run] [--output FOLDER]
"""

import importlib.util
from pathlib import Path

import torch
from timing import Bench, poisoned

spec = importlib.util.spec_from_file_location("training_cpu", Path(__file__).parents[1] / "training.py")
forms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forms)


def main():
    bench = Bench("training", __doc__)
    preset, size, objects = ("nano", [64, 64], 2) if bench.dry_run else ("base", [256, 448], 5)
    if bench.device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory > 120e9:
        size = [480, 864]
    model = forms.make_model(preset).to(bench.device)
    bench.more |= {"preset": preset, "size": size, "objects": objects}

    def check() -> dict:
        with poisoned():
            forms.check(model, [64, 64], objects)
        return {"correct": True}

    bench.add({"form": "both", "frames": 3}, check)
    a = torch.randn(64 if bench.dry_run else 8192, 64 if bench.dry_run else 8192, device=bench.device).bfloat16()
    rate = 2e3 * len(a) ** 3 / bench.milliseconds([lambda: a @ a], 5)
    bench.more["matmul_tflops"] = rate / 1e12

    def train(form, batch):
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            forms.train_step(form, model, batch)

    def measure(form, t: int) -> dict:
        batches = [forms.clip(model, t, size, objects) for _ in range(2)]
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row = {"ms": bench.milliseconds([lambda b=b: train(form, b) for b in batches], 3)}
        if bench.device.type == "cuda":
            row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
        return row | {"floor ms": 1e3 * forms.training_flops(model, batches[0]) / rate}

    for t in [1, 2] if bench.dry_run else [16, 1, 2, 4, 8, 32]:
        for name, form in forms.FORMS.items():
            bench.add({"form": name, "frames": t}, lambda f=form, t=t: measure(f, t))
    bench.finish(["form", "frames", "ms", "floor ms", "peak MiB"])


if __name__ == "__main__":
    main()
