"""What the benchmarks share: the machine's name and rates, tables, plots, and result files."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ausm_hf.files import WholeOrNothing

HERE = Path(__file__).resolve().parent


def machine() -> dict:
    """Name of the processor (or GPU, with CUDA), cores that this process may use, and versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of `function()` after one call that isn't counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory(which: str = "now") -> float:
    """
    MiB that this process holds `"now"`, or held at its `"peak"`; where there is no /proc, the peak either way. On
    Linux not `ru_maxrss`, in which a process inherits the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return (
            int(status.read_text(encoding="utf-8").split({"now": "VmRSS:", "peak": "VmHWM:"}[which])[1].split()[0])
            / 1024
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def matmul_rate(size: int = 1024) -> float:
    """Floating point operations per second of a large float32 matrix product."""
    a = torch.randn(size, size)
    return 2 * size**3 / seconds(lambda: torch.mm(a, a), 5)


def copy_rate(size: int = 2**27) -> float:
    """Bytes per second, read and written together, of a copy much larger than the cache."""
    a = torch.ones(size // 4)
    b = torch.empty_like(a)
    return 2 * size / seconds(lambda: b.copy_(a), 5)


def print_table(rows: list[dict], columns: Iterable[str]) -> None:
    columns = list(columns)
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        cells = [row.get(column) for column in columns]
        print(
            "| "
            + " | ".join("" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)
            + " |"
        )
    print(flush=True)


def write_results(name: str, rows: list[dict], folder: Path | None = None, **more) -> None:
    """`results/NAME.json`: rows, with the machine they were measured on. Written whole or not at all."""
    path = (folder or HERE / "results") / f"{name}.json"
    with WholeOrNothing(path) as file:
        file.partial.write_text(
            json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


def plot_lines(name: str, lines: dict[str, tuple[list, list]], x_label: str, y_label: str, folder: Path | None = None):
    """`plots/NAME.png`: one line per entry of `lines` (label -> (xs, ys)), both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", label=label, linestyle="--" if "floor" in label else "-")
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    ticks = sorted({x for xs, _ in lines.values() for x in xs})
    axes.set_xticks(ticks, labels=[str(x) for x in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    path = (folder or HERE / "plots") / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
