"""The GPU benchmarks, rehearsed on the CPU: they run to the end, check first, and write what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan", "step", "training"])
def test_dry_run(name, tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    subprocess.run([FOLDER / f"{name}.sh", "--dry-run"], check=True, env=environment, timeout=900)
    result = json.loads((tmp_path / f"{name}_gpu.json").read_text())
    assert result["dry_run"] and result["machine"]["cpu"] and result["rows"]
    for row in result["rows"]:
        assert "not measured" not in row
        assert row.get("correct") or row["ms"] > 0 < row["floor ms"]


def test_a_scan_that_writes_nothing_or_wrong_is_refused(monkeypatch, tmp_path):
    """The check that comes before every time."""
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    for module in ("timing", "scan", "common"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import scan
    from timing import Bench, poisoned

    with poisoned():
        assert torch.empty(1000).isnan().all()
    monkeypatch.setattr(sys, "argv", ["scan.py", "--dry-run", "--output", str(tmp_path)])
    bench = Bench("scan", "")
    assert scan.check(bench, "torch", scan.plain, 24, torch.float32) < 1e-4

    def unwritten(*inputs):
        y, state = scan.plain(*inputs)
        return y * torch.tensor([1.0, torch.nan]).repeat(12), state

    def half_written(*inputs):
        y, state = scan.plain(*inputs)
        fresh = torch.empty_like(y)
        fresh[:, :, ::2] = y[:, :, ::2]
        return fresh + 0 * y, state

    for wrong in (unwritten, half_written, lambda x, dt, *rest: scan.plain(x, dt * 1.01, *rest)):
        with pytest.raises(AssertionError, match="is off by"):
            scan.check(bench, "torch", wrong, 24, torch.float32)
