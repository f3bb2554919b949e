"""The engine: how long, how precisely and where a task trains; ``fit`` runs it on Lightning's trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shared.cache import Cache
from shared.dropping import dropping
from shared.errors import RequestError
from shared.half import halve
from shared.memory import Saving
from shared.recompute import blocks
from shared.training import processes
from shared.training.caching import cacheable, through_cache
from shared.training.quiet import quiet

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from shared.adapted import Adapted
    from shared.training.task import Task

BEST = "checkpoints/best.ckpt"  # below a run directory


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a task trains. Give ``epochs`` (passes over the training split) or ``steps`` (of the optimiser), not both.

    precision: of the computation; trained parameters stay in float32 with the mixed ones.
    accumulate: batches whose gradients are summed for one optimiser step.  clip: greatest gradient norm, None: any.
    patience: checks without a better monitored metric after which training stops, None: never.
    monitor: "validation/<metric>" that picks the best checkpoint, None: the task's own; smaller is better for names
    that end in "loss" or "error".  check_every: epochs between checks (validation and checkpoint); there is always one
    at the end.  save_every: steps between checkpoints within an epoch, for long ones; None: at checks alone.
    adapter_drop: most blocks, from the lowest, whose adapters rest in a training step; how many, from 0, is drawn for
    each step (robust AdapterDrop, Rücklé et al., 2021). Evaluation runs all. A method whose ``depth`` begins higher is
    the specialised one.
    device: where.  devices: on how many of a machine, with one process for each.  nodes: machines.
    strategy: "ddp" (every process holds the model; Li et al., 2020), "fsdp" (the model is divided among them; Zhao et
    al., 2023) or "auto" (ddp where there are several processes). Processes share each batch: the data's batch size,
    the steps and what is learnt are those of one process, but for what a process draws for its own samples (dropout)
    and for batch normalisation, whose statistics are of its share.
    frozen: "bfloat16" stores the backbone's products in half precision and runs them so (``shared.half``), in training
    and prediction; adapters and head stay in float32.  recompute: keep only the inputs of the backbone's blocks for
    backward and run each block again (gradient checkpointing), the gradients are the same.  saved_bits:
    keep activations as codes of 1, 2, 4 or 8 bits (``shared.memory``), the forward pass stays exact; saved_attention:
    those of fused attention too.  offload: keep a GPU's activations in main memory.
    cache: keep what is frozen below the lowest adapter, so that it runs once for each image: the settings of
    ``shared.cache.Cache`` (precision, views, gigabytes, folder), {} for its defaults, None for no cache. Training and
    checks go through it; the test runs the whole model, as it will be used.
    """

    epochs: int | None = None
    steps: int | None = None
    precision: Literal["32", "16-mixed", "bf16-mixed", "64"] = "32"
    accumulate: int = 1
    clip: float | None = None
    patience: int | None = None
    monitor: str | None = None
    check_every: int = 1
    save_every: int | None = None
    adapter_drop: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    frozen: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    saved_bits: int | None = None
    saved_attention: bool = False
    offload: bool = False
    cache: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.cache is not None:
            Cache.of(self.cache)
        if (self.epochs is None) == (self.steps is None):
            raise RequestError("trainer: give either epochs or steps")
        for key in (
            "epochs",
            "steps",
            "accumulate",
            "clip",
            "patience",
            "check_every",
            "save_every",
            "devices",
            "nodes",
        ):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise RequestError(f"trainer.{key} {value}: use a number above 0")
        if self.adapter_drop < 0:
            raise RequestError(f"trainer.adapter_drop {self.adapter_drop}: use 0 or more")
        if self.strategy != "auto" and self.processes == 1:
            raise RequestError(f"trainer.strategy {self.strategy!r} is for several processes: give trainer.devices too")
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise RequestError("trainer.precision '16-mixed' cannot be scaled under 'fsdp': use 'bf16-mixed'")
        if self.frozen == "bfloat16" and self.precision not in ("32", "bf16-mixed"):
            raise RequestError(f"trainer.frozen 'bfloat16' with precision {self.precision!r}: use '32' or 'bf16-mixed'")
        if self.strategy == "fsdp" and (self.frozen == "bfloat16" or self.recompute or self.offload):
            raise RequestError("trainer.frozen 'bfloat16', recompute and offload do not go with 'fsdp': use 'ddp'")
        if self.saved_attention and self.saved_bits is None:
            raise RequestError("trainer.saved_attention: give saved_bits too")
        if self.strategy == "fsdp" and self.cache is not None:
            raise RequestError("trainer.cache: under 'fsdp' every process has to run every block: use 'ddp'")

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.devices * self.nodes

    def economise(self, model: Adapted) -> None:
        """Let a model compute and keep for backward what the engine says: frozen, recompute, saved_bits, offload.

        Raises RequestError where the backbone has no blocks to recompute, or trains and cannot be in half precision.
        """
        if self.frozen == "bfloat16":
            halve(model)
        if self.recompute:
            blocks(model)
        model.recompute, model.offload = model.recompute or self.recompute, model.offload or self.offload
        if self.saved_bits is not None:
            model.saving = Saving(bits=self.saved_bits, attention=self.saved_attention)

    def total_steps(self, batches: int) -> int:
        """Optimiser steps of the whole training, where an epoch has ``batches``."""
        return self.steps if self.steps is not None else (self.epochs or 0) * math.ceil(batches / self.accumulate)


def fit(task: Task, data: Any, engine: Engine, output: Path, resume: bool = False) -> dict[str, Any]:
    """Train ``task`` on ``data``, keep its best state, and test that.

    data: an object whose ``train()``, ``validation()`` and ``test()`` give torch loaders.

    Writes ``metrics.csv``, ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` below ``output``. An interrupted run
    goes on, with ``resume``, from its last checkpoint (from the start where there was none), and gives what it would
    have given uninterrupted.

    Returns ``test`` (the task's results in its best state), ``best`` (monitor, value, epoch, step), ``epochs``,
    ``steps`` and ``cost``: ``step_seconds`` (median), ``wait_share`` (of waiting for
    training batches, of the time of that and of steps), ``train_seconds``, ``peak_memory_bytes`` (of the GPU's tensors;
    of the process elsewhere). The model holds its best state afterwards.

    Raises RequestError where there is a run to overwrite, no data, or nothing to cache; WorkError where the loss is not
    finite or a trainable tensor gets no gradient.
    """
    from shared.training.callbacks import Checkpoints, Cost, End, Order
    from shared.training.feed import Feed, check
    from shared.training.log import MetricsFile

    available(engine)
    engine.economise(task.model)
    cacheable(task, engine)
    folder = Path(output) / "checkpoints"
    state = _state(folder / "last.ckpt", resume)
    loaders = {split: getattr(data, split)() for split in ("train", "validation", "test")}
    check(loaders, engine.processes)
    batches = len(loaders["train"])
    monitor, total = engine.monitor or task.monitor, engine.total_steps(batches)

    if processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    checkpoints, order, cost = (
        Checkpoints(folder, monitor, smaller_is_better(monitor), engine.save_every),
        Order(),
        Cost(),
    )
    with quiet():
        log = MetricsFile(Path(output) / "metrics.csv", keep=state["global_step"] if state else None)
        callbacks = [checkpoints, order, End(total, batches), cost, *_optional(engine, monitor)]
        trainer = _trainer(engine, task, batches, total, log, callbacks)
        task.total_steps = total
        task.train()
        with dropping(task.model, engine.adapter_drop), through_cache(task, engine) as cache:
            feed = Feed(loaders, order, cache)
            trainer.fit(task, datamodule=feed, ckpt_path=folder / "last.ckpt" if state else None, weights_only=True)
        feed.cache = None
        task.load_state_dict(read_checkpoint(Path(output) / BEST)["state_dict"])
        trainer.test(task, datamodule=feed, verbose=False)
    reached = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    return {"test": task.outcome["test"], "best": checkpoints.best, **reached, "cost": cost.summary()}


def _state(last: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from; None to start: a run that was killed before its first check has none."""
    if resume and last.exists():
        return read_checkpoint(last)
    if last.exists():
        raise RequestError(f"{last} exists: resume that run, or choose another output directory")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours: tensors and plain values, nothing that runs code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for the ways in which a file can be broken
        line = str(error).strip().partition("\n")[0] or "it ends too early"
        raise RequestError(f"{path}: not a readable checkpoint ({type(error).__name__}: {line})") from error
    if not isinstance(state, dict) or not {"state_dict", "loops", "global_step"} <= state.keys():
        raise RequestError(f"{path}: not a training checkpoint of omniadapt")
    return state


def smaller_is_better(monitor: str) -> bool:
    return monitor.endswith(("loss", "error"))


def _optional(engine: Engine, monitor: str) -> Iterator[Any]:
    """Early stopping where asked for, and a progress bar on a terminal."""
    from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar

    if engine.patience is not None:
        mode = "min" if smaller_is_better(monitor) else "max"
        yield EarlyStopping(monitor, patience=engine.patience, mode=mode, check_on_train_epoch_end=False)
    if sys.stdout.isatty():
        yield RichProgressBar()


def _trainer(engine: Engine, task: Task, batches: int, total: int, log: Any, callbacks: list[Any]) -> Trainer:
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator=engine.device,
        devices=engine.devices,
        num_nodes=engine.nodes,
        strategy=_strategy(engine, task),
        use_distributed_sampler=False,  # Feed divides
        precision=engine.precision,
        max_epochs=-1 if engine.epochs is None else engine.epochs,
        accumulate_grad_batches=engine.accumulate,
        gradient_clip_val=engine.clip,
        # Counted in batches over the whole run, so that a last, shorter check is possible.
        check_val_every_n_epoch=None,
        val_check_interval=engine.check_every * batches,
        num_sanity_val_steps=0,
        log_every_n_steps=max(1, min(total // 1000, batches // engine.accumulate)),
        logger=log,
        callbacks=callbacks,
        inference_mode=False,  # what adapters or metrics keep from an evaluation stays usable in training
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )


def _strategy(engine: Engine, task: Task) -> Any:
    """Lightning's strategy."""
    if engine.processes == 1:
        return "auto"
    if engine.strategy == "fsdp":
        from shared.training.sharded import Sharded

        return Sharded()
    from lightning.pytorch.strategies import DDPStrategy
    from torch.nn.parallel import DistributedDataParallel

    # Process 0's buffers go to all before every step: those that can change, not the frozen ones.
    changing = {id(tensor) for tensor in task.model.trained_state().values()}
    frozen = [name for name, buffer in task.named_buffers() if id(buffer) not in changing]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, frozen)
    return DDPStrategy(find_unused_parameters=True)  # a method may leave some of its adapters out of a step


def available(engine: Engine) -> None:
    """Raises RequestError where processes or device are not there or the device cannot compute in the precision."""
    if processes.world() != engine.processes:
        raise RequestError(
            f"trainer.devices {engine.devices} x trainer.nodes {engine.nodes}: {processes.world()} processes were "
            "started; call fit in as many, by shared.training.launch or torchrun"
        )
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = engine.device if engine.device != "auto" else "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there[device]:
        raise RequestError(f"trainer.device {device!r}: this machine has {', '.join(d for d in there if there[d])}")
    if device == "cuda" and engine.devices > torch.cuda.device_count():
        raise RequestError(f"trainer.devices {engine.devices}: this machine has {torch.cuda.device_count()} GPUs")
    if device == "cpu" and engine.offload:
        raise RequestError("trainer.offload moves a GPU's activations to main memory: this run trains on the CPU")
    if device == "cpu" and engine.precision == "16-mixed":
        raise RequestError("trainer.precision '16-mixed' needs a GPU: use 'bf16-mixed' or '32' on a CPU")
