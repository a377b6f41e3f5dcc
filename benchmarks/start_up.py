"""
From nothing to the first mask: `python benchmarks/start_up.py`.

Each run is a fresh process: import of the package, of the network, loading of ausm-nano, and the first mask of a
426 x 240 video; then the share that decoding and encoding have in segmenting it. The floor is `import torch` alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, print_table, write_results

ONE = """
import json, sys, time
start = time.perf_counter()
times = {}
def lap(name):
    times[name] = 1e3 * (time.perf_counter() - start)
import torch; lap("import torch")
import ausm_hf; lap("import ausm_hf")
from ausm_hf import load_model, read_video, segment_video, VideoWriter; lap("its names")
model, processor = load_model(device="cpu"); lap("checkpoint loaded")
results = iter(segment_video(read_video(sys.argv[1]), model, processor)); next(results); lap("first frame segmented")
print(json.dumps(times))
"""

SHARE = """
import json, sys, time
from ausm_hf import load_model, read_video, segment_video, VideoWriter
model, processor = load_model(device="cpu")
start = time.perf_counter()
frames = list(read_video(sys.argv[1])); decode = time.perf_counter() - start
start = time.perf_counter()
for _ in segment_video(iter(frames), model, processor): pass
segment = time.perf_counter() - start
start = time.perf_counter()
with VideoWriter(sys.argv[2], 24, frames[0].shape[:2]) as writer:
    for frame in frames: writer.write(frame)
encode = time.perf_counter() - start
count = len(frames)
print(json.dumps({"decode": 1e3 * decode / count, "segment": 1e3 * segment / count, "encode": 1e3 * encode / count}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    from step import write_video

    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        write_video(video, 24)

        def run(code: str) -> dict:
            command = [sys.executable, "-c", code, str(video), str(Path(folder) / "out.mp4")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        runs = [run(ONE) for _ in range(args.repeats)]
        share = run(SHARE)
    rows = [{"up to": name, "ms": statistics.median(r[name] for r in runs)} for name in runs[0]]
    print(f"{machine()}\nmilliseconds from the start of Python's own code, median of {args.repeats}\n")
    print_table(rows, rows[0])
    total = sum(share.values())
    shares = [{"part": name, "ms per frame": ms, "share": ms / total} for name, ms in share.items()]
    print_table(shares, shares[0])
    write_results("start_up", rows, args.output, share=shares)


if __name__ == "__main__":
    main()
