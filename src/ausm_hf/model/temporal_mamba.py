"""Mamba over time: the mixer that carries the history of every pixel from frame to frame.

Each mixer computes the same thing in three ways: fused kernels on CUDA (those of `mamba-ssm` and `causal-conv1d` where
installed, and for Mamba-1 also the Triton kernels beside this file), plain torch everywhere else, and a single step
when there is one frame. The regime is unusual for Mamba:
sequences are short and there are tens of thousands of them.

Letters: N sequences (pixels x batch), T frames (1 to 64), D hidden size, C inner channels, K frames the convolution
sees, S state size; in Mamba-2 also H heads of P channels, C = H P, and G groups of heads.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Mamba-2's quadratic form keeps (N, H, T, T) weights; longer clips are cut into chunks of this many frames.
CHUNK_FRAMES = 32
LOG2_E = math.log2(math.e)

MixerState = tuple[Tensor, Tensor]


# Fused kernels


def without_kernels(package: str, install: str) -> None:
    logger.warning_once(
        f"`{package}` is not importable: the temporal mixer runs without its kernels on this GPU, which gives the same"
        f" result with more memory and time. Install it with `{install}`."
    )


@functools.cache
def mamba_kernels(device_type: str):
    """`(selective_scan_fn, mamba_chunk_scan_combined)` of mamba-ssm on a CUDA device where importable, or `None`."""
    if device_type != "cuda":
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        # In an isolated build mamba-ssm doesn't see the installed torch, and comes without its CUDA part.
        without_kernels("mamba_ssm", "pip install --no-build-isolation mamba-ssm")
        return None
    return selective_scan_fn, mamba_chunk_scan_combined


@functools.cache
def conv_kernel(device_type: str):
    """`causal_conv1d_fn` of causal-conv1d on a CUDA device where importable, or `None`."""
    if device_type != "cuda":
        return None
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        without_kernels("causal_conv1d", "pip install --no-build-isolation causal-conv1d")
        return None
    return causal_conv1d_fn


def triton_kernel(device_type: str):
    """This package's own scan for CUDA, or `None` where Triton is missing or its kernels are not right."""
    # A compiler makes kernels of its own from plain torch, and can't trace the check.
    return None if device_type != "cuda" or torch.compiler.is_compiling() else checked_triton_kernel()


@functools.cache
def checked_triton_kernel():
    """Not every GPU has run the kernels: before their first use they must give the numbers of plain torch."""
    from .temporal_mamba_triton import check_triton_scan, triton, triton_scan

    if triton is None:
        return None
    try:
        right = check_triton_scan("cuda", selective_scan)
        fault = "they give wrong numbers"
    except Exception as error:  # Triton has many kinds, one for each thing that may be amiss with compiler or driver
        right, fault = False, repr(error)
    if not right:
        logger.warning_once(f"The temporal mixer runs without its Triton kernels on this GPU: {fault}.")
    return triton_scan if right else None


# Plain torch


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


def causal_conv(x: Tensor, conv1d: nn.Conv1d, conv_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, then SiLU.

    Args:
        x: `(N, T, C)`.
        conv1d: holds `weight (C, 1, K)` and `bias (C,)`.
        conv_state: `(N, C, K - 1)`, the K - 1 inputs before x, or `None` for zeros.

    Returns:
        Output `(N, T, C)` in x's dtype and the new conv_state.
    """
    n, t, c = x.shape
    kernel = conv1d.kernel_size[0]
    before = x.new_zeros(n, kernel - 1, c) if conv_state is None else conv_state.to(x.dtype).mT
    new_state = torch.cat([before[:, t:], x[:, max(0, t - kernel + 1) :]], dim=1)
    new_state = new_state.mT.to(scan_dtype(x), memory_format=torch.contiguous_format)
    weight, bias = conv1d.weight[:, 0].to(x.dtype), conv1d.bias.to(x.dtype)
    if t == 1:
        window = torch.cat([before, x], dim=1)
        return F.silu((window * weight.T).sum(1, keepdim=True) + bias), new_state
    # The fused kernel knows these widths and types only, and reads 8 channels at once.
    fits = 2 <= kernel <= 4 and c % 8 == 0 and x.dtype != torch.float64
    if fits and (causal_conv1d_fn := conv_kernel(x.device.type)):
        states = None if conv_state is None else before.contiguous().mT  # (N, C, K - 1), channels last in memory
        out = causal_conv1d_fn(x.contiguous().mT, weight, bias, initial_states=states, activation="silu")
        return out.mT, new_state
    return CausalConvFunction.apply(torch.cat([before, x], dim=1), weight.T.contiguous(), bias), new_state


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
            if decays is None:  # the first block is the largest; the others reuse its memory
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
            if state is not None:
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


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One frame of `selective_scan`: x, dt `(N, C)`, B and C `(N, S)`."""
    inflow = dt * x
    if state is None:
        return inflow * (B * C).sum(-1, keepdim=True), (inflow[:, None] * B[..., None]).mT
    state = ((dt[:, None] * (A.T * LOG2_E)).exp2_() * state.mT).addcmul_(inflow[:, None], B[..., None])
    return torch.bmm(C[:, None], state)[:, 0], state.mT


def ssd_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State-space duality: the scan over a short chunk as attention without softmax, quadratic in T.

    Args:
        x: `(N, T, H, P)`. dt: `(N, T, H)`, positive. A: `(H,)`, negative. B, C: `(N, T, G, S)`. D: `(H,)`.
        state: `(N, H, P, S)` before the first frame, or `None` for zeros.

    Returns:
        y `(N, T, H, P)` and the state after the last frame `(N, H, P, S)`.
    """
    n, t, h, p = x.shape
    g, s = B.shape[2:]
    x, dt, B, C = x.transpose(1, 2), dt.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
    log_decay = dt * A[:, None]  # (N, H, T)
    causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
    # decay[t, s]: what is left at frame t of what came at frame s. Summing the log decays between the two, rather
    # than subtracting cumulative sums, stays exact when some frame in between forgets everything.
    later = log_decay[..., None].masked_fill(~causal.tril(-1), 0)
    decay = later.cumsum(-2).masked_fill(~causal, -torch.inf).exp()
    inflow = decay * dt[..., None, :]
    weights = ((C @ B.mT)[:, :, None] * inflow.view(n, g, h // g, t, t)).view(n, h, t, t)
    y = (weights + torch.diag_embed(D[:, None].expand(h, t))) @ x
    new_state = (x * inflow[..., -1, :, None]).mT.reshape(n, g, h // g * p, t) @ B
    new_state = new_state.view(n, h, p, s)
    if state is not None:
        since_start = log_decay.cumsum(-1).exp()
        from_state = C @ state.reshape(n, g, h // g * p, s).mT  # (N, G, T, H/G * P)
        from_state = from_state.view(n, g, t, h // g, p).transpose(2, 3).reshape(n, h, t, p)
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
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One frame: x `(N, H, P)`, dt `(N, H)`, B and C `(N, G, S)`, state as in `ssd_chunk`."""
    n, h, p = x.shape
    g, s = B.shape[1:]
    inflow = (x * dt[..., None]).view(n, g, h // g * p, 1)
    if state is None:
        state = inflow * B[:, :, None]
    else:
        state = state * (dt * A).exp()[..., None, None]
        state = state.reshape(n, g, h // g * p, s).addcmul_(inflow, B[:, :, None])
    y = (state @ C[..., None]).view(n, h, p)
    return torch.addcmul(y, x, D[:, None]), state.view(n, h, p, s)


def fused_ssd_scan(
    kernel, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` by mamba-ssm's kernel, which takes dt before its bias and softplus."""
    t = x.shape[1]
    chunk = min(256, max(16, 2 ** (t - 1).bit_length()))
    # Sequences x chunks is the kernel's second grid axis, and CUDA allows 65535 there.
    limit = 65535 // math.ceil(t / chunk)
    outputs, states = [], []
    for first in range(0, len(x), limit):
        rows = slice(first, first + limit)
        y, last = kernel(
            x[rows],
            dt[rows],
            A,
            B[rows],
            C[rows],
            chunk,
            D=D,
            dt_bias=dt_bias,
            initial_states=None if state is None else state[rows],
            dt_softplus=True,
            return_final_states=True,
        )
        outputs.append(y)
        states.append(last)
    return torch.cat(outputs), torch.cat(states)


# The mixers


class GatedRMSNorm(nn.Module):
    """RMSNorm of `x * silu(gate)` within each of `n_groups` groups of channels."""

    def __init__(self, channels: int, n_groups: int, eps: float = 1e-5):
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = (x * F.silu(gate)).unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight


def reset_projections(*layers: nn.Linear | nn.Conv1d) -> None:
    """torch's own initialisation, by transformers' functions, which leave loaded parameters alone."""
    for layer in layers:
        init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if layer.bias is not None:
            bound = layer.weight[0].numel() ** -0.5
            init.uniform_(layer.bias, -bound, bound)


def initial_dt_bias(like: Tensor) -> Tensor:
    """Biases such that softplus(bias) is log-uniform in [0.001, 0.1]: some channels forget fast, some slowly."""
    dt = torch.exp(torch.empty_like(like).uniform_(math.log(0.001), math.log(0.1)))
    return dt + torch.log(-torch.expm1(-dt))


class TemporalMixer(nn.Module):
    """What both mixers share: their state, and the check of what goes in."""

    hidden_size: int
    conv1d: nn.Conv1d
    ssm_shape: tuple[int, ...]

    def state_shapes(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (n, self.conv1d.in_channels, self.conv1d.kernel_size[0] - 1), (n, *self.ssm_shape)

    def init_state(self, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> MixerState:
        """The state before the first frame of N streams, in tensors; passing `None` means the same."""
        conv_shape, ssm_shape = self.state_shapes(n)
        return torch.zeros(conv_shape, device=device, dtype=dtype), torch.zeros(ssm_shape, device=device, dtype=dtype)

    def check(self, x: Tensor, state: MixerState | None) -> None:
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.hidden_size:
            raise ValueError(f"`x` must be (N, T >= 1, {self.hidden_size}), got {tuple(x.shape)}")
        if state is not None:
            wanted, got = self.state_shapes(len(x)), tuple(tuple(part.shape) for part in state)
            if got != wanted:
                raise ValueError(f"`state` must have shapes {wanted} (conv_state, ssm_state), got {got}")


class TemporalMamba(TemporalMixer):
    """Mamba-1 over time. Parameters are named and shaped as those of `mamba_ssm.Mamba`.

    Args:
        hidden_size: D.
        state_size: S, numbers kept per inner channel.
        conv_kernel: K, frames that the short convolution sees.
        expand: inner channels per hidden channel.
        dt_rank: rank of the projection to time steps; `"auto"` is D / 16, rounded up.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
    ):
        super().__init__()
        inner = expand * hidden_size
        if dt_rank == "auto":
            dt_rank = math.ceil(hidden_size / 16)
        if not isinstance(dt_rank, int) or dt_rank < 1:
            raise ValueError(f"`dt_rank` must be 'auto' or a positive int, got {dt_rank!r}")
        self.hidden_size = hidden_size
        self.ssm_shape = (inner, state_size)
        self.splits = [dt_rank, state_size, state_size]
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.D = nn.Parameter(torch.empty(inner))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises all parameters as `mamba_ssm.Mamba` does."""
        reset_projections(self.in_proj, self.conv1d, self.x_proj, self.out_proj)
        bound = self.dt_proj.in_features**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init.copy_(self.dt_proj.bias, initial_dt_bias(self.dt_proj.bias))
        decays = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device, dtype=torch.float32)
        init.copy_(self.A_log, decays.log().expand_as(self.A_log))
        init.ones_(self.D)

    def forward(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """
        Args:
            x: `(N, T, D)`, T >= 1.
            state: what an earlier call returned, or `None` at the start of a stream.

        Returns:
            y `(N, T, D)` in x's dtype, and the state after the last frame: `conv_state (N, C, K - 1)` and
            `ssm_state (N, C, S)`, float32 (float64 where the mixer is). Where mamba-ssm's kernel made it, no gradient
            flows through `ssm_state`.

        Raises:
            ValueError: x or state has the wrong shape.
        """
        self.check(x, state)
        conv_state, ssm_state = (None, None) if state is None else state
        projected = self.in_proj(x)
        # mamba-ssm's scan cannot begin with a state and takes no single frames; those are for the kernels of our own.
        kernels = own_kernel = None
        if projected.dtype != torch.float64:
            if x.shape[1] > 1 and ssm_state is None:
                kernels = mamba_kernels(x.device.type)
            if kernels is None:
                own_kernel = triton_kernel(x.device.type)
        # A single frame is little work, and keeps all digits.
        fused = x.shape[1] > 1 and (kernels or own_kernel) is not None
        dtype = projected.dtype if fused else scan_dtype(projected)
        u, gate = projected.to(dtype).chunk(2, dim=-1)
        u, conv_state = causal_conv(u, self.conv1d, conv_state)
        dt, B, C = self.x_proj(u.to(projected.dtype)).split(self.splits, dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = -torch.exp(self.A_log.to(scan_dtype(u)))
        D, dt_bias = self.D.to(A.dtype), self.dt_proj.bias.to(A.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if kernels is not None:
                selective_scan_fn = kernels[0]
                y, ssm_state = selective_scan_fn(
                    u.mT, dt.mT, A, B.mT, C.mT, D, gate.mT, dt_bias, delta_softplus=True, return_last_state=True
                )
                y = y.mT
            elif own_kernel is not None:
                y, ssm_state = own_kernel(u, dt, A, B, C, D, dt_bias, gate, ssm_state)
            else:
                dt, B, C = F.softplus(dt.to(dtype) + dt_bias), B.to(dtype), C.to(dtype)
                if x.shape[1] == 1:
                    y, ssm_state = selective_step(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], ssm_state)
                    y = y[:, None]
                else:
                    y, ssm_state = selective_scan(u, dt, A, B, C, ssm_state)
                y = torch.addcmul(y, u, D) * F.silu(gate)
        return self.out_proj(y.to(projected.dtype)).to(x.dtype), (conv_state, ssm_state)


class TemporalMamba2(TemporalMixer):
    """Mamba-2 over time. Parameters are named and shaped as those of `mamba_ssm.Mamba2`.

    Args:
        hidden_size: D.
        state_size: S, numbers kept per inner channel.
        conv_kernel: K, frames that the short convolution sees.
        expand: inner channels per hidden channel.
        head_dim: P, channels that share one decay. Must divide `expand * hidden_size`.
        n_groups: G, groups of heads that share B and C. Must divide the number of heads.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
    ):
        super().__init__()
        inner = expand * hidden_size
        if inner % head_dim:
            raise ValueError(f"`head_dim` must divide expand * hidden_size = {inner}, got {head_dim}")
        heads = inner // head_dim
        if heads % n_groups:
            raise ValueError(f"`n_groups` must divide the number of heads, {heads}, got {n_groups}")
        channels = inner + 2 * n_groups * state_size
        self.hidden_size = hidden_size
        self.n_groups = n_groups
        self.ssm_shape = (heads, head_dim, state_size)
        self.splits = [inner, channels, heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.splits), bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel, groups=channels, padding=conv_kernel - 1)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        self.norm = GatedRMSNorm(inner, n_groups)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises all parameters as `mamba_ssm.Mamba2` does."""
        reset_projections(self.in_proj, self.conv1d, self.out_proj)
        init.copy_(self.dt_bias, initial_dt_bias(self.dt_bias))
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        init.ones_(self.D)
        init.ones_(self.norm.weight)

    def forward(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """
        Args:
            x: `(N, T, D)`, T >= 1.
            state: what an earlier call returned, or `None` at the start of a stream.

        Returns:
            y `(N, T, D)` in x's dtype, and the state after the last frame: `conv_state (N, C + 2 G S, K - 1)` and
            `ssm_state (N, H, P, S)`, float32 (float64 where the mixer is).

        Raises:
            ValueError: x or state has the wrong shape.
        """
        self.check(x, state)
        conv_state, ssm_state = (None, None) if state is None else state
        heads, head_dim, state_size = self.ssm_shape
        projected = self.in_proj(x)
        # The fused scan multiplies float32 in TF32, which would part it from the single step by 1e-3: half types only.
        kernels = None
        if x.shape[1] > 1 and projected.dtype in (torch.float16, torch.bfloat16):
            kernels = mamba_kernels(x.device.type)
        dtype = scan_dtype(projected) if kernels is None else projected.dtype
        gate, xBC, dt = projected.to(dtype).split(self.splits, dim=-1)
        xBC, conv_state = causal_conv(xBC, self.conv1d, conv_state)
        u, B, C = xBC.split([heads * head_dim] + 2 * [self.n_groups * state_size], dim=-1)
        u = u.unflatten(-1, (heads, head_dim))
        B, C = B.unflatten(-1, (self.n_groups, state_size)), C.unflatten(-1, (self.n_groups, state_size))
        A = -torch.exp(self.A_log.to(scan_dtype(u)))
        D, dt_bias = self.D.to(A.dtype), self.dt_bias.to(A.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if kernels is not None:
                y, ssm_state = fused_ssd_scan(kernels[1], u, dt, A, B, C, D, dt_bias, ssm_state)
            else:
                dt = F.softplus(dt + dt_bias)
                if x.shape[1] == 1:
                    y, ssm_state = ssd_step(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, ssm_state)
                    y = y[:, None]
                else:
                    y, ssm_state = ssd_scan(u, dt, A, B, C, D, ssm_state)
            y = self.norm(y.flatten(-2).to(A.dtype), gate.to(A.dtype))
        return self.out_proj(y.to(projected.dtype)).to(x.dtype), (conv_state, ssm_state)
