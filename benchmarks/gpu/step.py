"""
A whole streaming step of the network, all slots fixed so that nothing waits for the host: eager, compiled, and as a
CUDA graph, in float32, bfloat16 and float16, with 1 and 20 objects.

First every variant must give the masks of eager float32: the pixels that differ, as intersection over union, over
frames of a stream that carries its own state on (ausm-nano, 100 frames, masks given). The floor is the floating point
operations over the rate of a large matrix product in that type.

    benchmarks/gpu/step.sh [--dry-run] [--output FOLDER]
"""

import copy
from pathlib import Path

import torch
from timing import Bench
from torch.utils.flop_counter import FlopCounterMode

from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmModel
from ausm_hf.model.history_ausm import AusmHistory

CHECKPOINT = Path(__file__).parents[2] / "src" / "ausm_hf" / "checkpoints" / "ausm-nano"


class Stream:
    """One stream in fixed memory: `step(frame)` gives masks, and puts the new history where the old one was."""

    def __init__(self, model, size, objects: int, how: str):
        self.model, self.how, self.graph = model, how, None
        device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self.slots = torch.arange(objects, device=device)[None]
        self.taken = torch.ones(1, objects, dtype=torch.bool, device=device)
        self.masks = torch.zeros(1, objects, size[0] // 4, size[1] // 4, device=device, dtype=dtype)
        for index in range(objects):
            self.masks[0, index, 2 * index % 8 : 2 * index % 8 + 8, index : index + 12] = 1
        self.frame = torch.zeros(1, 3, *size, device=device, dtype=dtype)
        empty = AusmHistory(None, None, self.slots, self.taken, self.masks)
        history = model.step(self.frame, empty).history
        self.features = history.features.clone()
        self.states = tuple(tuple(part.clone() for part in state) for state in history.states)
        self.appearance = None if history.appearance is None else history.appearance.clone()
        self.function = torch.compile(self.advance) if how == "compiled" else self.advance
        if how == "graph":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.keep(*self.advance(self.frame, *self.kept()))
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.keep(*self.advance(self.frame, *self.kept()))

    def kept(self):
        return self.features, self.states, self.masks, self.appearance

    def advance(self, frame, features, states, masks, appearance):
        history = AusmHistory(features, states, self.slots, self.taken, masks, appearance)
        output = self.model.step(frame, history)
        new = (output.masks_queries_logits[:, : masks.shape[1]] > 0).to(masks.dtype)
        return output.history.features, output.history.states, new, output.history.appearance

    def keep(self, features, states, masks, appearance):
        self.features.copy_(features)
        for old, new in zip(self.states, states):
            for a, b in zip(old, new):
                a.copy_(b)
        self.masks.copy_(masks)
        if self.appearance is not None:
            self.appearance.copy_(appearance)

    def step(self, frame) -> torch.Tensor:
        if self.graph is None:
            self.keep(*self.function(frame, *self.kept()))
        else:
            self.frame.copy_(frame)
            self.graph.replay()
        return self.masks


def frames(count: int, size, device) -> list[torch.Tensor]:
    """A textured square over a textured ground, moving."""
    generator = torch.Generator().manual_seed(0)
    ground, square = (
        torch.randn(3, size[0], 2 * size[1], generator=generator),
        torch.randn(3, 1, 1, generator=generator),
    )
    result = []
    for index in range(count):
        frame = ground[:, :, index % size[1] : index % size[1] + size[1]].clone()
        frame[:, 8 : size[0] // 2, index % 16 + 8 : index % 16 + size[1] // 2] += 2 * square
        result.append(frame[None].to(device))
    return result


def agreement(bench: Bench, model, dtype, how: str, size, count: int) -> float:
    """Least intersection over union, over frames, of what the variant segments and what eager float32 segments."""
    clip, objects = frames(count, size, bench.device), 3
    wanted = Stream(model, size, objects, "eager")
    got = Stream(copy.deepcopy(model).to(dtype), size, objects, how)
    got.keep(*wanted.kept())
    least = 1.0
    for frame in clip:
        got.masks.copy_(wanted.masks)  # given: only the state drifts
        a, b = wanted.step(frame).bool(), got.step(frame.to(dtype)).bool()
        if (a | b).any():
            least = min(least, ((a & b).sum() / (a | b).sum()).item())
    return least


def main():
    bench = Bench("step", __doc__)
    torch.manual_seed(0)
    size = (64, 64) if bench.dry_run else (480, 864)
    hows = ["eager"] if bench.dry_run else ["graph", "eager", "compiled"]  # compiling last, it takes minutes
    dtypes = [torch.float32, torch.bfloat16] + ([] if bench.dry_run else [torch.float16])
    # Not by `load_model`, which wants PyAV for the videos that it is there for.
    nano = AusmForUniversalSegmentation.from_pretrained(CHECKPOINT, dtype=torch.float32).to(bench.device)
    networks = {"ausm-nano": nano.eval()}
    if not bench.dry_run:
        networks["base, random"] = AusmForUniversalSegmentation(AusmConfig.from_preset("base")).eval().to(bench.device)
    count, check_size = (3, (64, 64)) if bench.dry_run else (100, (256, 448))

    def measure(name, dtype, how, objects) -> dict:
        model: AusmModel = networks[name].model
        row = {}
        if name == "ausm-nano":
            row["least IoU"] = agreement(bench, model, dtype, how, check_size, count)
            if row["least IoU"] < 0.995 and not bench.dry_run:
                raise AssertionError(f"masks fall to {row['least IoU']:.4f} of eager float32's")
        own = copy.deepcopy(model).to(dtype).requires_grad_(False)
        stream = Stream(own, size, objects, how)
        clip = [frame.to(dtype) for frame in frames(8, size, bench.device)]
        row["ms"] = bench.milliseconds([lambda f=f: stream.step(f) for f in clip])
        side = 64 if bench.dry_run else 8192
        a = torch.randn(side, side, device=bench.device, dtype=dtype)
        rate = 2e3 * len(a) ** 3 / bench.milliseconds([lambda: a @ a], 5)
        eager = Stream(own, size, objects, "eager")
        with FlopCounterMode(display=False) as counter:
            eager.step(clip[0])
        return row | {"floor ms": 1e3 * counter.get_total_flops() / rate, "TFLOP/s": rate / 1e12}

    with torch.inference_mode(mode=False), torch.no_grad():
        for how in hows:
            for name in networks:
                for dtype in dtypes:
                    for objects in (1, 20):
                        what = {"network": name, "dtype": str(dtype)[6:], "how": how, "objects": objects}
                        bench.add(what, lambda n=name, d=dtype, h=how, o=objects: measure(n, d, h, o))
    bench.finish(["network", "dtype", "how", "objects", "ms", "floor ms", "least IoU", "TFLOP/s"])


if __name__ == "__main__":
    main()
