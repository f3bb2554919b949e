"""Exact resume under SIGKILL: ``python -m tests.reliability.kills [KILLS]`` (20 if not said; about 15 s for each).

Trains one run whole and the same run killed again and again, at random moments and, every other time, while a
checkpoint is being written; each time it is resumed. Prints each kill, then whether the two adapter files are equal
byte by byte. Exit status 0 where they are.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = 400
COMMAND = [
    sys.executable, "-c", "import sys; from shared.cli import main; sys.exit(main())", "run", "quickstart", "--tiny",
    f"trainer.epochs={EPOCHS}", "trainer.check_every=1", "data.workers=0",
]  # fmt: skip


def start(output: Path) -> subprocess.Popen:
    resume = ["--resume"] if (output / "recipe.yaml").exists() else []
    return subprocess.Popen([*COMMAND, "--output", str(output), *resume], stdout=subprocess.DEVNULL)


def wait_for(process: subprocess.Popen, happened) -> bool:
    """Poll until something happened; False where the process ended first."""
    while process.poll() is None:
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
        end = time.monotonic() + random.uniform(0, 3)
        alive = wait_for(process, lambda: time.monotonic() > end)
    if not alive:
        if process.returncode:
            raise SystemExit(f"the run failed with status {process.returncode}: see {output / 'log.txt'}")
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return "while a checkpoint was written" if new.exists() else "between checkpoints"


def main(kills: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        if start(whole).wait():
            raise SystemExit("the uninterrupted run failed")
        done = 0
        while done < kills:
            where = kill_once(cut, while_writing=done % 2 == 1)
            if where is None:
                print(f"the run ended after {done} kills; raise EPOCHS for more")
                return 1
            done += 1
            rows = (cut / "metrics.csv").read_text().count("\n") - 1
            print(f"kill {done}: {where}, {rows} rows of metrics so far", flush=True)
        if start(cut).wait():
            raise SystemExit("the last resumed run failed")
        same = (whole / "adapter.safetensors").read_bytes() == (cut / "adapter.safetensors").read_bytes()
        print(f"{done} kills: the adapter file is {'' if same else 'NOT '}bit for bit that of the uninterrupted run")
        return int(not same)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
