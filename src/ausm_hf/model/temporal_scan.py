"""The scans over time in plain torch: the convolution before them, Mamba-1's and Mamba-2's, over a clip and one frame.

Letters as in `temporal_mamba.py`: N sequences, T frames, C channels, K frames the convolution sees, S state size, H
heads of P channels.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Mamba-2's quadratic form keeps (N, H, T, T) weights; longer clips are cut into chunks of this many frames.
CHUNK_FRAMES = 32
LOG2_E = math.log2(math.e)


def scan_dtype(x: Tensor) -> torch.dtype:
    """What scans compute in: never half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def row_blocks(rows: int, row_size: int, x: Tensor) -> Iterator[slice]:
    """Cuts N into blocks small enough that what is computed for one stays in the cache (on a GPU: in bounded memory).

    Args:
        rows: N. row_size: numbers that one elementwise operation touches per row. x: tells device.
    """
    # On the CPU torch gives each thread at least 32768 numbers of an elementwise operation. Fewer than 131072, and
    # calling operations takes longer than computing; more, and little stays in the cache.
    numbers = 32768 * max(4, torch.get_num_threads()) if x.device.type == "cpu" else 2**22
    step = max(1, numbers // row_size)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def frames(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """The frames of `(N, T, C)`, each with a new axis: 2 gives rows `(N, 1, C)`, 3 columns `(N, C, 1)`."""
    return x.unsqueeze(axis).unbind(1)


class CausalConvFunction(torch.autograd.Function):
    """silu(depthwise convolution): `padded (N, K - 1 + T, C)`, `weight (K, C)`, `bias (C,)` -> `(N, T, C)`.

    K shifted multiply-adds, block by block; the backward pass recomputes what is before the SiLU.
    """

    @staticmethod
    def convolve(padded: Tensor, weight: Tensor, out: Tensor) -> None:
        for k, tap in enumerate(weight):
            out.addcmul_(padded[:, k : k + out.shape[1]], tap)

    @staticmethod
    def forward(ctx, padded, weight, bias):
        ctx.save_for_backward(padded, weight, bias)
        n, _, c = padded.shape
        t = padded.shape[1] - len(weight) + 1
        out = padded.new_empty(n, t, c)
        for rows in row_blocks(n, t * c, padded):
            block = out[rows].copy_(bias)
            CausalConvFunction.convolve(padded[rows], weight, block)
            F.silu(block, inplace=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        padded, weight, bias = ctx.saved_tensors
        n, t, c = grad.shape
        d_padded, d_weight, d_bias = torch.zeros_like(padded), torch.zeros_like(weight), torch.zeros_like(bias)
        for rows in row_blocks(n, t * c, padded):
            before = bias.expand(grad[rows].shape).contiguous()
            CausalConvFunction.convolve(padded[rows], weight, before)
            g = torch.ops.aten.silu_backward(grad[rows], before)
            d_bias += g.sum((0, 1))
            for k in range(len(weight)):
                d_padded[rows, k : k + t].addcmul_(g, weight[k])
                d_weight[k] += torch.mul(g, padded[rows, k : k + t], out=before).sum((0, 1))
        return d_padded, d_weight, d_bias


class SelectiveScanFunction(torch.autograd.Function):
    """Mamba-1's scan: h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = C_t h_t, block by block of sequences.

    Within a block frame by frame, so that the state stays in the cache. Nothing of size T x S per channel outlives a
    block: the backward pass computes the states again. States are `(S, C)` per sequence here, channels last, so that
    inner loops are long. Sums over S or C are products with a row vector, for which the CPU's BLAS is fastest, into
    contiguous memory, without which it takes the sequences one by one.

    Takes x, dt `(N, T, C)`; A `(S, C)`; B, C `(N, T, S)`; state `(N, S, C)` or `None`.
    Returns y `(N, T, C)` and the last state `(N, S, C)`.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, state):
        ctx.save_for_backward(x, dt, A, B, C, state)
        (n, t, c), s = x.shape, len(A)
        rates = A * LOG2_E  # 2 to a power takes half the time of e to a power
        y, last_state = x.new_empty(n, t, c), x.new_empty(n, s, c)
        decays = sums = None
        for rows in row_blocks(n, s * c, x):
            if decays is None or sums is None:  # the first block is the largest; the others reuse its memory
                decays, sums = x.new_empty(rows.stop, s, c), x.new_empty(rows.stop, 1, c)
            size = rows.stop - rows.start
            decay, over_s, h = decays[:size], sums[:size], last_state[rows]
            dts, inflows = frames(dt[rows], 2), frames(dt[rows] * x[rows], 2)
            Bs, Cs, ys = frames(B[rows], 3), frames(C[rows], 2), frames(y[rows], 2)
            before = None if state is None else state[rows]
            for k in range(t):
                if before is None:
                    torch.mul(inflows[k], Bs[k], out=h)
                else:
                    torch.mul(dts[k], rates, out=decay).exp2_()
                    torch.mul(decay, before, out=h).addcmul_(inflows[k], Bs[k])
                before = h
                ys[k].copy_(torch.bmm(Cs[k], h, out=over_s))
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last_state):
        x, dt, A, B, C, state = ctx.saved_tensors
        (n, t, c), s = x.shape, len(A)
        rates = A * LOG2_E
        d_x, d_dt, d_B, d_C = x.new_empty(n, t, c), x.new_empty(n, t, c), x.new_empty(n, t, s), x.new_empty(n, t, s)
        d_state = None if state is None else torch.empty_like(state)
        scratch = None
        for rows in row_blocks(n, s * c, x):
            if scratch is None:
                scratch = x.new_empty(2, t, rows.stop, s, c), x.new_empty(2, rows.stop, s, c)
                sums = x.new_empty(rows.stop, 1, c), x.new_empty(rows.stop, 1, s), x.new_ones(rows.stop, 1, s)
                d_As = x.new_zeros(rows.stop, s, c)
            size = rows.stop - rows.start
            # Of every frame: its decay, and what is left of the state before it.
            decays, lefts = (part.unbind(0) for part in scratch[0][:, :, :size])
            h, g = scratch[1][:, :size]  # the state, and the gradient to it
            over_s, over_c, ones = (part[:size] for part in sums)
            d_A = d_As[:size]
            dts, inflows, Bs, Cs = (
                frames(dt[rows], 2),
                frames(dt[rows] * x[rows], 2),
                frames(B[rows], 3),
                frames(C[rows], 3),
            )
            rows_of_B, d_ys = frames(B[rows], 2), frames(d_y[rows], 2)
            d_inflows, d_dts, d_Bs, d_Cs = (frames(part[rows], 2) for part in (d_x, d_dt, d_B, d_C))
            before = None if state is None else state[rows]
            for k in range(t):
                if before is None:
                    torch.mul(inflows[k], Bs[k], out=h)
                else:
                    torch.mul(dts[k], rates, out=decays[k]).exp2_()
                    torch.mul(decays[k], before, out=lefts[k])
                    torch.addcmul(lefts[k], inflows[k], Bs[k], out=h)
                before = h
                d_Cs[k].copy_(torch.bmm(d_ys[k], h.mT, out=over_c))
            g.copy_(d_last_state[rows])
            for k in range(t - 1, -1, -1):
                g.addcmul_(d_ys[k], Cs[k])
                d_Bs[k].copy_(torch.bmm(inflows[k], g.mT, out=over_c))
                d_inflows[k].copy_(torch.bmm(rows_of_B[k], g, out=over_s))
                if k == 0 and state is None:
                    d_dts[k].zero_()
                else:
                    d_exponent = lefts[k].mul_(g)
                    d_A.addcmul_(d_exponent, dts[k])
                    d_dts[k].copy_(torch.bmm(ones, d_exponent.mul_(A), out=over_s))
                    g.mul_(decays[k])
            d_dt[rows].addcmul_(d_x[rows], x[rows])
            d_x[rows].mul_(dt[rows])
            if d_state is not None:
                d_state[rows] = g
        return d_x, d_dt, d_As.sum(0), d_B, d_C, d_state


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan in plain torch.

    Args:
        x: `(N, T, C)`. dt: `(N, T, C)`, positive. A: `(C, S)`, negative. B, C: `(N, T, S)`.
        state: `(N, C, S)` before the first frame, or `None` for zeros.

    Returns:
        y `(N, T, C)` and the state after the last frame `(N, C, S)`.
    """
    y, state = SelectiveScanFunction.apply(x, dt, A.T.contiguous(), B, C, None if state is None else state.mT)
    return y, state.mT


def advance(
    state: Tensor | None, decay: Callable[[slice], Tensor], inflow: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """One frame of either scan: h = decay h + inflow B, y = C h.

    Args:
        state: `(N, S, C)` before the frame, or `None` for zeros; channels last, so that inner loops are long.
        decay: gives that of a slice of the sequences, `(n, S or 1, C)`.
        inflow: `(N, 1, C)`. B: `(N, S, 1)`. C: `(N, 1, S)`.

    Returns:
        y `(N, 1, C)` and h `(N, S, C)`.
    """
    if C.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        h = inflow * B if state is None else (decay(slice(None)) * state).addcmul_(inflow, B)
        return torch.bmm(C, h), h
    # Block by block, so that what was just written is read from the cache.
    (n, s, _), c = B.shape, inflow.shape[-1]
    y, h = C.new_empty(n, 1, c), C.new_empty(n, s, c)
    for rows in row_blocks(n, s * c, C):
        if state is None:
            torch.mul(inflow[rows], B[rows], out=h[rows])
        else:
            torch.mul(decay(rows), state[rows], out=h[rows]).addcmul_(inflow[rows], B[rows])
        torch.bmm(C[rows], h[rows], out=y[rows])
    return y, h


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One frame of `selective_scan`: x, dt `(N, C)`, B and C `(N, S)`."""
    dt, rates = dt[:, None], A.T.contiguous() * LOG2_E

    def decay(rows: slice) -> Tensor:
        return (dt[rows] * rates).exp2_()

    y, h = advance(None if state is None else state.mT, decay, dt * x[:, None], B[..., None], C[:, None])
    return y[:, 0], h.mT


def ssd_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State-space duality: the scan over a short chunk as attention without softmax, quadratic in T.

    Args:
        x: `(N, T, H, P)`. dt: `(N, T, H)`, positive. A: `(H,)`, negative. B, C: `(N, T, S)`. D: `(H,)`.
        state: `(N, H, P, S)` before the first frame, or `None` for zeros.

    Returns:
        y `(N, T, H, P)` and the state after the last frame `(N, H, P, S)`.
    """
    n, t, h, p = x.shape
    x, dt = x.transpose(1, 2), dt.transpose(1, 2)
    log_decay = dt * A[:, None]  # (N, H, T)
    causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
    # decay[t, s]: what is left at frame t of what came at frame s. Summing the log decays between the two, rather
    # than subtracting cumulative sums, stays exact when some frame in between forgets everything.
    later = log_decay[..., None].masked_fill(~causal.tril(-1), 0)
    decay = later.cumsum(-2).masked_fill(~causal, -torch.inf).exp()
    inflow = decay * dt[..., None, :]
    weights = (C @ B.mT)[:, None] * inflow
    y = (weights + torch.diag_embed(D[:, None].expand(h, t))) @ x
    new_state = ((x * inflow[..., -1, :, None]).mT.reshape(n, h * p, t) @ B).view(n, h, p, -1)
    if state is not None:
        since_start = log_decay.cumsum(-1).exp()
        from_state = (C @ state.reshape(n, h * p, -1).mT).view(n, t, h, p).transpose(1, 2)
        y = y + from_state * since_start[..., None]
        new_state = new_state + state * since_start[..., -1, None, None]
    return y.transpose(1, 2), new_state


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd_chunk` over any number of frames, chunk by chunk."""
    outputs = []
    for first in range(0, x.shape[1], CHUNK_FRAMES):
        part = slice(first, first + CHUNK_FRAMES)
        y, state = ssd_chunk(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state)
        outputs.append(y)
    assert state is not None  # there is at least one frame
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One frame: x `(N, H, P)`, dt `(N, H)`, B and C `(N, S)`, state as in `ssd_chunk`."""
    n, h, p = x.shape
    inflow = (x * dt[..., None]).view(n, 1, h * p)
    decays = (dt * A).exp()[..., None].expand(n, h, p).reshape(n, 1, h * p)  # all channels of a head decay alike
    if state is not None:
        state = state.reshape(n, h * p, -1).mT
    y, state = advance(state, lambda rows: decays[rows], inflow, B[..., None], C[:, None])
    return torch.addcmul(y.view(n, h, p), x, D[:, None]), state.mT.reshape(n, h, p, -1)
