"""Mamba-1's scan over few frames of very many sequences, as Triton kernels: forward, backward, and the single step.

`temporal_mamba.py` uses it on CUDA, once it has given the right numbers there. How fast it is on an H100:
benchmarks/README.md.

A program takes one block of channels of one sequence after another, and keeps the state of that block, `(S, BLOCK)`,
in the registers of a single warp. Going forward a lane holds all S numbers of its channels, so y needs no exchange
between lanes. Nothing is read or written twice but B and C. The state is computed again in the backward pass, two
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
        """max(x, 0) + log1p(e^-|x|), by a polynomial of degree 9 without the division; relative error 2e-7."""
        e = tl.exp2(tl.abs(x) * -LOG2_E)
        p = e * 0.005232629366219044 - 0.029504986479878426
        p = p * e + 0.07822556048631668
        p = p * e - 0.13663214445114136
        p = p * e + 0.1910599321126938
        p = p * e - 0.2484297901391983
        p = p * e + 0.3331909775733948
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
        return tl.maximum(x, 0) + p * e

    @triton.jit
    def _sigmoid(x):
        """By the root's reciprocal squared: two instructions, where Triton's division takes five."""
        r = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
        return r * r

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
    def _forward_frame(h, x, dt, B, C, z, bias, D, rates, y, has_c):
        """One frame forward, from what was loaded before: stores y, returns the state."""
        x = x.to(tl.float32)
        delta = _softplus(dt.to(tl.float32) + bias)
        h, decay = _advance(h, x, delta, B, rates)
        z = z.to(tl.float32)
        tl.store(y, (tl.sum(h * C[:, None], 0) + D * x) * z * _sigmoid(z), mask=has_c)
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
            x_, dt_, gate_ = x + n * x_n + c, dt + n * dt_n + c, gate + n * gate_n + c
            B_, C_, y_ = B + n * B_n + s, C + n * C_n + s, y + n * T * channels + c
            if HAS_STATE:
                h = tl.load(state + n * S * channels + tile, mask=has, other=0)
            else:
                h = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
            x0, dt0 = tl.load(x_, mask=has_c, other=0), tl.load(dt_, mask=has_c, other=0)
            z0 = tl.load(gate_, mask=has_c, other=0)
            B0, C0 = tl.load(B_, mask=has_s, other=0), tl.load(C_, mask=has_s, other=0)
            # The next frame is on its way while this one is computed; carried over the loop's end, its loads can't be
            # moved by the compiler to where they are used. The last frame is loaded twice.
            for t in range(T):
                u = tl.minimum(t + 1, T - 1)
                x1, dt1 = tl.load(x_ + u * x_t, mask=has_c, other=0), tl.load(dt_ + u * dt_t, mask=has_c, other=0)
                z1 = tl.load(gate_ + u * gate_t, mask=has_c, other=0)
                B1, C1 = tl.load(B_ + u * B_t, mask=has_s, other=0), tl.load(C_ + u * C_t, mask=has_s, other=0)
                h = _forward_frame(h, x0, dt0, B0, C0, z0, bias, D_, rates, y_ + t * channels, has_c)
                x0, dt0, z0, B0, C0 = x1, dt1, z1, B1, C1
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
        sigmoid = _sigmoid(z)
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
        d_delta = tl.sum(d_exponent * A, 0) * (1 / LOG2_E) + d_inflow * x
        d_raw = tl.where(live, d_delta * _sigmoid(raw), 0.0)
        sum_bias += d_raw
        tl.store(d_x + row * channels + c, d_inflow * delta + d_out * D, mask=has_c & live)
        tl.store(d_dt + row * channels + c, d_raw, mask=has_c & live)
        return g, sum_A, sum_D, sum_bias

    @triton.jit
    def _backward_kernel(
        x, dt, A, B, C, D, dt_bias, gate, state, d_y, d_last_state, scratch,
        d_x, d_dt, d_A, d_B, d_C, d_D, d_bias, d_gate, d_state,
        N, T, channels, x_n, x_t, dt_n, dt_t, B_n, B_t, C_n, C_t, gate_n, gate_t,
        HAS_STATE: tl.constexpr, HAS_D_STATE: tl.constexpr,
        S: tl.constexpr, S_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ):  # fmt: skip
        c = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
        s = tl.arange(0, S_BLOCK)
        has_c, has_s = c < channels, s < S
        tile, has = s[:, None] * channels + c[None, :], has_s[:, None] & has_c[None, :]
        rates = tl.load(A + tile, mask=has, other=0) * LOG2_E
        D_, bias = tl.load(D + c, mask=has_c, other=0), tl.load(dt_bias + c, mask=has_c, other=0)
        sum_A = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
        sum_D, sum_bias = tl.zeros((C_BLOCK,), tl.float32), tl.zeros((C_BLOCK,), tl.float32)
        pairs = tl.cdiv(T, 2)
        own = scratch + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * pairs * (
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
            # The state before every second frame. A lane reads back only what it has written itself.
            for pair in range(pairs):
                tl.store(own + pair * (S_BLOCK * C_BLOCK) + in_scratch, h)
                if pair + 1 < pairs:
                    for t in range(2 * pair, 2 * pair + 2):
                        xt, dtt, Bt = _load_frame(x_, dt_, B_, t, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                        xt, raw, delta, Bt = _widen(xt, dtt, Bt, bias, t < T)
                        h, decay = _advance(h, xt, delta, Bt, rates)
            if HAS_D_STATE:
                g = tl.load(d_last_state + n * S * channels + tile, mask=has, other=0)
            else:
                g = tl.zeros((S_BLOCK, C_BLOCK), tl.float32)
            for back in range(pairs):
                pair = pairs - 1 - back
                t = 2 * pair
                h0 = tl.load(own + pair * (S_BLOCK * C_BLOCK) + in_scratch)
                x0, dt0, B0 = _load_frame(x_, dt_, B_, t, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                x1, dt1, B1 = _load_frame(x_, dt_, B_, t + 1, T, x_t, dt_t, B_t, c, has_c, s, has_s)
                x0, raw0, delta0, B0 = _widen(x0, dt0, B0, bias, t < T)
                h1, decay0 = _advance(h0, x0, delta0, B0, rates)
                x1, raw1, delta1, B1 = _widen(x1, dt1, B1, bias, t + 1 < T)
                h2, decay1 = _advance(h1, x1, delta1, B1, rates)
                C1, z1 = _load_output(C_, gate_, t + 1, T, C_t, gate_t, has_c, s, has_s)
                d_y1 = tl.load(d_y_ + (t + 1) * channels, mask=has_c & (t + 1 < T), other=0)
                C0, z0 = _load_output(C_, gate_, t, T, C_t, gate_t, has_c, s, has_s)
                d_y0 = tl.load(d_y_ + t * channels, mask=has_c & (t < T), other=0)
                g, sum_A, sum_D, sum_bias = _retreat(
                    g, h1, h2, decay1, x1, raw1, delta1, B1, C1, z1, d_y1, sum_A, sum_D, sum_bias, rates, D_, t + 1, T,
                    n, channels, d_x, d_dt, d_B, d_C, d_gate, c, has_c, s, has_s, S,
                )  # fmt: skip
                g, sum_A, sum_D, sum_bias = _retreat(
                    g, h0, h1, decay0, x0, raw0, delta0, B0, C0, z0, d_y0, sum_A, sum_D, sum_bias, rates, D_, t, T,
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
        ctx.set_materialize_grads(False)  # zeros for the last state would be written and read for nothing
        x, dt, B, C, gate = (_rows(tensor) for tensor in (x, dt, B, C, gate))
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, gate, state)
        B, C = B.float(), C.float()  # small, and otherwise converted once for every 64 channels
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
        if d_y is None:
            d_y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        of_B, of_C, B, C = B.dtype, C.dtype, B.float(), C.float()
        (n, t, channels), s = x.shape, len(A)
        grid, sizes, constants = TritonScanFunction.shape(BLOCK, x, A, x, dt, B, C, gate)
        programs = grid[0]
        new = {"dtype": torch.float32, "device": x.device}
        scratch = torch.empty(programs * grid[1], triton.cdiv(t, 2), constants["S_BLOCK"], BLOCK, **new)
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
            A if d_last_state is None else d_last_state.contiguous(), scratch,
            d_x, d_dt, d_A, d_B, d_C, d_D, d_bias, d_gate, A if state is None else d_state, *sizes,
            HAS_STATE=state is not None, HAS_D_STATE=d_last_state is not None, C_BLOCK=BLOCK, num_warps=1, **constants,
        )  # fmt: skip
        d_B, d_C = d_B.to(of_B), d_C.to(of_C)
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
