"""The benchmarks of the CPU in miniature: they run to the end, check first, and write what they found."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

MINIATURES = {
    "scan": ["--pixels", "16", "--frames", "1", "3", "--numbers", "1e5", "--repeats", "1"],
    "training": ["--frames", "1", "2", "--size", "32", "32", "--objects", "1", "--repeats", "1"],
    "start_up": ["--repeats", "1"],
    "step": ["--frames", "8", "--objects", "1", "8"],
    "peers": ["--models", "ausm-nano", "--objects", "1", "--equal-size", "64", "--memory-frames", "2"],
}


OTHERS = {"half_precision": ["--frames", "2", "--size", "64", "64"]}  # not of those that run together


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MINIATURES, *OTHERS])
def test_runs_to_its_end(name, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *(MINIATURES | OTHERS)[name], "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["machine"]["cores"] >= 1 and found["rows"]
    assert not [row for row in found["rows"] if "not measured" in row]


@pytest.mark.slow
def test_the_loader_by_itself(tmp_path):
    """With a folder of one video, as `video_folder` wants it."""
    for t in range(4):
        square = np.zeros((48, 64), np.uint8)
        square[10:30, 10 + t : 30 + t] = 1
        for kind, picture in (("videos", np.stack([square * 200] * 3, -1)), ("masks", square)):
            folder = tmp_path / "clips" / kind / "one"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{t:05d}.png")
    source = {"dataset": "video_folder", "arguments": {"root": str(tmp_path / "clips")}}
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"preset": "nano"},
        "data": {"sources": [source], "num_frames": 2, "size": [32, 64], "batch_size": 2},
        "optim": {"max_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, str(BENCHMARKS / "loader.py"), str(tmp_path / "recipe.yaml"), "--batches", "2"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    (row,) = json.loads((tmp_path / "loader.json").read_text())["rows"]
    assert row["clip ms"] > 0 and row["batch ms"] > 0 and row["frames per second"] > 0


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
