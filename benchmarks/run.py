"""
All benchmarks of the CPU, one after another: `python benchmarks/run.py` (`make bench`), on a machine that is quiet.

Each writes `results/NAME.json` and, where there is something to draw, `plots/NAME.png`; what they print comes together
in `results/tables.md`. One that fails doesn't stop the others.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ["scan", "training", "start_up", "step", "peers"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of results/ and plots/ (default: this one)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    failed, parts = [], []
    for name in args.names or NAMES:
        start = time.perf_counter()
        command = [sys.executable, str(HERE / f"{name}.py")]
        if args.output != HERE:
            command += ["--output", str(args.output)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        minutes = (time.perf_counter() - start) / 60
        print(done.stdout, f"{name}: {minutes:.1f} minutes\n", flush=True)
        if done.returncode:
            failed.append(name)
        else:
            parts.append(f"## {name}\n\n`python benchmarks/{name}.py`, {minutes:.1f} minutes. {done.stdout}")
    if parts:
        path = (HERE / "results" if args.output == HERE else args.output) / "tables.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# Tables of the last run\n\n" + "\n".join(parts), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
