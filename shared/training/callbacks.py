"""What happens beside the training loop: data order, checkpoints, the end of a run, and its measured cost."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from shared.errors import RequestError, WorkError


class Order(Callback):
    """Reseeds everything random in every epoch, so that a resumed run goes on as if never interrupted.

    The seeds follow from the one in force when the run began, which checkpoints keep. The order of samples has a
    generator of its own: how much else is drawn when an epoch's iterator is made depends on whether it is the first.
    Augmentation in workers that outlive an epoch is beyond reach: there it must follow from the sample's index.
    """

    def __init__(self, loader: DataLoader):
        self.seed, self.first = torch.initial_seed(), 0
        found = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        self.samplers: list[Any] = [sampler for sampler in found if sampler is not None]
        self.loader, self.generator = loader, torch.Generator()
        for sampler in self.samplers:
            if hasattr(sampler, "generator"):
                sampler.generator = self.generator

    def start(self, epoch: int, rank: int) -> None:
        """Before an epoch's iterator is made."""
        self.generator.manual_seed(_seed_all(self.seed, epoch, rank))
        for sampler in self.samplers:
            if hasattr(sampler, "set_epoch"):  # Lightning does it too, but after the first epoch's iterator was made
                sampler.set_epoch(epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch != self.first:  # the first epoch's iterator exists already: see Feed
            self.start(trainer.current_epoch, trainer.global_rank)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            _seed_all(self.seed + 1, trainer.current_epoch, trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]


def _seed_all(seed: int, epoch: int, rank: int) -> int:
    """Seed Python, NumPy and torch with a number of 32 bits that is another for every seed, epoch and process."""
    number = int(np.random.SeedSequence([seed % 2**64, epoch, rank]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    return number


class Feed(LightningDataModule):
    """Hands the loaders to Lightning, seeded before the first epoch's iterator is made."""

    def __init__(self, loaders: dict[str, DataLoader], order: Order):
        super().__init__()
        self.loaders, self.order = loaders, order

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        self.order.first = progress.processed  # current_epoch is not yet restored here
        self.order.start(self.order.first, self.trainer.global_rank)
        return self.order.loader

    def val_dataloader(self) -> DataLoader:
        return self.loaders["validation"]

    def test_dataloader(self) -> DataLoader:
        return self.loaders["test"]


class Checkpoints(Callback):
    """Writes ``last.ckpt`` after every check, ``best.ckpt`` where the metric is the best so far; whole or not at all.

    monitor: name of the metric.  smaller: whether a smaller one is better.
    """

    def __init__(self, folder: Path, monitor: str, smaller: bool):
        self.folder, self.monitor, self.smaller = folder, monitor, smaller
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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.due:
            return
        new = self.folder / ".new.ckpt"
        try:
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                if self.improved:
                    shutil.copyfile(new, self.folder / ".best.ckpt")
                    os.replace(self.folder / ".best.ckpt", self.folder / "best.ckpt")
                os.replace(new, self.folder / "last.ckpt")
            trainer.strategy.barrier()
        except OSError as error:
            for name in (new, self.folder / ".best.ckpt"):
                name.unlink(missing_ok=True)
            raise WorkError(f"{self.folder}: cannot write the checkpoint: {error}") from error
        self.due = self.improved = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class End(Callback):
    """Ends the run at the last step, with a check there, and lets a run that early stopping ended stay ended."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        early: Any = trainer.early_stopping_callback
        stopped = early is not None and early.wait_count >= early.patience
        trainer.should_stop = stopped or trainer.global_step >= self.steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


class Cost(Callback):
    """Measures the time of steps (the last thousand) and of training, checks included, and the peak of memory."""

    def __init__(self):
        self.steps: deque[float] = deque(maxlen=1000)
        self.seconds, self.peak = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.device, self.since = pl_module.device, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_batch_start(self, *args: Any) -> None:
        self.mark = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(time.perf_counter() - self.mark)

    def on_train_end(self, *args: Any) -> None:
        self.state_dict()

    def summary(self) -> dict[str, float | int | None]:
        step = statistics.median(self.steps) if self.steps else None
        return {"step_seconds": step, "train_seconds": self.seconds, "peak_memory_bytes": self.peak}

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        self.peak = max(self.peak, _peak(self.device))
        return {"steps": list(self.steps), "seconds": self.seconds, "peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps.extend(state_dict["steps"])
        self.seconds, self.peak = state_dict["seconds"], state_dict["peak"]


def _peak(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, the most that the process took otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
