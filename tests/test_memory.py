"""Memory of a stream does not grow with its length."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmImageProcessor, AusmProcessor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "stream_memory.py"


def test_endless_stream(tiny_config, tmp_path, monkeypatch):
    """The benchmark itself, on so few frames that times say nothing: more objects than slots."""
    config = AusmConfig.from_dict({**tiny_config.to_dict(), "num_id_vectors": 12})
    AusmForUniversalSegmentation(config).save_pretrained(tmp_path)
    AusmProcessor(AusmImageProcessor()).save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    main = runpy.run_path(str(BENCHMARKS / "endless_stream.py"))["main"]
    result = main(["--frames", "300", "--model", str(tmp_path)])
    assert (result["frames"], result["objects"]) == (300, 30) and result["history_bytes_unchanged"]
    assert min(result[name] for name in ("ms_first", "ms_last", "ms_young")) > 0


@pytest.mark.slow
def test_a_thousand_frames_need_the_memory_of_a_hundred():
    command = [sys.executable, SCRIPT, "100", "1000"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    short, long = (json.loads(line) for line in printed.splitlines())
    assert (short["frames"], long["frames"]) == (100, 1000)
    assert long["peak_rss_mib"] <= 1.02 * short["peak_rss_mib"], printed
