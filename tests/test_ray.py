"""`examples/segment_with_ray.py` on a local Ray."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle_tools

import ausm_hf

EXAMPLE = Path(__file__).parents[1] / "examples" / "segment_with_ray.py"


@pytest.mark.slow
def test_segment_with_ray(tiny_checkpoint, moving_square, tmp_path):
    pytest.importorskip("ray.data")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        with ausm_hf.VideoWriter(tmp_path / "in" / f"{name}.mp4", fps=10, size=(48, 64)) as writer:
            for frame in moving_square[0][:: -1 if name == "b" else 1]:
                writer.write(frame)
    (tmp_path / "in" / "broken.mp4").write_bytes(b"this is no video")
    model, processor = ausm_hf.load_model(tiny_checkpoint)
    model.config.foreground_threshold = 1e-6  # a network that was never trained is sure of nothing
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    # A local Ray without the dashboard: its processes take longer to start than the rest.
    code = "import sys, ray, runpy; ray.init(include_dashboard=False); runpy.run_path(sys.argv.pop(1), {}, '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, EXAMPLE, tmp_path / "out", tmp_path / "in" / "*.mp4", tmp_path / "model"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"},
    )
    assert done.returncode == 0, done.stderr
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    (failed,) = [row for row in rows if row["error"]]
    assert failed["video"] == "broken" and "can't be opened" in failed["error"] and failed["counts"] is None
    for name in ("a", "b"):
        results = list(ausm_hf.segment_video(tmp_path / "in" / f"{name}.mp4", model, processor))
        found = {(row["frame"], row["id"]): row for row in rows if row["video"] == name}
        assert found.keys() == {(r.index, item["id"]) for r in results for item in r.objects} and found
        for r in results:
            for item in r.objects:
                row = found[r.index, item["id"]]
                mask = rle_tools.decode({"size": [row["height"], row["width"]], "counts": row["counts"]})
                assert np.array_equal(mask, r.masks == item["id"])
                assert row["label"] == item["label"] and row["score"] == pytest.approx(item["score"])
