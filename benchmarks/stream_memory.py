"""
Peak memory of a stream: `python benchmarks/stream_memory.py 100 1000`.

Each length runs in a process of its own: synthetic 240 x 426 frames (a textured object moves over a textured ground)
through `segment_video`, with the object prompted. Prints one JSON line per length.
"""

import json
import subprocess
import sys
import time

import numpy as np
from common import memory

SIZE = (240, 426)


def frames(count: int):
    """Yields uint8 RGB frames; `object_mask` says where the object is in the first one."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 160, (SIZE[0] // 6, SIZE[1] // 6, 3), dtype=np.uint8).repeat(6, axis=0).repeat(6, axis=1)
    for index in range(count):
        frame = ground.copy()
        left = int(150 + 100 * np.sin(index / 30))
        frame[80:160, left : left + 100] = (220, 60 + index % 64, 40)
        yield frame


def object_mask() -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[80:160, 150:250] = 1
    return mask


def measure(count: int) -> dict:
    from ausm_hf import load_model, segment_video

    model, processor = load_model(device="cpu")
    processor.image_processor.size = {"shortest_edge": 160}  # the length is the question, and takes its time
    start = time.perf_counter()
    done = sum(1 for _ in segment_video(frames(count), model, processor, object_mask()))
    return {
        "frames": done,
        "peak_rss_mib": round(memory("peak"), 1),
        "seconds_per_frame": round((time.perf_counter() - start) / done, 4),
    }


if __name__ == "__main__":
    lengths = sys.argv[1:] or ["100", "1000"]
    if len(lengths) == 1:
        print(json.dumps(measure(int(lengths[0]))))
    else:
        for length in lengths:
            subprocess.run([sys.executable, __file__, length], check=True)
