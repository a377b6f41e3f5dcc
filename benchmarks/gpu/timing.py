"""What the GPU benchmarks share: timing by events over rotating inputs, poisoned memory, errors, deadlines."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from common import machine, print_table, write_results  # noqa: E402


class Bench:
    """Command line, device, clock and result file of one script."""

    def __init__(self, name: str, doc: str):
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU at tiny sizes")
        parser.add_argument("--minutes", type=float, default=8, help="no new measurement begins after these")
        parser.add_argument("--output", type=Path, default=os.environ.get("OUT"), help="folder (default: $OUT)")
        args = parser.parse_args()
        if not args.dry_run and not torch.cuda.is_available():
            parser.error("there is no CUDA device; --dry-run rehearses on the CPU")
        self.name, self.dry_run = name, args.dry_run
        self.folder = None if args.output is None else Path(args.output)
        if self.dry_run and self.folder is None:
            parser.error("a dry run's times are none to keep: give --output, or set $OUT")
        self.device = torch.device("cpu" if self.dry_run else "cuda")
        self.end = time.monotonic() + 60 * args.minutes
        self.rows: list[dict] = []
        self.failed = False
        self.more: dict = {"dry_run": self.dry_run}
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def add(self, what: dict, measure: Callable[[], dict]) -> None:
        """A row: `what` it is, and what `measure()` gives; or why it gave nothing. Written at once."""
        if self.late:
            row = what | {"not measured": "out of time"}
        else:
            try:
                row = what | measure()
            except Exception as error:  # one variant that fails must not take the others with it
                row = what | {"not measured": f"{type(error).__name__}: {str(error).strip()[:200]}"}
                self.failed |= not isinstance(error, torch.cuda.OutOfMemoryError)
                del error
        print(row, flush=True)
        self.rows.append(row)
        write_results(f"{self.name}_gpu", self.rows, self.folder, **self.more)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self, columns: Sequence[str]) -> None:
        print(f"\n{machine()} {self.more}\n")
        print_table(self.rows, [*columns, "not measured"])
        sys.exit(self.failed)

    def milliseconds(self, calls: Sequence[Callable[[], object]], repeats: int = 30) -> float:
        """Median time of a call, taking `calls` in turn, so that none finds its inputs in the cache."""
        if self.dry_run:
            repeats = 2
        for call in list(calls)[: 1 if self.dry_run else 3]:
            call()
        if self.device.type == "cpu":
            times = []
            for index in range(repeats):
                start = time.perf_counter()
                calls[index % len(calls)]()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host gets ahead: it isn't what is measured
        for index, (start, end) in enumerate(events):
            start.record()
            calls[index % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def copy_rate(self) -> float:
        """Bytes per second, read and written together, of a large copy."""
        pairs = [torch.rand(2, 2**16 if self.dry_run else 2**29, device=self.device) for _ in range(2)]
        return 2e3 * pairs[0][0].nbytes / self.milliseconds([lambda p=p: p[0].copy_(p[1]) for p in pairs])


@contextmanager
def poisoned():
    """Within it new memory is full of NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN counts as infinite."""
    value = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return value if value == value else float("inf")
