"""The temporal mixers against transformers, against mamba-ssm's reference functions, and against themselves."""

import importlib.util
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ausm_hf.model import temporal_mamba, temporal_scan
from ausm_hf.model.temporal_mamba import TemporalMamba, TemporalMamba2
from ausm_hf.model.temporal_scan import CausalConvFunction, selective_scan, ssd_scan

HIDDEN = 32
MIXERS = {
    "mamba": lambda **kwargs: TemporalMamba(HIDDEN, **kwargs),
    "mamba2": lambda **kwargs: TemporalMamba2(HIDDEN, head_dim=16, **kwargs),
}
each_mixer = pytest.mark.parametrize("name", MIXERS)


def make(name: str, **kwargs) -> nn.Module:
    """A mixer whose every parameter differs from its neutral initial value, so that each one matters."""
    torch.manual_seed(0)
    mixer = MIXERS[name](**kwargs)
    with torch.no_grad():
        for parameter in (mixer.A_log, mixer.D):
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if hasattr(mixer, "norm"):
            mixer.norm.weight.add_(torch.randn_like(mixer.norm.weight) * 0.2)
            mixer.dt_bias.add_(2)  # time steps of about 0.1 to 1: the past fades within the clip
        else:
            mixer.dt_proj.bias.add_(2)
    return mixer


def run_in_parts(mixer: nn.Module, x: torch.Tensor, lengths: list[int]):
    state, outputs = None, []
    for part in x.split(lengths, dim=1):
        y, state = mixer(part, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def assert_states_close(state, wanted, **tolerance):
    for part, wanted_part in zip(state, wanted):
        assert part.shape == wanted_part.shape
        torch.testing.assert_close(part, wanted_part, **tolerance)


@pytest.fixture(params=["one block", "blocks of 2"])
def blocks(request, monkeypatch):
    """Tiny test tensors fit one block; cut them all the same, with a smaller block at the end."""
    if request.param == "blocks of 2":
        monkeypatch.setattr(
            temporal_scan,
            "row_blocks",
            lambda rows, row_size, x: (slice(i, min(rows, i + 2)) for i in range(0, rows, 2)),
        )


# Against code not written here


def transformers_mixer(mixer: nn.Module):
    if isinstance(mixer, TemporalMamba):
        modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
        from transformers import MambaConfig

        reference = modeling.MambaMixer(MambaConfig(hidden_size=HIDDEN, num_hidden_layers=1), layer_idx=0)
    else:
        modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
        from transformers import Mamba2Config

        heads, head_dim, state_size = mixer.ssm_shape
        config = Mamba2Config(
            hidden_size=HIDDEN,
            state_size=state_size,
            num_heads=heads,
            head_dim=head_dim,
            n_groups=1,
            chunk_size=8,
            layer_norm_epsilon=1e-5,
            num_hidden_layers=1,
        )
        reference = modeling.Mamba2Mixer(config, layer_idx=0)
    reference.load_state_dict(mixer.state_dict())  # strict: names and shapes are the same
    return reference.eval()


@each_mixer
def test_equals_transformers(name):
    mixer = make(name)
    reference = transformers_mixer(mixer)
    x = torch.randn(3, 40, HIDDEN)
    torch.testing.assert_close(mixer(x)[0], reference(x), atol=1e-5, rtol=0)


def test_mamba2_steps_as_transformers():
    from transformers import DynamicCache, Mamba2Config

    mixer = make("mamba2")
    reference = transformers_mixer(mixer)
    x = torch.randn(3, 6, HIDDEN)
    cache = DynamicCache(config=Mamba2Config(num_hidden_layers=1))
    state = None
    for frame in x.split([2, 1, 1, 1, 1], dim=1):
        y, state = mixer(frame, state)
        torch.testing.assert_close(y, reference(frame, cache), atol=1e-5, rtol=0)


class MambaSSM:
    """Functions and classes of mamba-ssm, loaded file by file.

    The package imports Triton and its CUDA extension at once, so only the files asked for are run, with stand-ins for
    whatever of mamba-ssm they import and the reference functions don't call.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def load(self, path: str, **stand_ins):
        names = ["", ".utils", ".utils.torch", ".ops", ".ops.triton", ".ops.triton.layer_norm"]
        names += [".ops.triton.ssd_combined", ".ops.triton.layernorm_gated", ".ops.triton.selective_state_update"]
        names += [".ops.selective_scan_interface", ".distributed", ".distributed.tensor_parallel"]
        names += [".distributed.distributed_utils"]
        modules = {f"mamba_ssm{name}": mock.MagicMock() for name in names}
        modules |= {"selective_scan_cuda": mock.MagicMock(), "causal_conv1d": None}
        for name, value in stand_ins.items():
            for module in modules.values():
                if module is not None:
                    setattr(module, name, value)
        spec = importlib.util.spec_from_file_location("mamba_ssm_reference", f"{self.folder}/{path}")
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, modules):
            spec.loader.exec_module(module)
        return module

    @property
    def selective_scan_ref(self):
        return self.load("ops/selective_scan_interface.py").selective_scan_ref

    @property
    def ssd_minimal_discrete(self):
        return self.load("modules/ssd_minimal.py").ssd_minimal_discrete


@pytest.fixture(scope="module")
def mamba_ssm() -> MambaSSM:
    pytest.importorskip("einops", reason="mamba-ssm's reference functions need einops")
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip(
            "mamba-ssm is not installed; without CUDA: MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE"
            " pip install --no-build-isolation --no-deps mamba-ssm"
        )
    return MambaSSM(spec.submodule_search_locations[0])


@pytest.mark.parametrize("n, t", [(1, 1), (3, 2), (5, 17), (2, 64)])
def test_selective_scan_equals_mamba_ssm(mamba_ssm, n, t, blocks):
    torch.manual_seed(0)
    c, s = 12, 8
    x, dt, D = torch.randn(n, t, c), torch.rand(n, t, c), torch.zeros(c)
    A, B, C = -torch.rand(c, s) * 3, torch.randn(n, t, s), torch.randn(n, t, s)
    inputs = [tensor.requires_grad_() for tensor in (x, dt, A, B, C)]
    y, state = selective_scan(*inputs, None)
    wanted, wanted_state = mamba_ssm.selective_scan_ref(x.mT, dt.mT, A, B.mT, C.mT, D, return_last_state=True)
    torch.testing.assert_close(y, wanted.mT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, wanted_state, atol=1e-5, rtol=1e-5)
    d_y, d_state = torch.randn_like(y), torch.randn_like(state)
    grads = torch.autograd.grad([y, state], inputs, [d_y, d_state])
    wanted_grads = torch.autograd.grad([wanted, wanted_state], inputs, [d_y.mT, d_state])
    for grad, wanted_grad in zip(grads, wanted_grads):
        torch.testing.assert_close(grad, wanted_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n, t", [(1, 1), (3, 2), (5, 17), (2, 64)])
def test_ssd_scan_equals_mamba_ssm(mamba_ssm, n, t):
    torch.manual_seed(0)
    h, p, s = 4, 6, 8
    x, dt, A = torch.randn(n, t, h, p), torch.rand(n, t, h), -torch.rand(h)
    B, C, state = torch.randn(n, t, s), torch.randn(n, t, s), torch.randn(n, h, p, s)
    y, last = ssd_scan(x, dt, A, B, C, torch.zeros(h), state)
    per_head = [tensor[:, :, None].expand(n, t, h, s) for tensor in (B, C)]
    wanted, wanted_last = mamba_ssm.ssd_minimal_discrete(x * dt[..., None], dt * A, *per_head, t, state[:, None])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, wanted_last, atol=1e-5, rtol=1e-5)


def test_mamba_is_mamba_ssm_s(mamba_ssm):
    """The whole mixer: parameters by name and shape, and what they compute."""
    module = mamba_ssm.load("modules/mamba_simple.py", selective_scan_fn=mamba_ssm.selective_scan_ref)
    mixer = make("mamba")
    reference = module.Mamba(HIDDEN, use_fast_path=False)
    reference.load_state_dict(mixer.state_dict())
    x = torch.randn(3, 20, HIDDEN)
    torch.testing.assert_close(mixer(x)[0], reference(x), atol=1e-5, rtol=0)
    assert_same_decay_groups(mixer, reference)


def test_mamba2_has_mamba_ssm_s_parameters(mamba_ssm):
    class RMSNormGated(nn.Module):
        def __init__(self, channels, **kwargs):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(channels))

    mixer = make("mamba2")
    module = mamba_ssm.load("modules/mamba2.py", RMSNorm=RMSNormGated)
    reference = module.Mamba2(HIDDEN, d_state=16, headdim=16)
    reference.load_state_dict(mixer.state_dict())
    assert_same_decay_groups(mixer, reference)


def assert_same_decay_groups(mixer, reference):
    wanted = {name for name, parameter in reference.named_parameters() if hasattr(parameter, "_no_weight_decay")}
    assert wanted == {name for name, parameter in mixer.named_parameters() if hasattr(parameter, "_no_weight_decay")}


# Against itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, t", [(1, 1), (1, 5), (70, 3), (7, 33), (2, 64)])
@each_mixer
def test_one_pass_equals_steps_and_parts(name, n, t, dtype):
    mixer = make(name).to(dtype)
    x = torch.randn(n, t, HIDDEN, dtype=dtype)
    with torch.no_grad():
        y, state = mixer(x)
        assert y.dtype == dtype and y.shape == x.shape
        assert {part.dtype for part in state} == {torch.promote_types(dtype, torch.float32)}
        tolerance = {
            torch.float32: {"atol": 5e-6, "rtol": 0},
            torch.float64: {"atol": 1e-13, "rtol": 0},
            torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2},
        }[dtype]
        for lengths in ([1] * t, [t // 2, t - t // 2], [max(t - 1, 0), min(t, 1)]):
            y_parts, state_parts = run_in_parts(mixer, x, [length for length in lengths if length])
            torch.testing.assert_close(y_parts, y, **tolerance)
            assert_states_close(state_parts, state, **tolerance)


@each_mixer
def test_a_step_is_the_same_with_and_without_gradient(name, blocks):
    """Without, the step goes block by block of sequences."""
    mixer = make(name)
    frames = torch.randn(5, 2, HIDDEN).split(1, dim=1)
    state = without_gradient = None
    for frame in frames:
        y, state = mixer(frame, state)
        with torch.no_grad():
            y_without_gradient, without_gradient = mixer(frame, without_gradient)
        torch.testing.assert_close(y_without_gradient, y, atol=1e-6, rtol=0)
        assert_states_close(without_gradient, state, atol=1e-6, rtol=0)


@each_mixer
def test_gradients_flow_through_carried_states(name):
    mixer = make(name)
    x = torch.randn(3, 9, HIDDEN)
    wanted = torch.autograd.grad(mixer(x)[0].square().sum(), list(mixer.parameters()))
    grads = torch.autograd.grad(run_in_parts(mixer, x, [4, 1, 4])[0].square().sum(), list(mixer.parameters()))
    for grad, wanted_grad in zip(grads, wanted):
        torch.testing.assert_close(grad, wanted_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("t", [1, 4])
@each_mixer
def test_zero_state_is_no_state(name, t):
    mixer = make(name)
    x = torch.randn(3, t, HIDDEN)
    y, state = mixer(x)
    y_zeros, state_zeros = mixer(x, mixer.init_state(3))
    torch.testing.assert_close(y_zeros, y, atol=1e-6, rtol=0)
    assert_states_close(state_zeros, state, atol=1e-6, rtol=0)


@each_mixer
def test_given_state_is_not_changed(name):
    mixer = make(name)
    with torch.no_grad():
        _, state = mixer(torch.randn(3, 4, HIDDEN))
        before = [part.clone() for part in state]
        for t in (1, 5):
            mixer(torch.randn(3, t, HIDDEN), state)
        assert_states_close(state, before, atol=0, rtol=0)


@pytest.mark.parametrize("t", [1, 4])
@each_mixer
def test_any_layout_of_state(name, t):
    """A state whose axes lie in memory in another order gives the same."""
    mixer = make(name)
    x = torch.randn(3, t, HIDDEN)
    _, state = mixer(torch.randn(3, 4, HIDDEN))
    other = tuple(part.transpose(0, -1).contiguous().transpose(0, -1) for part in state)
    torch.testing.assert_close(mixer(x, other)[0], mixer(x, state)[0], atol=1e-6, rtol=0)


@each_mixer
def test_causal_and_every_sequence_alone(name):
    mixer = make(name)
    x = torch.randn(4, 40, HIDDEN)
    changed = x.clone()
    changed[2, 35] += 1
    with torch.no_grad():
        difference = (mixer(changed)[0] - mixer(x)[0]).abs().amax(-1)
    assert (difference[:, :35] == 0).all()
    assert (difference[[0, 1, 3]] == 0).all()
    assert (difference[2, 35:] > 1e-6).all()


@each_mixer
def test_strong_decay_is_exact(name):
    """Frames that forget everything, beside frames that forget little: nothing may become 0 x inf, or lose digits."""
    mixer = make(name)
    with torch.no_grad():
        mixer.A_log.fill_(7.0)
    x = (torch.randn(2, 48, HIDDEN) * 30).requires_grad_()
    y, state = mixer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and state[1].isfinite().all()
    wanted = make(name).double().requires_grad_(False)
    wanted.A_log.fill_(7.0)
    torch.testing.assert_close(y.double(), wanted(x.double())[0], atol=1e-5 * y.abs().max().item(), rtol=0)


@pytest.mark.parametrize("t", [1, 5])
@each_mixer
def test_gradcheck(name, t, blocks):
    mixer = make(name, state_size=4, conv_kernel=3).double()
    x = torch.randn(3, t, HIDDEN, dtype=torch.float64)
    _, state = mixer(torch.randn(3, 3, HIDDEN, dtype=torch.float64))
    small = 0.5 * torch.randn(3, t, 1, dtype=torch.float64, requires_grad=True)  # one number per frame: few columns
    conv_state, ssm_state = (part.detach() for part in state)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    A_log, D = mixer.A_log.detach(), mixer.D.detach()
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def run(small, scale, parameters):
        carried = (conv_state * scale[:, None, None], ssm_state * scale.view(-1, *[1] * (ssm_state.ndim - 1)))
        changed = {"A_log": A_log + parameters[0], "D": D + parameters[1]}
        y, new_state = torch.func.functional_call(mixer, changed, (x + small, carried))
        return y.sum(-1), new_state[0].sum(1), new_state[1].flatten(1).sum(1)

    assert torch.autograd.gradcheck(run, (small, scale, parameters))


def test_gradcheck_of_functions(blocks):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    n, t, c, s = 3, 4, 3, 2
    dt = torch.rand(n, t, c, dtype=torch.float64, requires_grad=True)
    A = (-torch.rand(c, s, dtype=torch.float64)).requires_grad_()
    scan_inputs = [random(n, t, c), dt, A, random(n, t, s), random(n, t, s)]
    assert torch.autograd.gradcheck(selective_scan, (*scan_inputs, random(n, c, s)))
    assert torch.autograd.gradcheck(selective_scan, (*scan_inputs, None))
    assert torch.autograd.gradcheck(CausalConvFunction.apply, (random(n, t + 3, c), random(4, c), random(c)))


def test_mamba_keeps_no_states_for_backward():
    """The states of all frames would be S times what goes in; they are computed again instead."""
    n, t = 64, 16
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make("mamba")(torch.randn(n, t, HIDDEN))
    inner = 2 * HIDDEN
    assert sum(saved.values()) < 0.8 * n * t * inner * 16 * 4


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_the_scan_is_bounded(backward):
    """What is allocated at a time, inputs and outputs included, stays below twice inputs and outputs."""
    n, t, c, s = 6000, 8, 128, 16
    x, dt = torch.randn(n, t, c), torch.rand(n, t, c)
    inputs = [x, dt, -torch.rand(c, s), torch.randn(n, t, s), torch.randn(n, t, s)]
    for tensor in inputs:
        tensor.requires_grad_(backward)
    size = sum(tensor.nbytes for tensor in inputs) + x.nbytes + n * c * s * 4
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y, state = selective_scan(*inputs, None)
        if backward:
            d_y = torch.ones_like(y)
            torch.autograd.grad([y], inputs, [d_y])
            size += sum(tensor.nbytes for tensor in inputs) + d_y.nbytes
    allocated = peak = sum(tensor.nbytes for tensor in inputs)
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    assert size / 2 < peak < 2 * size


@pytest.mark.parametrize("t", [1, 5])
@each_mixer
def test_autocast_leaves_the_scan_alone(name, t, monkeypatch):
    scans = []

    def watch(function):
        def watched(*args):
            scans.append(function)
            assert not torch.is_autocast_enabled("cpu")
            assert {tensor.dtype for tensor in args if tensor is not None} == {torch.float32}
            return function(*args)

        return watched

    for function in ("selective_scan", "selective_step", "ssd_scan", "ssd_step"):
        monkeypatch.setattr(temporal_mamba, function, watch(getattr(temporal_mamba, function)))
    mixer = make(name)
    x = torch.randn(3, t, HIDDEN)
    wanted = mixer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x)
    assert len(scans) == 2
    assert y.dtype == torch.float32 and {part.dtype for part in state} == {torch.float32}
    torch.testing.assert_close(y, wanted, atol=5e-2, rtol=5e-2)


# Initialisation


@each_mixer
def test_initial_values(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    assert (mixer.D == 1).all()
    if name == "mamba":
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(2 * HIDDEN, 16))
        steps = F.softplus(mixer.dt_proj.bias)
    else:
        assert 1 <= mixer.A_log.exp().min() and mixer.A_log.exp().max() <= 16
        steps = F.softplus(mixer.dt_bias)
    assert 0.00099 < steps.min() and steps.max() < 0.101


@each_mixer
def test_reset_parameters_restores_all_but_loaded_ones(name):
    mixer = MIXERS[name]()
    loaded = mixer.A_log if name == "mamba" else mixer.dt_bias
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(torch.nan)
    loaded._is_hf_initialized = True  # how transformers marks what came from a checkpoint
    mixer.reset_parameters()
    for parameter in mixer.parameters():
        assert parameter.isnan().all() if parameter is loaded else parameter.isfinite().all()


@each_mixer
def test_can_be_made_on_the_meta_device(name):
    with torch.device("meta"):
        mixer = MIXERS[name]()
    mixer.to_empty(device="cpu").reset_parameters()
    assert mixer(torch.randn(2, 3, HIDDEN))[0].isfinite().all()


# Bad input


@each_mixer
def test_refuses_wrong_shapes(name):
    mixer = MIXERS[name]()
    for shape in ((2, 3, HIDDEN + 1), (2, 0, HIDDEN), (3, HIDDEN)):
        with pytest.raises(ValueError, match="`x` must be"):
            mixer(torch.zeros(shape))
    with pytest.raises(ValueError, match="`state` must have shapes"):
        mixer(torch.zeros(2, 3, HIDDEN), mixer.init_state(1))


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="`head_dim`"):
        TemporalMamba2(HIDDEN, head_dim=48)


# The way to the fused kernels, with stand-ins that have their signatures and their conditions


def conv_stand_in(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None):
    """`causal_conv1d_fn` for inputs with channels last in memory."""
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.shape[1] % 8 == 0
    assert weight.dtype == bias.dtype and activation == "silu"
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    else:
        assert initial_states.stride(1) == 1 and initial_states.dtype == x.dtype
    out = F.conv1d(torch.cat([initial_states, x], dim=-1), weight[:, None], bias, groups=x.shape[1])
    return F.silu(out)


def chunk_scan_stand_in(
    x, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False, return_final_states=False
):
    """`mamba_chunk_scan_combined`."""
    assert len(x) * -(-x.shape[1] // chunk_size) <= 65535 and chunk_size >= 16
    assert dt_softplus and return_final_states and x.dtype == B.dtype == C.dtype == torch.bfloat16
    x, dt, B, C = (tensor.float() for tensor in (x, F.softplus(dt.float() + dt_bias), B, C))
    y, state = ssd_scan(x, dt, A, B.squeeze(2), C.squeeze(2), D, initial_states)
    return y.bfloat16(), state


@pytest.fixture
def kernel_calls(monkeypatch):
    """Names of the kernels called, one per call."""
    calls = []

    def scan_stand_in(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        calls.append("scan")
        dt = F.softplus(delta.mT + delta_bias)
        y, state = selective_scan(u.mT, dt, A, B.mT, C.mT, None)
        return ((y + u.mT * D) * F.silu(z.mT)).mT, state

    def chunk_scan(*args, **kwargs):
        calls.append("chunk_scan")
        return chunk_scan_stand_in(*args, **kwargs)

    def conv(*args, **kwargs):
        calls.append("conv")
        return conv_stand_in(*args, **kwargs)

    monkeypatch.setattr(temporal_mamba, "mamba_kernels", lambda device_type: (scan_stand_in, chunk_scan))
    monkeypatch.setattr(temporal_mamba, "conv_kernel", lambda device_type: conv)
    return calls


@pytest.mark.parametrize("carried", [False, True])
@each_mixer
def test_kernels_get_what_they_want(name, carried, request):
    dtype = torch.float32 if name == "mamba" else torch.bfloat16
    mixer = make(name).to(dtype)
    x = torch.randn(3, 20, HIDDEN, dtype=dtype)
    state = mixer(torch.randn(3, 2, HIDDEN, dtype=dtype))[1] if carried else None
    wanted, wanted_state = mixer(x, state)
    calls = request.getfixturevalue("kernel_calls")
    y, new_state = mixer(x, state)
    # Mamba-1's kernel cannot begin with a state.
    scan = {"mamba": [] if carried else ["scan"]}.get(name, ["chunk_scan"])
    assert calls == ["conv", *scan]
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if name == "mamba" else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(y, wanted, **tolerance)
    assert_states_close(new_state, wanted_state, **tolerance)
    assert {part.dtype for part in new_state} == {torch.float32}


def test_chunk_scan_kernel_gets_no_more_sequences_than_its_grid_holds(kernel_calls):
    mixer = TemporalMamba2(4, state_size=2, head_dim=4).bfloat16()
    y, state = mixer(torch.randn(70_000, 2, 4, dtype=torch.bfloat16))
    assert len(y) == len(state[1]) == 70_000
    assert kernel_calls.count("chunk_scan") == 2


def test_own_kernels_must_prove_themselves(monkeypatch):
    """Used where they give the right numbers; else a warning, and plain torch."""
    from ausm_hf.model import temporal_mamba_triton

    warnings = []
    monkeypatch.setattr(temporal_mamba.logger, "warning_once", warnings.append)
    checked = temporal_mamba.checked_triton_kernel

    def chosen(triton, answer):
        def check(device):
            assert not torch.is_inference_mode_enabled()  # as it is in streams; the check takes gradients
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(temporal_mamba_triton, "triton", triton)
        monkeypatch.setattr(temporal_mamba_triton, "check_triton_scan", check)
        checked.cache_clear()
        with torch.inference_mode():
            kernel = temporal_mamba.triton_kernel("cuda")
        checked.cache_clear()
        return kernel

    assert temporal_mamba.triton_kernel("cpu") is None
    assert chosen(None, True) is None and not warnings
    assert chosen(sys, True) is temporal_mamba_triton.triton_scan and not warnings
    assert chosen(sys, False) is None and "wrong numbers" in warnings.pop()
    assert chosen(sys, RuntimeError("no compiler")) is None and "no compiler" in warnings.pop()


def test_says_once_that_kernels_are_missing(monkeypatch):
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)
    warnings = []
    monkeypatch.setattr(temporal_mamba.logger, "warning_once", warnings.append)
    for function, package in (
        (temporal_mamba.mamba_kernels, "mamba_ssm"),
        (temporal_mamba.conv_kernel, "causal_conv1d"),
    ):
        function.cache_clear()
        assert function("cpu") is None and not warnings
        assert function("cuda") is None and function("cuda") is None
        function.cache_clear()
        (warning,) = warnings
        assert package in warning and "pip install" in warning
        warnings.clear()
