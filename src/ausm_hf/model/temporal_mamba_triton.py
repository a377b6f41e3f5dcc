"""Mamba-1's scan over few frames of very many sequences, as Triton kernels: forward, backward, and the single step.

`temporal_mamba.py` uses it on CUDA, once it has given the right numbers there. How fast it is on an H100:
benchmarks/README.md.

A program takes one block of channels of one sequence after another, and keeps the state of that block, `(S, BLOCK)`,
in the registers of a single warp. Going forward a lane holds all S numbers of its channels, so y needs no exchange
between lanes. Nothing is read or written twice but B and C. The state is computed again in the backward pass, four
frames at a time from checkpoints in a scratch memory whose size depends on the number of programs and not on N.

Letters as in `temporal_mamba.py`: N sequences, T frames, C channels, S state size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .temporal_scan import selective_scan

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

FORWARD = {"C_BLOCK": 64, "num_warps": 1}  # channels of a program going forward, and its warps
BLOCK = 32  # channels of a program going backward
PROGRAMS = 132 * 24  # how many run at a time on a large GPU: what exceeds it only waits

# What the kernel that goes forward is not told to be aligned: where Triton knows that rows are, it gives neighbouring
# channels to a lane and spreads their states over other lanes, which then have to exchange numbers for every frame.
UNALIGNED = ["channels", "D", "dt_bias", "x_n", "x_t", "dt_n", "dt_t", "gate_n", "gate_t"]

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def _softplus(x):
        """max(x, 0) + log1p(e^-|x|), the logarithm by the series of atanh: the GPU's own loses digits near log(1)."""
        e = tl.exp(-tl.abs(x))
        z = e / (2 + e)
        z2 = z * z
        series = 1 / 13 + z2 * (1 / 15)
        series = 1 / 9 + z2 * (1 / 11 + z2 * series)
        series = 1 / 5 + z2 * (1 / 7 + z2 * series)
        return tl.maximum(x, 0) + 2 * z * (1 + z2 * (1 / 3 + z2 * series))

    @triton.jit
    def _load_frame(x, dt, B, t, T, x_t, dt_t, B_t, c, has_c, s, has_s):
        """x, the time step before its bias, and B of one frame; past the end zeros."""
        x_ = tl.load(x + t * x_t + c, mask=has_c & (t < T), other=0)
        dt_ = tl.load(dt + t * dt_t + c, mask=has_c & (t < T), other=0)
        B_ = tl.load(B + t * B_t + s, mask=has_s & (t < T), other=0)
        return x_, dt_, B_

    @triton.jit
    def _widen(x, dt, B, dt_bias, live):
        """x, the time step before and after softplus, and B in float32; a frame past the end changes nothing."""
        raw = dt.to(tl.float32) + dt_bias
        return x.to(tl.float32), raw, tl.where(live, _softplus(raw), 0.0), B.to(tl.float32)

    @triton.jit
    def _load_output(C, gate, t, T, C_t, gate_t, has_c, s, has_s):
        """C and the gate of one frame; past the end zeros."""
        C_ = tl.load(C + t * C_t + s, mask=has_s & (t < T), other=0)
        return C_, tl.load(gate + t * gate_t, mask=has_c & (t < T), other=0)

    @triton.jit
    def _advance(h, x, delta, B, rates):
        """The state after a frame, and the decay in it."""
        decay = tl.exp2(delta[None, :] * rates)
        return decay * h + B[:, None] * (delta * x)[None, :], decay

    @triton.jit
    def _forward_frame(h, x, dt, B, C, z, dt_bias, D, rates, y, live, has_c):
        """One frame forward, from what was loaded before: stores y, returns the state."""
        x, raw, delta, B = _widen(x, dt, B, dt_bias, live)
        h, decay = _advance(h, x, delta, B, rates)
        z = z.to(tl.float32)
        y_ = (tl.sum(h * C.to(tl.float32)[:, None], 0) + D * x) * z / (1 + tl.exp(-z))
        tl.store(y, y_, mask=has_c & live)
        return h

    @triton.jit(do_not_specialize=UNALIGNED)
    def _forward_kernel(
        x, dt, A, B, C, D, dt_bias, gate, state, y, last_state,
        N, T, channels, x_n, x_t, dt_n, dt_t, B_n, B_t, C_n, C_t, gate_n, gate_t,
        HAS_STATE: tl.constexpr, S: tl.constexpr, S_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ):  # fmt: skip
        c = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
        s = tl.arange(0, S_BLOCK)
        has_c, has_s = c < channels, s < S
        tile, has = s[:, None] * channels + c[None, :], has_s[:, None] & has_c[None, :]
        rates = tl.load(A + tile, mask=has, other=0) * LOG2_E
        D_, bias = tl.load(D + c, mask=has_c, other=0), tl.load(dt_bias + c, mask=has_c, other=0)
        for sequence in range(tl.program_id(0), N, tl.num_programs(0)):
            n = tl.cast(sequence, tl.int64)
            x_, dt_, B_ = x + n * x_n, dt + n * dt_n, B + n * B_n
            C_, gate_, y_ = C + n * C_n, gate + n * gate_n + c, y + n * T * channels + c
            if HAS_STATE:
                h = tl.load(state + n * S * channels + tile, mask=has, other=0)
            else:
                h = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
            # All loads of two frames first, so that they wait for memory together.
            for t in range(0, T, 2):
                x0, dt0, B0 = _load_frame(x_, dt_, B_, t, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                C0, z0 = _load_output(C_, gate_, t, T, C_t, gate_t, has_c, s, has_s)
                x1, dt1, B1 = _load_frame(x_, dt_, B_, t + 1, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                C1, z1 = _load_output(C_, gate_, t + 1, T, C_t, gate_t, has_c, s, has_s)
                y0, y1 = y_ + t * channels, y_ + (t + 1) * channels
                h = _forward_frame(h, x0, dt0, B0, C0, z0, bias, D_, rates, y0, t < T, has_c)
                h = _forward_frame(h, x1, dt1, B1, C1, z1, bias, D_, rates, y1, t + 1 < T, has_c)
            tl.store(last_state + n * S * channels + tile, h, mask=has)

    @triton.jit
    def _retreat(
        g, h_before, h, decay, x, raw, delta, B, C, z, d_out, sum_A, sum_D, sum_bias, A, D, t, T, n, channels,
        d_x, d_dt, d_B, d_C, d_gate, c, has_c, s, has_s, S: tl.constexpr,
    ):  # fmt: skip
        """One frame backward: g is the gradient to the state after it, and becomes the one to the state before."""
        live = t < T
        row = n * T + t
        C, z, d_out = C.to(tl.float32), z.to(tl.float32), d_out.to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-z))
        ungated = tl.sum(h * C[:, None], 0) + D * x
        tl.store(d_gate + row * channels + c, d_out * ungated * sigmoid * (1 + z * (1 - sigmoid)), mask=has_c & live)
        d_out = d_out * z * sigmoid
        sum_D += d_out * x
        tl.atomic_add(d_C + row * S + s, tl.sum(h * d_out[None, :], 1), mask=has_s & live, sem="relaxed")
        g += C[:, None] * d_out[None, :]
        tl.atomic_add(d_B + row * S + s, tl.sum(g * (delta * x)[None, :], 1), mask=has_s & live, sem="relaxed")
        d_inflow = tl.sum(g * B[:, None], 0)
        g = g * decay
        d_exponent = g * h_before
        sum_A += d_exponent * delta[None, :]
        d_delta = tl.sum(d_exponent * A, 0) + d_inflow * x
        d_raw = tl.where(live, d_delta / (1 + tl.exp(-raw)), 0.0)
        sum_bias += d_raw
        tl.store(d_x + row * channels + c, d_inflow * delta + d_out * D, mask=has_c & live)
        tl.store(d_dt + row * channels + c, d_raw, mask=has_c & live)
        return g, sum_A, sum_D, sum_bias

    @triton.jit
    def _backward_kernel(
        x, dt, A, B, C, D, dt_bias, gate, state, d_y, d_last_state, scratch,
        d_x, d_dt, d_A, d_B, d_C, d_D, d_bias, d_gate, d_state,
        N, T, channels, x_n, x_t, dt_n, dt_t, B_n, B_t, C_n, C_t, gate_n, gate_t,
        HAS_STATE: tl.constexpr, S: tl.constexpr, S_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ):  # fmt: skip
        c = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
        s = tl.arange(0, S_BLOCK)
        has_c, has_s = c < channels, s < S
        tile, has = s[:, None] * channels + c[None, :], has_s[:, None] & has_c[None, :]
        A_ = tl.load(A + tile, mask=has, other=0)
        rates = A_ * LOG2_E
        D_, bias = tl.load(D + c, mask=has_c, other=0), tl.load(dt_bias + c, mask=has_c, other=0)
        sum_A = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
        sum_D, sum_bias = tl.zeros((C_BLOCK,), tl.float32), tl.zeros((C_BLOCK,), tl.float32)
        quarters = tl.cdiv(T, 4)
        own = scratch + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * quarters * (
            S_BLOCK * C_BLOCK
        )
        in_scratch = s[:, None] * C_BLOCK + tl.arange(0, C_BLOCK)[None, :]
        for sequence in range(tl.program_id(0), N, tl.num_programs(0)):
            n = tl.cast(sequence, tl.int64)
            x_, dt_, B_ = x + n * x_n, dt + n * dt_n, B + n * B_n
            C_, gate_, d_y_ = C + n * C_n, gate + n * gate_n + c, d_y + n * T * channels + c
            if HAS_STATE:
                h = tl.load(state + n * S * channels + tile, mask=has, other=0)
            else:
                h = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
            # The state before every fourth frame. A lane reads back only what it has written itself.
            for quarter in range(quarters):
                tl.store(own + quarter * (S_BLOCK * C_BLOCK) + in_scratch, h)
                if quarter + 1 < quarters:
                    for t in range(4 * quarter, 4 * quarter + 4):
                        xt, dtt, Bt = _load_frame(x_, dt_, B_, t, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                        xt, raw, delta, Bt = _widen(xt, dtt, Bt, bias, t < T)
                        h, decay = _advance(h, xt, delta, Bt, rates)
            g = tl.load(d_last_state + n * S * channels + tile, mask=has, other=0)
            for back in range(quarters):
                quarter = quarters - 1 - back
                t = 4 * quarter
                h0 = tl.load(own + quarter * (S_BLOCK * C_BLOCK) + in_scratch)
                x0, dt0, B0 = _load_frame(x_, dt_, B_, t, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                x1, dt1, B1 = _load_frame(x_, dt_, B_, t + 1, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                x2, dt2, B2 = _load_frame(x_, dt_, B_, t + 2, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                x3, dt3, B3 = _load_frame(x_, dt_, B_, t + 3, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                C3, z3 = _load_output(C_, gate_, t + 3, T, C_t, gate_t, has_c, s, has_s)
                d_y3 = tl.load(d_y_ + (t + 3) * channels, mask=has_c & (t + 3 < T), other=0)
                C2, z2 = _load_output(C_, gate_, t + 2, T, C_t, gate_t, has_c, s, has_s)
                d_y2 = tl.load(d_y_ + (t + 2) * channels, mask=has_c & (t + 2 < T), other=0)
                x0, raw0, delta0, B0 = _widen(x0, dt0, B0, bias, t < T)
                h1, decay0 = _advance(h0, x0, delta0, B0, rates)
                x1, raw1, delta1, B1 = _widen(x1, dt1, B1, bias, t + 1 < T)
                h2, decay1 = _advance(h1, x1, delta1, B1, rates)
                x2, raw2, delta2, B2 = _widen(x2, dt2, B2, bias, t + 2 < T)
                h3, decay2 = _advance(h2, x2, delta2, B2, rates)
                x3, raw3, delta3, B3 = _widen(x3, dt3, B3, bias, t + 3 < T)
                h4, decay3 = _advance(h3, x3, delta3, B3, rates)
                g, sum_A, sum_D, sum_bias = _retreat(
                    g, h3, h4, decay3, x3, raw3, delta3, B3, C3, z3, d_y3, sum_A, sum_D, sum_bias, A_, D_, t + 3, T,
                    n, channels, d_x, d_dt, d_B, d_C, d_gate, c, has_c, s, has_s, S,
                )  # fmt: skip
                C1, z1 = _load_output(C_, gate_, t + 1, T, C_t, gate_t, has_c, s, has_s)
                d_y1 = tl.load(d_y_ + (t + 1) * channels, mask=has_c & (t + 1 < T), other=0)
                g, sum_A, sum_D, sum_bias = _retreat(
                    g, h2, h3, decay2, x2, raw2, delta2, B2, C2, z2, d_y2, sum_A, sum_D, sum_bias, A_, D_, t + 2, T,
                    n, channels, d_x, d_dt, d_B, d_C, d_gate, c, has_c, s, has_s, S,
                )  # fmt: skip
                C0, z0 = _load_output(C_, gate_, t, T, C_t, gate_t, has_c, s, has_s)
                d_y0 = tl.load(d_y_ + t * channels, mask=has_c & (t < T), other=0)
                g, sum_A, sum_D, sum_bias = _retreat(
                    g, h1, h2, decay1, x1, raw1, delta1, B1, C1, z1, d_y1, sum_A, sum_D, sum_bias, A_, D_, t + 1, T,
                    n, channels, d_x, d_dt, d_B, d_C, d_gate, c, has_c, s, has_s, S,
                )  # fmt: skip
                g, sum_A, sum_D, sum_bias = _retreat(
                    g, h0, h1, decay0, x0, raw0, delta0, B0, C0, z0, d_y0, sum_A, sum_D, sum_bias, A_, D_, t, T,
                    n, channels, d_x, d_dt, d_B, d_C, d_gate, c, has_c, s, has_s, S,
                )  # fmt: skip
            if HAS_STATE:
                tl.store(d_state + n * S * channels + tile, g, mask=has)
        part = tl.program_id(0).to(tl.int64)
        tl.store(d_A + part * S * channels + tile, sum_A, mask=has)
        tl.store(d_D + part * channels + c, sum_D, mask=has_c)
        tl.store(d_bias + part * channels + c, sum_bias, mask=has_c)


def _rows(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, as the kernels want it; any stride of the others will do."""
    return x if x.stride(-1) == 1 else x.contiguous()


class TritonScanFunction(torch.autograd.Function):
    """Takes x, dt, gate `(N, T, C)`; A `(S, C)`; B, C `(N, T, S)`; D, dt_bias `(C,)`; state `(N, S, C)` or `None`."""

    @staticmethod
    def shape(block: int, x: Tensor, A: Tensor, *by_row: Tensor):
        """The grid, the sizes and strides that both kernels take, and the sizes known when they are compiled."""
        (n, t, channels), s = x.shape, len(A)
        blocks = triton.cdiv(channels, block)
        grid = (min(n, triton.cdiv(PROGRAMS, blocks)), blocks)
        strides = [stride for tensor in by_row for stride in tensor.stride()[:2]]
        return grid, [n, t, channels, *strides], {"S": s, "S_BLOCK": triton.next_power_of_2(s)}

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, gate, state):
        x, dt, B, C, gate = (_rows(tensor) for tensor in (x, dt, B, C, gate))
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, gate, state)
        (n, t, channels), s = x.shape, len(A)
        y = torch.empty(n, t, channels, dtype=x.dtype, device=x.device)
        last_state = torch.empty(n, s, channels, dtype=torch.float32, device=x.device)
        grid, sizes, constants = TritonScanFunction.shape(FORWARD["C_BLOCK"], x, A, x, dt, B, C, gate)
        _forward_kernel[grid](
            x, dt, A, B, C, D, dt_bias, gate, A if state is None else state, y, last_state, *sizes,
            HAS_STATE=state is not None, **FORWARD, **constants,
        )  # fmt: skip
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last_state):
        x, dt, A, B, C, D, dt_bias, gate, state = ctx.saved_tensors
        (n, t, channels), s = x.shape, len(A)
        grid, sizes, constants = TritonScanFunction.shape(BLOCK, x, A, x, dt, B, C, gate)
        programs = grid[0]
        new = {"dtype": torch.float32, "device": x.device}
        scratch = torch.empty(programs * grid[1], triton.cdiv(t, 4), constants["S_BLOCK"], BLOCK, **new)
        d_x, d_dt, d_gate = (
            torch.empty(n, t, channels, dtype=tensor.dtype, device=x.device) for tensor in (x, dt, gate)
        )
        d_B, d_C = torch.zeros(2, n, t, s, **new)
        # Sums over N: one part per program.
        d_A, d_D, d_bias = (
            torch.empty(programs, *shape, **new) for shape in ((s, channels), (channels,), (channels,))
        )
        d_state = None if state is None else torch.empty_like(state)
        _backward_kernel[grid](
            x, dt, A, B, C, D, dt_bias, gate, A if state is None else state, d_y.contiguous(),
            d_last_state.contiguous(), scratch, d_x, d_dt, d_A, d_B, d_C, d_D, d_bias, d_gate,
            A if state is None else d_state, *sizes,
            HAS_STATE=state is not None, C_BLOCK=BLOCK, num_warps=1, **constants,
        )  # fmt: skip
        d_B, d_C = d_B.to(B.dtype), d_C.to(C.dtype)
        return d_x, d_dt, d_A.sum(0), d_B, d_C, d_D.sum(0), d_bias.sum(0), d_gate, d_state


def triton_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan with all that surrounds it: (scan(x, softplus(dt + dt_bias)) + D x) silu(gate).

    Args:
        x, dt, gate: `(N, T, C)`. B, C: `(N, T, S)`. Each in float32, bfloat16 or float16.
        A: `(C, S)`, negative. D, dt_bias: `(C,)`. float32.
        state: `(N, C, S)` before the first frame, float32, or `None` for zeros.

    Returns:
        y `(N, T, C)` in x's dtype and the state after the last frame `(N, C, S)`, float32.
    """
    state = None if state is None else state.mT.contiguous()
    y, state = TritonScanFunction.apply(x, dt, A.T.contiguous(), B, C, D, dt_bias, gate, state)
    return y, state.mT


def check_triton_scan(device: torch.device | str) -> bool:
    """Whether the kernels are there and give on this device what plain torch gives in float64, gradients too."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, t, c, s = 5, 6, 40, 16
    x, dt, gate, B, C = random(n, t, c), random(n, t, c), random(n, t, c), random(n, t, s), random(n, t, s)
    inputs = [x, dt, -random(c, s).abs(), B, C, random(c), random(c), gate, random(n, c, s)]
    d_y, d_state = random(n, t, c), random(n, c, s)

    def plain(x, dt, A, B, C, D, dt_bias, gate, state):
        y, state = selective_scan(x, torch.nn.functional.softplus(dt + dt_bias), A, B, C, state)
        return (y + D * x) * torch.nn.functional.silu(gate), state

    def results(function, device, wide, narrow):
        by_row = {0, 1, 3, 4, 7}  # x, dt, B, C and gate
        moved = [t.to(device, narrow if i in by_row else wide).requires_grad_() for i, t in enumerate(inputs)]
        with torch.enable_grad():
            outputs = function(*moved)
        grads = torch.autograd.grad(outputs, moved, [d_y.to(device, narrow), d_state.to(device, wide)])
        return [tensor.detach().double().cpu() for tensor in (*outputs, *grads)]

    wanted = results(plain, "cpu", torch.float64, torch.float64)
    return all(
        (a - b).norm() <= tolerance * b.norm()
        for narrow, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2))
        for a, b in zip(results(triton_scan, device, torch.float32, narrow), wanted)
    )
