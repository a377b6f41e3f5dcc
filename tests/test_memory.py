"""Memory of a stream does not grow with its length."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "stream_memory.py"


@pytest.mark.slow
def test_a_thousand_frames_need_the_memory_of_a_hundred():
    command = [sys.executable, SCRIPT, "100", "1000"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    short, long = (json.loads(line) for line in printed.splitlines())
    assert (short["frames"], long["frames"]) == (100, 1000)
    assert long["peak_rss_mib"] <= 1.02 * short["peak_rss_mib"], printed
