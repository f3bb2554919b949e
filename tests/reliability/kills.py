"""Exact resume under SIGKILL: ``python -m tests.reliability.kills [KILLS [PROCESSES]]``, 20 and 1 if not said.

Trains one run whole and the same run killed again and again, at random moments and, every other time, while a
checkpoint is being written; each time it is resumed. Prints each kill, then whether adapter file and metrics of the two
runs are equal byte by byte. Exit status 0 where they are.

Every start is a new process that does what ``omniadapt run`` does, in a session of its own, all of which is killed. To
save the time of imports, and that alone, they are forked from a process that has the libraries loaded. A kill takes
about 3 s; up to a minute where the run has several processes, which load them anew.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

EPOCHS = 60  # of 12 tiles: 6 batches, 3 steps
COMMAND = [
    "run", "quickstart", "--tiny", f"trainer.epochs={EPOCHS}", "trainer.check_every=1", "trainer.accumulate=2",
    "trainer.save_every=1", "trainer.device=cpu", "data.workers=1", "data.count=24",
]  # fmt: skip
FILES = ["adapter.safetensors", "metrics.csv"]
LIBRARIES = ["lightning.pytorch", "torchmetrics", "timm", "scipy.signal", "matplotlib.pyplot", "shared.training.task"]


def train(output: Path, processes: int, resume: list[str]) -> None:
    from shared.cli import main

    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the loaders' workers start as they do anywhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(main([*COMMAND, f"trainer.devices={processes}", "--output", str(output), *resume]))


def start(output: Path, processes: int) -> BaseProcess:
    resume = ["--resume"] if (output / "recipe.yaml").exists() else []
    process = multiprocessing.get_context("forkserver").Process(target=train, args=(output, processes, resume))
    process.start()
    return process


def wait_for(process: BaseProcess, happened: Callable[[], bool]) -> bool:
    """Poll until something happened; False where the process ended first."""
    while process.is_alive():
        if happened():
            return True
        time.sleep(0.0002)
    return False


def kill_once(output: Path, processes: int, while_writing: bool) -> str | None:
    """Start or resume, kill, and say where; None where the run ended before."""
    process = start(output, processes)
    last, new = output / "checkpoints" / "last.ckpt", output / "checkpoints" / ".new.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    alive = wait_for(process, lambda: last.exists() and last.stat().st_mtime_ns != before)
    if alive and while_writing:
        alive = wait_for(process, new.exists)
    elif alive:
        end = time.monotonic() + random.uniform(0, 0.5)
        alive = wait_for(process, lambda: time.monotonic() > end)
    if not alive:
        if process.exitcode:
            raise SystemExit(f"the run failed with status {process.exitcode}: see {output / 'log.txt'}")
        return None
    os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    return "while a checkpoint was written" if new.exists() else "between checkpoints"


def finish(output: Path, processes: int, which: str) -> None:
    process = start(output, processes)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the {which} run failed")


def main(kills: int = 20, processes: int = 1) -> int:
    multiprocessing.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        finish(whole, processes, "uninterrupted")
        done = 0
        while done < kills:
            where = kill_once(cut, processes, while_writing=done % 2 == 1)
            if where is None:
                print(f"the run ended after {done} kills; raise EPOCHS for more")
                return 1
            done += 1
            rows = (cut / "metrics.csv").read_text().count("\n") - 1
            print(f"kill {done}: {where}, {rows} rows of metrics so far", flush=True)
        finish(cut, processes, "last resumed")
        different = [name for name in FILES if (whole / name).read_bytes() != (cut / name).read_bytes()]
        for name in FILES:
            print(f"{name}: {'NOT ' if name in different else ''}byte for byte that of the uninterrupted run")
        return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
