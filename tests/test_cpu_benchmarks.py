"""The benchmarks of the CPU in miniature: they run to the end, check first, and write what they found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

MINIATURES = {
    "scan": ["--pixels", "16", "--frames", "1", "3", "--numbers", "1e5", "--repeats", "1"],
    "training": ["--frames", "1", "2", "--size", "32", "32", "--objects", "1", "--repeats", "1"],
    "start_up": ["--repeats", "1"],
    "step": ["--frames", "8", "--objects", "1", "8"],
    "peers": ["--models", "ausm-nano", "--objects", "1", "--equal-size", "64", "--memory-frames", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_runs_to_its_end(name, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *MINIATURES[name], "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["machine"]["cores"] >= 1 and found["rows"]
    assert not [row for row in found["rows"] if "not measured" in row]


def test_all_together_leave_their_tables(tmp_path):
    """One that fails is named, and the others' tables are there."""
    code = f"""
import subprocess, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import run
def one(command, **_):
    failed = command[1].endswith("training.py")
    return subprocess.CompletedProcess(command, int(failed), stdout="" if failed else "| a table |\\n")
subprocess.run = one
sys.argv = ["run.py", "--output", {str(tmp_path)!r}]
run.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "failed: training" in done.stderr
    tables = (tmp_path / "tables.md").read_text()
    assert [f"## {name}" in tables for name in MINIATURES] == [name != "training" for name in MINIATURES]
