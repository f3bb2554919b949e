"""What happens beside the training loop: seeds, checkpoints, the end of a run, and its measured cost."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from shared.errors import RequestError, WorkError
from shared.training.feed import EVALUATION, STEP, seed_all


class Order(Callback):
    """Seeds everything random, so that a resumed run goes on as if never interrupted.

    All follows from the seed in force when the run began (process 0's), which checkpoints keep: a sample's random
    numbers from its place in the epoch (see ``feed``), a step's from its number. What a method draws in ``step`` is the
    same in every process; what the model draws after it, such as dropout, is each process's own. An evaluation draws
    the same numbers every time, whichever process a batch falls to.
    """

    def __init__(self):
        self.seed = torch.initial_seed()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.seed = trainer.strategy.broadcast(self.seed)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.seed = self.seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        feed: Any = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.weight = feed.shares.weights[batch_idx]
        seed_all(self.seed, STEP, trainer.current_epoch, batch_idx)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._evaluate("validation", trainer, pl_module, batch_idx)

    def on_test_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._evaluate("test", trainer, pl_module, batch_idx)

    def _evaluate(self, split: str, trainer: Trainer, pl_module: Any, step: int) -> None:
        feed: Any = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.counts = feed.turns[split].counts(step)
        seed_all(self.seed, EVALUATION, feed.turns[split].number(step))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]


class Checkpoints(Callback):
    """Writes ``last.ckpt`` after every check, ``best.ckpt`` where the metric is the best so far; whole or not at all.

    monitor: name of the metric.  smaller: whether a smaller one is better.  every: steps after which ``last.ckpt`` is
    written within an epoch too, None: never.
    """

    def __init__(self, folder: Path, monitor: str, smaller: bool, every: int | None):
        self.folder, self.monitor, self.smaller, self.every = folder, monitor, smaller, every
        self.best: dict[str, Any] | None = None
        self.due = self.improved = False

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        measured = trainer.callback_metrics
        if self.monitor not in measured:
            names = ", ".join(sorted(n for n in measured if n.startswith("validation/")))
            raise RequestError(
                f"trainer.monitor {self.monitor!r} was not measured; validation gave {names or 'nothing'}"
            )
        value = float(measured[self.monitor])
        self.due = True
        if self.best is None or (value < self.best["value"] if self.smaller else value > self.best["value"]):
            self.improved = True
            at = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
            self.best = {"monitor": self.monitor, "value": value, **at}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The moment between two steps in which all that belongs to the last one is done."""
        between = batch_idx and batch_idx % trainer.accumulate_grad_batches == 0
        if self.every and between and trainer.global_step % self.every == 0:
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The batch that is about to come is not yet taken."""
        for progress in (checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][k] for k in ("current", "total")):
            progress["ready"] = progress["started"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.due:
            self._write(trainer)
        self.due = self.improved = False

    def _write(self, trainer: Trainer) -> None:
        new = self.folder / ".new.ckpt"
        try:
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                if self.improved:
                    _rename(shutil.copyfile(new, self.folder / ".best.ckpt"), self.folder / "best.ckpt")
                _rename(new, self.folder / "last.ckpt")
            trainer.strategy.barrier()
        except OSError as error:
            for name in (new, self.folder / ".best.ckpt"):
                name.unlink(missing_ok=True)
            raise WorkError(f"{self.folder}: cannot write the checkpoint: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def _rename(new: Path, path: Path) -> None:
    """Once all of it is on the disk."""
    with open(new, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


class End(Callback):
    """Ends the run at the last step, with a check there, and lets a run that early stopping ended stay ended.

    steps: of the optimiser.  batches: of an epoch.
    """

    def __init__(self, steps: int, batches: int):
        self.steps, self.batches = steps, batches

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A run that ended within an epoch and is now longer goes on there: that epoch is not over."""
        loop = checkpoint["loops"]["fit_loop"]
        within = loop["epoch_loop.batch_progress"]["current"]["completed"] < self.batches
        if within and checkpoint["global_step"] < self.steps:
            for progress in (loop["epoch_progress"][k] for k in ("current", "total")):
                progress["processed"] = progress["completed"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        early: Any = trainer.early_stopping_callback
        stopped = early is not None and early.wait_count >= early.patience
        trainer.should_stop = stopped or trainer.global_step >= self.steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class Cost(Callback):
    """Measures the time of steps (the last thousand) and of training, checks included, the share of waiting for batches
    to train on, and the peak of memory; of a backbone that counts them, how often it was called in training, checks
    included, and on how many images."""

    def __init__(self):
        self.steps: deque[float] = deque(maxlen=1000)
        self.seconds, self.busy, self.waited, self.peak = 0.0, 0.0, 0.0, 0
        self.asked: list[int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.device, self.since = pl_module.device, time.perf_counter()
        self.backbone = pl_module.model.backbone
        if hasattr(self.backbone, "calls"):
            self.backbone.calls, self.backbone.images = self.asked or (0, 0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_batch_start(self, *args: Any) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps.append(time.perf_counter() - self.mark)
        self.busy += self.steps[-1]
        feed: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.waited, feed.training.waited = self.waited + feed.training.waited, 0.0

    def on_train_end(self, *args: Any) -> None:
        self.state_dict()

    def summary(self) -> dict[str, float | int | None]:
        step = statistics.median(self.steps) if self.steps else None
        share = self.waited / (self.waited + self.busy) if self.busy else None
        asked = dict(zip(("model_calls", "model_images"), self.asked, strict=True)) if self.asked else {}
        return {
            "step_seconds": step, "wait_share": share, "train_seconds": self.seconds, "peak_memory_bytes": self.peak,
            **asked,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        self.peak = max(self.peak, _peak(self.device))
        times = {"seconds": self.seconds, "busy": self.busy, "waited": self.waited}
        if hasattr(self.backbone, "calls"):
            self.asked = [self.backbone.calls, self.backbone.images]
        kept = {"steps": list(self.steps), "peak": self.peak, **times}
        return kept | ({"asked": self.asked} if self.asked else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps.extend(state_dict["steps"])
        self.seconds, self.peak = state_dict["seconds"], state_dict["peak"]
        self.busy, self.waited = state_dict.get("busy", 0.0), state_dict.get("waited", 0.0)
        self.asked = state_dict.get("asked")


def _peak(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, the most that the process took otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
