"""The Triton kernels against plain torch in float64: on a GPU, or else in the interpreter (see conftest.py)."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from ausm_hf.model import temporal_mamba, temporal_mamba_triton  # noqa: E402
from ausm_hf.model.temporal_mamba import TemporalMamba  # noqa: E402
from ausm_hf.model.temporal_mamba_triton import check_triton_scan, triton_scan  # noqa: E402
from ausm_hf.model.temporal_scan import selective_scan  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So few that each takes several sequences."""
    monkeypatch.setattr(temporal_mamba_triton, "PROGRAMS", 4)


def plain(x, dt, A, B, C, D, dt_bias, gate, state):
    y, state = selective_scan(x, F.softplus(dt + dt_bias), A, B, C, state)
    return (y + D * x) * F.silu(gate), state


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("n, t, c, s", [(3, 1, 32, 16), (2, 5, 40, 16), (5, 4, 33, 6)])
def test_equals_plain_torch(n, t, c, s, carried):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    torch.manual_seed(0)
    both = random(n, t, 2 * c)  # x and gate as halves of one tensor: their rows don't touch in memory
    inputs = [*both.chunk(2, -1), 3 * random(n, t, c), -random(c, s).exp(), random(n, t, s), random(n, t, s)]
    x, gate, dt, A, B, C = inputs
    inputs = [x, dt, A, B, C, random(c), random(c) - 4, gate] + ([random(n, c, s)] if carried else [])
    d_outputs = [random(n, t, c), random(n, c, s)]

    def run(function, dtype, device):
        halves = both.to(device, dtype).chunk(2, -1)
        moved = [halves[0] if i == 0 else halves[1] if i == 7 else v.to(device, dtype) for i, v in enumerate(inputs)]
        moved = [v.requires_grad_() for v in moved]
        outputs = function(*moved, *([] if carried else [None]))
        grads = torch.autograd.grad(outputs, moved, [v.to(device, dtype) for v in d_outputs])
        return [v.double().cpu() for v in (*outputs, *grads)]

    for got, wanted in zip(run(triton_scan, torch.float32, DEVICE), run(plain, torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("used", [0, 1], ids=["outputs", "last state"])
def test_gradients_where_only_one_of_the_results_is_used(used):
    torch.manual_seed(0)
    n, t, c, s = 3, 3, 32, 4
    shapes = [(n, t, c), (n, t, c), (c, s), (n, t, s), (n, t, s), (c,), (c,), (n, t, c)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[2] = -inputs[2].exp()
    grads = []
    for function, dtype, device in ((triton_scan, torch.float32, DEVICE), (plain, torch.float64, "cpu")):
        moved = [v.to(device, dtype).requires_grad_() for v in inputs]
        result = function(*moved, None)[used]
        of_all = torch.autograd.grad(result.square().sum(), moved, allow_unused=True, materialize_grads=True)
        grads.append([v.double().cpu() for v in of_all])
    for got, wanted in zip(*grads):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_small_time_steps_keep_their_digits():
    """softplus(-9) is 1e-4: log(1 + 1e-4) in float32 would be wrong in the fourth digit."""
    x = torch.ones(1, 1, 32, device=DEVICE)
    zeros, ones = torch.zeros(32, device=DEVICE), torch.ones(1, 1, 4, device=DEVICE)
    for raw in (-15.0, -9.0, -1.0, 0.0, 1.0, 30.0):
        _, state = triton_scan(x, raw * x, -torch.ones(32, 4, device=DEVICE), ones, ones, zeros, zeros, x, None)
        wanted = F.softplus(torch.tensor(raw, dtype=torch.float64)).expand(1, 32, 4)
        torch.testing.assert_close(state.double().cpu(), wanted, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mixer_uses_it_for_clips_steps_and_carried_states(dtype, monkeypatch):
    torch.manual_seed(0)
    mixer = TemporalMamba(16, state_size=4).to(DEVICE, dtype)
    x = torch.randn(3, 4, 16, device=DEVICE, dtype=dtype)
    monkeypatch.setattr(temporal_mamba, "mamba_kernels", lambda device_type: None)
    monkeypatch.setattr(temporal_mamba, "triton_kernel", lambda device_type: None)
    wanted, wanted_state = mixer(x)
    calls = []
    monkeypatch.setattr(temporal_mamba, "mamba_kernels", lambda device_type: pytest.fail("its own kernel is there"))
    monkeypatch.setattr(
        temporal_mamba, "triton_kernel", lambda device_type: lambda *args: calls.append(args) or triton_scan(*args)
    )
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    with torch.no_grad():
        y, state = mixer(x)
        first, carried = mixer(x[:, :2])
        second, carried = mixer(x[:, 2:3], carried)
        third, carried = mixer(x[:, 3:], carried)
    assert len(calls) == 4 and y.dtype == dtype and state[1].dtype == torch.float32
    for got in (y, torch.cat([first, second, third], dim=1)):
        torch.testing.assert_close(got, wanted, **tolerance)
    for got in (state, carried):
        torch.testing.assert_close(got[1], wanted_state[1], **tolerance)


@pytest.mark.parametrize("wrong_in, factor", [(torch.float32, 1.01), (torch.bfloat16, 1.2)], ids=str)
def test_the_check_tells_right_from_wrong(wrong_in, factor, monkeypatch):
    def wrong(x, dt, *rest):
        return triton_scan(x, dt * factor if dt.dtype == wrong_in else dt, *rest)

    assert check_triton_scan(DEVICE)
    monkeypatch.setattr(temporal_mamba_triton, "triton_scan", wrong)
    assert not check_triton_scan(DEVICE)
