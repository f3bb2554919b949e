"""Exact resume under SIGKILL: ``python -m tests.reliability.kills [KILLS]`` (20 if not said; about 3 s for each).

Trains one run whole and the same run killed again and again, at random moments and, every other time, while a
checkpoint is being written; each time it is resumed. Prints each kill, then whether the two adapter files are equal
byte by byte. Exit status 0 where they are.

Every start is a new process that does what ``omniadapt run`` does. To save the time of imports, and that alone, they
are forked from a process that has the libraries loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

EPOCHS = 150
COMMAND = [
    "run", "quickstart", "--tiny", f"trainer.epochs={EPOCHS}", "trainer.check_every=1", "trainer.accumulate=2",
    "trainer.device=cpu", "data.workers=1",
]  # fmt: skip
LIBRARIES = ["lightning.pytorch", "torchmetrics", "timm", "scipy.signal", "matplotlib.pyplot", "shared.training.task"]


def train(output: Path, resume: list[str]) -> None:
    from shared.cli import main

    multiprocessing.set_start_method(None, force=True)  # the loaders' workers start as they do anywhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(main([*COMMAND, "--output", str(output), *resume]))


def start(output: Path) -> BaseProcess:
    resume = ["--resume"] if (output / "recipe.yaml").exists() else []
    process = multiprocessing.get_context("forkserver").Process(target=train, args=(output, resume))
    process.start()
    return process


def wait_for(process: BaseProcess, happened: Callable[[], bool]) -> bool:
    """Poll until something happened; False where the process ended first."""
    while process.is_alive():
        if happened():
            return True
        time.sleep(0.0002)
    return False


def kill_once(output: Path, while_writing: bool) -> str | None:
    """Start or resume, kill, and say where; None where the run ended before."""
    process = start(output)
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
    process.kill()
    process.join()
    return "while a checkpoint was written" if new.exists() else "between checkpoints"


def finish(output: Path, which: str) -> None:
    process = start(output)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the {which} run failed")


def main(kills: int) -> int:
    multiprocessing.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        finish(whole, "uninterrupted")
        done = 0
        while done < kills:
            where = kill_once(cut, while_writing=done % 2 == 1)
            if where is None:
                print(f"the run ended after {done} kills; raise EPOCHS for more")
                return 1
            done += 1
            rows = (cut / "metrics.csv").read_text().count("\n") - 1
            print(f"kill {done}: {where}, {rows} rows of metrics so far", flush=True)
        finish(cut, "last resumed")
        same = (whole / "adapter.safetensors").read_bytes() == (cut / "adapter.safetensors").read_bytes()
        print(f"{done} kills: the adapter file is {'' if same else 'NOT '}bit for bit that of the uninterrupted run")
        return int(not same)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
