"""What a training will cost, told before it starts: a few of its batches are trained on a copy of the task."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import logging
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Sampler

from shared.cache import Cache
from shared.errors import RequestError
from shared.training.feed import batches_of, rebuilt
from shared.training.optimiser import Optimiser

if TYPE_CHECKING:
    from shared.training.engine import Engine
    from shared.training.task import Task

TRIED = 3  # training batches of a pass; the very first one, on which all is slow, is not timed
CHECKED = 2  # validation batches
PASSES = 2  # the first check is slow too: it loads what metrics need
_log = logging.getLogger("omniadapt")


class Plan(NamedTuple):
    """A prediction, in the names and units of what ``fit`` measures.

    trainable: parameters that the optimiser holds, and whether the backbone's are among them.  step_seconds: of one
    batch.  wait_share: of waiting for data, of the time of steps and waiting.  epoch_seconds: of the training batches
    of an epoch.  train_seconds: of the whole training with its checks, without early stopping.  peak_memory_bytes.
    plan_seconds: what the prediction took.
    """

    trainable: int
    trained_backbone: bool
    step_seconds: float
    wait_share: float
    epoch_seconds: float
    train_seconds: float
    peak_memory_bytes: int
    plan_seconds: float


def predict(task: Task, data: Any, engine: Engine, output: Path) -> dict[str, Any] | None:
    """``plan`` as a dictionary, told in the log; None where it fails: no run ends for want of a prediction.

    None too where the model is a black box, whose calls may cost more than a prediction is worth.
    """
    if not getattr(task.model.backbone, "differentiable", True):
        return None
    try:
        found = plan(task, data, engine, output)._asdict()
        _log.info("predicted %s", json.dumps(found))
        return found
    except Exception as error:  # what is wrong with the training for good, the training itself will tell
        _log.warning("no prediction of the cost: %s: %s", type(error).__name__, error)
        return None
    finally:
        gc.collect()  # the copy, whose parts hold each other
        forget_peak()


def plan(task: Task, data: Any, engine: Engine, output: Path) -> Plan:
    """Train ``TRIED`` batches twice through ``fit`` on a copy of ``task``, which shares the frozen weights; where there
    is a cache it holds them the second time.

    Task, loaders and the global random states stay as they are, bit for bit; what a data set draws from a generator of
    its own does not. Works in a folder below ``output``, which it removes. Batches are taken to differ in content
    alone: where they differ in size, the first ones speak for all.

    Raises RequestError where several processes train, and what ``fit`` raises.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    from shared.training.engine import fit

    if engine.processes > 1:
        raise RequestError("costs are predicted for one process")
    cache = None if engine.cache is None else {**engine.cache, "views": 1}
    began, folder, watch = time.perf_counter(), output / ".plan", _Watch(cached=cache is not None)
    short = replace(
        engine, epochs=PASSES, steps=None, patience=None, check_every=1, save_every=None, cache=cache,
        monitor="train/loss",  # a metric may be undefined on so few samples
    )  # fmt: skip
    with isolate_rng(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # no progress bar either
        warnings.simplefilter("ignore")
        train, validation = data.train(), data.validation()
        few, checks = _first(train, TRIED), _first(validation, CHECKED)
        copied = trial(task, engine, watch)
        forget_peak()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            cost = fit(copied, SimpleNamespace(train=few, validation=checks, test=checks), short, folder)["cost"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    twice = 0 if watch.on_gpu else sum(p.nbytes for p in task.parameters() if p.requires_grad)
    return Plan(
        trainable=watch.trainable,
        trained_backbone=any(p.requires_grad for p in task.model.backbone.parameters()),
        step_seconds=watch.step,
        wait_share=watch.wait / (watch.step + watch.wait),
        epoch_seconds=(watch.step + watch.wait) * len(train),
        train_seconds=watch.training(engine, len(train), len(validation)),
        peak_memory_bytes=int(cost["peak_memory_bytes"]) - twice,
        plan_seconds=time.perf_counter() - began,
    )


def forget_peak() -> None:
    """Start the process's peak memory anew, where the system can (Linux)."""
    if (file := Path("/proc/self/clear_refs")).exists():
        with contextlib.suppress(OSError):  # some containers forbid it
            file.write_text("5")


def trial(task: Task, engine: Engine, *watches: Callback) -> Task:
    """A copy that may be trained, watched where it does. Frozen weights are shared, for they are most of the memory,
    but not where training converts them in place."""
    parameters = task.model.backbone.parameters()
    shared = () if engine.precision == "64" else (p for p in parameters if not p.requires_grad)
    copied = copy.deepcopy(task, {id(parameter): parameter for parameter in shared})
    if isinstance(task.optimiser, Optimiser):
        copied.optimiser = replace(task.optimiser, warmup=0)  # longer than a trial it would be refused
    copied.silent = set()  # so few batches may not be of every task
    copied.configure_callbacks = lambda: list(watches)
    return copied


class _First(Sampler):
    """The first ``count`` batches of a loader's order. The order is a copy: it may keep its place or a generator."""

    def __init__(self, loader: DataLoader, count: int):
        self.batches: Any = copy.deepcopy(batches_of(loader), {id(loader.dataset): loader.dataset})
        self.sampler = getattr(self.batches, "sampler", self.batches)  # the engine seeds it
        self.count = min(count, len(self.batches))
        self.drawn: list[Any] | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        """The same in every epoch."""
        if self.drawn is None:
            self.drawn = list(islice(self.batches, self.count))
        return iter(self.drawn)


def _first(loader: DataLoader, count: int) -> Any:
    few = rebuilt(loader, loader.dataset, _First(loader, count))
    return lambda: few


class _Watch(Callback):
    """Takes the times of a short training of ``PASSES`` epochs over the same batches, each of which ends with a check.

    steps, waits: seconds of each training batch, and between it and the one before.  checks: of each check, moments at
    which validation batches were done, that of its beginning first.  after: seconds from the last training batch to
    the end, its check included.
    """

    def __init__(self, cached: bool = False) -> None:
        self.cached = cached
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.checks: list[list[float]] = []
        self.after, self.trainable, self.on_gpu = 0.0, 0, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        groups = [group for optimiser in trainer.optimizers for group in optimiser.param_groups]
        self.trainable = sum(p.numel() for group in groups for p in group["params"])
        self.on_gpu, self.mark = pl_module.device.type == "cuda", time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        now = time.perf_counter()
        self.waits.append(now - self.mark)
        self.mark = now

    def on_train_batch_end(self, *args: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.mark)
        self.mark = now

    def on_validation_start(self, *args: Any) -> None:
        self.checks.append([])

    def on_validation_batch_start(self, *args: Any) -> None:
        if not self.checks[-1]:
            self.checks[-1].append(time.perf_counter())

    def on_validation_batch_end(self, *args: Any) -> None:
        self.checks[-1].append(time.perf_counter())

    def on_train_end(self, *args: Any) -> None:
        self.after = time.perf_counter() - self.mark

    @property
    def step(self) -> float:
        """The median time of a batch but the very first; from a cache, of the last pass."""
        return statistics.median(self.steps[len(self.steps) // PASSES if self.cached else 1 :])

    @property
    def wait(self) -> float:
        """The median time between batches but before the first, whose wait starts the loader."""
        return statistics.median(self.waits[1:] or self.waits)

    def training(self, engine: Engine, batches: int, validation: int) -> float:
        """Seconds of a training by ``engine`` with so many batches in an epoch and in a check."""
        total = engine.epochs * batches if engine.epochs else engine.total_steps(batches) * engine.accumulate
        last = self.checks[-1]
        check = self.after + (last[-1] - last[-2]) * (validation - (len(last) - 1))
        # The first wait starts the loader; what else is slow the first time is so in this trial alone.
        return (
            self.waits[0]
            + (total - 1) * self.wait
            + total * self.step
            + math.ceil(total / (engine.check_every * batches)) * check
            + self._filling(min(total, batches * Cache.of(engine.cache or {}).views), validation)
        )

    def _filling(self, batches: int, validation: int) -> float:
        """What so many training batches and a first check take longer because the cache has not got them."""
        if not self.cached:
            return 0.0
        first, last = self.checks[0], self.checks[-1]
        new = statistics.median(self.steps[1 : len(self.steps) // PASSES] or self.steps[:1])
        slower = (first[-1] - first[-2]) - (last[-1] - last[-2])
        return max(0.0, batches * (new - self.step)) + max(0.0, slower * validation)
