"""
Mamba-1's scan with all that surrounds it (softplus, D, gate), forward and backward: mamba-ssm, the Triton kernels of
this package, plain torch; and the step of one frame against the copy bandwidth of its state.

First every variant must agree with plain torch in float64 on fresh random inputs, outputs poisoned before. mamba-ssm
is timed in the layout that this package has and in the one that it prefers. Floors: inputs and outputs once at the
rate of a large copy.

    benchmarks/gpu/scan.sh [--dry-run] [--output FOLDER]
"""

import torch
from timing import Bench, error, poisoned
from torch.nn import functional as F

from ausm_hf.model import temporal_mamba_triton
from ausm_hf.model.temporal_mamba_triton import triton, triton_scan
from ausm_hf.model.temporal_scan import selective_scan, selective_step

S = 16
LAUNCHES = ((32, 1), (128, 2))  # other ways to launch the forward kernel: channels of a program, warps


def plain(x, dt, A, B, C, D, dt_bias, gate, state=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, dt, B, C, gate = (v.to(wide) for v in (x, dt, B, C, gate))
    dt = F.softplus(dt + dt_bias)
    if x.shape[1] == 1:
        y, state = selective_step(x_[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)
        y = y[:, None]
    else:
        y, state = selective_scan(x_, dt, A, B, C, state)
    return ((y + D * x_) * F.silu(gate)).to(x.dtype), state


def variants(device: str) -> dict:
    """Name -> function of x, dt, A, B, C, D, dt_bias, gate."""
    found = {"torch": plain}
    if triton is not None and device == "cuda":
        found["triton"] = lambda *inputs: triton_scan(*inputs, None)
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return found

    def mamba_ssm(x, dt, A, B, C, D, dt_bias, gate):
        y, state = selective_scan_fn(
            x.mT, dt.mT, A, B.mT, C.mT, D, gate.mT, dt_bias, delta_softplus=True, return_last_state=True
        )
        return y.mT, state

    return found | {"mamba-ssm": mamba_ssm, "mamba-ssm, its layout": mamba_ssm}


def random_inputs(n, t, c, dtype, device, seed, own_layout=False):
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    def moved(x):
        return x.mT.contiguous().mT if own_layout else x

    x, gate = (moved(part.to(dtype)) for part in random(n, t, 2 * c).chunk(2, -1))
    dt, B, C = (moved(random(n, t, size).to(dtype)) for size in (c, S, S))
    return [x, dt, -random(c, S).exp(), B, C, random(c), random(c) - 4, gate]


def forward_and_backward(function, inputs, d_y):
    inputs = [v.detach().requires_grad_() for v in inputs]
    y, state = function(*inputs)
    return [y, state, *torch.autograd.grad([y], inputs, [d_y])]


def check(bench: Bench, name: str, function, c: int, dtype) -> float:
    worst = 0.0
    for seed, (n, t) in enumerate(((70, 7), (33, 16), (5, 64), (9, 2))):
        inputs = random_inputs(n, t, c, dtype, bench.device, seed, "its layout" in name)
        d_y = torch.randn(n, t, c, device=bench.device).to(dtype)
        wanted = forward_and_backward(plain, [v.double() for v in inputs], d_y.double())
        with poisoned():
            got = forward_and_backward(function, inputs, d_y)
        worst = max(worst, *(error(a.detach(), b.detach()) for a, b in zip(got, wanted)))
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    if not worst <= limit:
        raise AssertionError(f"{name} is off by {worst:.1e} in {dtype}, more than {limit:.0e}")
    return worst


def time_scan(bench: Bench, name: str, function, n: int, t: int, c: int, dtype, copy: float) -> dict:
    worst = check(bench, name, function, c, dtype)
    sets = [random_inputs(n, t, c, dtype, bench.device, seed, "its layout" in name) for seed in range(3)]
    d_y = torch.randn(n, t, c, device=bench.device).to(dtype)
    with torch.no_grad():
        forward = bench.milliseconds([lambda s=s: function(*s) for s in sets])
    both = bench.milliseconds([lambda s=s: forward_and_backward(function, s, d_y) for s in sets], 10)
    item = sets[0][0].element_size()
    moved = n * (item * t * (4 * c + 2 * S) + 4 * c * S)
    moved_back = n * item * t * (7 * c + 4 * S)  # x, dt, gate, B, C, d_y in; their gradients out
    floor, floor_both = 1e3 * moved / copy, 1e3 * (moved + moved_back) / copy
    peak = {}
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_and_backward(function, sets[0], d_y)
        peak = {"MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}
    shares = {"of bound": floor / forward, "of bound both": floor_both / both}
    return (
        {"error": worst, "ms": forward, "floor ms": floor, "both ms": both, "floor both ms": floor_both}
        | shares
        | peak
    )


def time_step(bench: Bench, name: str, function, n: int, c: int, copy: float) -> dict:
    sets = []
    for seed in range(3):
        inputs = random_inputs(n, 1, c, torch.float32, bench.device, seed)
        sets.append([*inputs, torch.randn(n, S, c, device=bench.device).mT])
    with torch.no_grad():
        wanted = plain(*(v.double() for v in sets[0]))
        with poisoned():
            got = function(*sets[0])
        worst = max(map(error, got, wanted))
        if not worst <= 1e-4:
            raise AssertionError(f"the step of {name} is off by {worst:.1e}")
        ms = bench.milliseconds([lambda s=s: function(*s) for s in sets])
    moved = 4 * n * (2 * c * S + 4 * c + 2 * S)
    return {"error": worst, "ms": ms, "floor ms": 1e3 * moved / copy, "of bound": 1e3 * moved / copy / ms}


def main():
    bench = Bench("scan", __doc__)
    copy = bench.copy_rate()
    bench.more |= {"copy_bytes_per_second": copy, "state_size": S}
    found = variants(bench.device.type)
    bench.more["variants"] = list(found)
    steps = {"torch": plain} | ({"triton": triton_scan} if "triton" in found else {})
    pixels, channels = (64, [40]) if bench.dry_run else (26_000, [512, 256, 128])
    frames = [3] if bench.dry_run else [16, 4, 64, 1, 2, 8, 32]

    def add_scan(name: str, function, n: int, t: int, c: int, dtype) -> None:
        what = {"variant": name, "pixels": n, "frames": t, "channels": c, "dtype": str(dtype)[6:]}
        bench.add(what, lambda: time_scan(bench, name, function, n, t, c, dtype, copy))

    # The sizes of the targets first, and what is slow last, in case time runs out.
    for c in channels:
        for name, function in steps.items():
            what = {"variant": name, "pixels": pixels, "frames": "step", "channels": c, "dtype": "float32"}
            bench.add(what, lambda f=function, w=what: time_step(bench, w["variant"], f, pixels, w["channels"], copy))
    for name, function in sorted(found.items(), key=lambda item: item[0] != "triton"):
        for c in channels:
            for t in frames:
                n = min(pixels, 26_000 * 16 * 512 // (t * c))
                for dtype in (torch.bfloat16, torch.float32) if t in (3, 16) else (torch.bfloat16,):
                    add_scan(name, function, n, t, c, dtype)
    usual = temporal_mamba_triton.FORWARD
    for block, warps in LAUNCHES if "triton" in found else ():
        temporal_mamba_triton.FORWARD = {"C_BLOCK": block, "num_warps": warps}
        name = f"triton, {block} channels, {warps} warps"
        for dtype in (torch.bfloat16, torch.float32):
            add_scan(name, found["triton"], pixels, frames[0], channels[0], dtype)
    temporal_mamba_triton.FORWARD = usual
    columns = ["variant", "pixels", "frames", "channels", "dtype", "error", "ms", "floor ms", "of bound"]
    bench.finish([*columns, "both ms", "floor both ms", "of bound both", "MiB"])


if __name__ == "__main__":
    main()
