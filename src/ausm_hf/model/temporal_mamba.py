"""Mamba over time: the mixer that carries the history of every pixel from frame to frame.

Each mixer computes the same thing in three ways: fused kernels on CUDA (those of `mamba-ssm` and `causal-conv1d` where
installed, and for Mamba-1 also the Triton kernels beside this file), plain torch everywhere else (`temporal_scan.py`),
and a single step when there is one frame. The regime is unusual for Mamba: sequences are short and there are tens of
thousands of them.

Letters: N sequences (pixels x batch), T frames (1 to 64), D hidden size, C inner channels, K frames the convolution
sees, S state size; in Mamba-2 also H heads of P channels, C = H P.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import logging

from .temporal_scan import (
    CausalConvFunction,
    scan_dtype,
    selective_scan,
    selective_step,
    ssd_scan,
    ssd_step,
)

logger = logging.get_logger(__name__)

MixerState = tuple[Tensor, Tensor]


# Fused kernels


def warn_without_kernels(package: str, install: str) -> None:
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
        warn_without_kernels("mamba_ssm", "pip install --no-build-isolation mamba-ssm")
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
        warn_without_kernels("causal_conv1d", "pip install --no-build-isolation causal-conv1d")
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
        with torch.inference_mode(False):  # streams run in it, and the check needs gradients
            right = check_triton_scan("cuda")
        fault = "they give wrong numbers"
    except Exception as error:  # Triton has many kinds, one for each thing that may be amiss with compiler or driver
        right, fault = False, repr(error)
    if not right:
        logger.warning_once(f"The temporal mixer runs without its Triton kernels on this GPU: {fault}.")
    return triton_scan if right else None


# The convolution before the scan


class HeldConv1d(nn.Conv1d):
    """
    Weight and bias for the mixer around it to read: calling it gives both. It is by that call that Accelerate knows
    when to fetch weights that lie on disk or in another memory.
    """

    bias: nn.Parameter  # there always is one

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.weight, self.bias


class HeldLinear(nn.Module):
    """The same for a projection. It is no `nn.Linear`: what wraps these (LoRA) or replaces them calls them with x."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


def causal_conv(x: Tensor, conv1d: HeldConv1d, conv_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, then SiLU.

    Args:
        x: `(N, T, C)`.
        conv1d: gives `weight (C, 1, K)` and `bias (C,)`.
        conv_state: `(N, C, K - 1)`, the K - 1 inputs before x, or `None` for zeros.

    Returns:
        Output `(N, T, C)` in x's dtype and the new conv_state.
    """
    n, t, c = x.shape
    kernel = conv1d.kernel_size[0]
    before = x.new_zeros(n, kernel - 1, c) if conv_state is None else conv_state.to(x.dtype).mT
    # In memory channels are last, as they are wanted in the next frame.
    new_state = torch.cat([before[:, t:], x[:, max(0, t - kernel + 1) :]], dim=1).to(scan_dtype(x)).mT
    weight, bias = conv1d()
    weight, bias = weight[:, 0].to(x.dtype), bias.to(x.dtype)
    if t == 1:
        out = torch.addcmul(bias, x[:, 0], weight[:, -1])
        for k in range(kernel - 1):
            out.addcmul_(before[:, k], weight[:, k])
        return F.silu(out)[:, None], new_state
    # The fused kernel knows these widths and types only, and reads 8 channels at once.
    fits = 2 <= kernel <= 4 and c % 8 == 0 and x.dtype != torch.float64
    if fits and (causal_conv1d_fn := conv_kernel(x.device.type)):
        states = None if conv_state is None else before.contiguous().mT  # (N, C, K - 1), channels last in memory
        out = causal_conv1d_fn(x.contiguous().mT, weight, bias, initial_states=states, activation="silu")
        return out.mT, new_state
    return CausalConvFunction.apply(torch.cat([before, x], dim=1), weight.T.contiguous(), bias), new_state


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
            B[rows, :, None],
            C[rows, :, None],
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
    """RMSNorm of `x * silu(gate)`."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x * F.silu(gate), x.shape[-1:], eps=1e-5) * self.weight


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
    conv1d: HeldConv1d
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
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
    ):
        super().__init__()
        inner = expand * hidden_size
        dt_rank = math.ceil(hidden_size / 16)
        self.hidden_size = hidden_size
        self.ssm_shape = (inner, state_size)
        self.splits = [dt_rank, state_size, state_size]
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv1d = HeldConv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = HeldLinear(dt_rank, inner)
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
        bound = self.dt_proj.weight.shape[1] ** -0.5
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
        # For few frames of many pixels the kernels of our own are the faster ones (benchmarks/README.md), and those of
        # mamba-ssm cannot begin with a state.
        kernels = own_kernel = None
        if projected.dtype != torch.float64:
            own_kernel = triton_kernel(x.device.type)
            if own_kernel is None and x.shape[1] > 1 and ssm_state is None:
                kernels = mamba_kernels(x.device.type)
        # A single frame is little work, and keeps all digits.
        fused = x.shape[1] > 1 and (kernels or own_kernel) is not None
        dtype = projected.dtype if fused else scan_dtype(projected)
        u, gate = projected.to(dtype).chunk(2, dim=-1)
        u, conv_state = causal_conv(u, self.conv1d, conv_state)
        dt, B, C = self.x_proj(u.to(projected.dtype)).split(self.splits, dim=-1)
        dt_weight, dt_bias = self.dt_proj()
        dt = F.linear(dt, dt_weight)
        A = -torch.exp(self.A_log.to(scan_dtype(u)))
        D, dt_bias = self.D.to(A.dtype), dt_bias.to(A.dtype)
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
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        head_dim: int = 64,
    ):
        super().__init__()
        inner = expand * hidden_size
        if inner % head_dim:
            raise ValueError(f"`head_dim` must divide expand * hidden_size = {inner}, got {head_dim}")
        heads = inner // head_dim
        channels = inner + 2 * state_size
        self.hidden_size = hidden_size
        self.ssm_shape = (heads, head_dim, state_size)
        self.splits = [inner, channels, heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.splits), bias=False)
        self.conv1d = HeldConv1d(channels, channels, conv_kernel, groups=channels, padding=conv_kernel - 1)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        self.norm = GatedRMSNorm(inner)
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
        u, B, C = xBC.split([heads * head_dim, state_size, state_size], dim=-1)
        u = u.unflatten(-1, (heads, head_dim))
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
