"""How everything here is measured: alternating pairs in one process, memory in fresh ones, rows of JSON and a page.

A script has ``measure()``, which gives rows (a list, or one by one), and ends with ``run(__name__, measure)``. Calling
it by ``python -m`` prints its rows and writes them to ``results/<script>.json``. Times are told as ratios within one
run, never alone.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Row:
    """One figure. case: what was run.  measure: what the figure is and against what ("step time / limit").

    value with its quartiles low and high (equal where there is one run).  target: what is asked for, None: nothing.
    below: whether the target is a greatest or a least value.  note: what the reader must know.
    """

    case: str
    measure: str
    value: float
    low: float
    high: float
    target: float | None = None
    below: bool = True
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.below else self.value >= self.target


def ratios(
    cases: Mapping[str, Callable[[], Any]], reference: Callable[[], Any], *, repeats: int = 9, warmup: int = 2
) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles, by case, of its time over the reference's in pairs run one after the other.

    The order within a pair alternates, and the cases take turns, so that a drift of the machine's speed meets all.
    """
    for _ in range(warmup):
        for run in (reference, *cases.values()):
            run()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats):
        for name, run in cases.items():
            pair = (reference, run) if turn % 2 == 0 else (run, reference)
            times = [seconds(each) for each in pair]
            found[name].append(times[1] / times[0] if turn % 2 == 0 else times[0] / times[1])
    return {name: spread(values) for name, values in found.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, work queued on a GPU included."""
    start = time.perf_counter()
    run()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def peak() -> float:
    """The process's peak memory so far, in MiB.

    On Linux from its status: what ``getrusage`` tells starts at the peak of the process that started this one.
    """
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fresh(module: str, *arguments: str) -> Any:
    """What ``python -m module arguments`` prints as its last line, in JSON, from a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import torch

    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1),
    }


def line(row: Row) -> str:
    """A row as a terminal shows it."""
    asked = (
        "" if row.target is None else f"  {'≤' if row.below else '≥'} {row.target:g}  {'yes' if row.reached else 'NO'}"
    )
    return (
        f"{row.case:56} {row.measure:44} {row.value:9.3f} [{row.low:.3f}, {row.high:.3f}]{asked}  {row.note}".rstrip()
    )


def run(name: str, measure: Callable[[], Iterable[Row]]) -> None:
    """What a script does when it is called: measure, print, and write ``results/<script>.json``."""
    if name != "__main__":
        return
    script = Path(sys.argv[0]).stem
    before, rows = machine(), []
    for row in measure():
        rows.append(row)
        print(line(row), flush=True)
    RESULTS.mkdir(exist_ok=True)
    told = {"script": script, "machine": before, "rows": [asdict(row) | {"reached": row.reached} for row in rows]}
    (RESULTS / f"{script}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
