"""The task: what one training and one evaluation step are, as Lightning runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torchmetrics import Metric

from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.generating import Made, Wanted
from shared.training.feed import PREPARE, seed_all
from shared.training.optimiser import Optimiser
from shared.training.sharded import Sharded, like, whole
from shared.training.spsa import SPSA, assign


class Task(LightningModule):
    """Base of every modality's tasks. Subclasses give ``loss``, ``evaluate`` and ``results``.

    Its state dict is ``model.trained_state()``: a checkpoint never holds frozen weights, and loading is strict.

    Those whose ``loss`` is one of the model's outputs give these two instead of it, ``outputs`` and ``criterion``: so
    methods can train that need several passes.

    monitor: the metric that picks the best checkpoint ("<split>/<name of results()>"); an engine may name another.
    seed: of the run.
    outcome: the results of the last evaluation of each split.
    weight: of this process's share of the training batch (see ``feed.Shares``).
    counts: whether the evaluated batch counts, or only fills up this process's turns.
    silent: names of what trains and no gradient has reached yet; None before the first step.

    Before the first step moves a weight, a gradient must have reached every tensor that trains. Where a batch names its
    ``task``, it is of one task among several, whose tensors the others do not reach: then the first epoch has time.
    """

    monitor: ClassVar[str] = "validation/loss"

    def __init__(self, model: Adapted, optimiser: Optimiser | SPSA):
        super().__init__()
        self.model, self.optimiser = model, optimiser
        self.total_steps, self.seed = 1, 0
        self.outcome: dict[str, dict[str, Any]] = {}
        self.weight, self.counts = 1.0, True
        self.silent: set[str] | None = None
        self._estimate: Tensor | None = None

    def loss(self, batch: Any) -> Tensor:
        """The scalar training loss of a batch, without the methods' extra losses."""
        return self.criterion(self.outputs(batch), batch)

    def outputs(self, batch: Any) -> Any:
        """What the model says of a batch, such as logits (B, classes)."""
        raise RequestError(f"{type(self).__name__} gives a loss but no outputs, which this method trains on")

    def criterion(self, outputs: Any, batch: Any) -> Tensor:
        """The scalar training loss of such outputs."""
        raise NotImplementedError

    @property
    def adds_up(self) -> bool:
        """Whether ``loss`` is, where processes share a batch, that of the whole batch in each: for losses that are no
        means over samples, made from sums of ``processes.total``, to which a share of weight 0 adds nothing."""
        return False

    @property
    def redraws(self) -> str:
        """Where the task itself changes training images at random in each step: how to stop it. Else empty."""
        return ""

    def evaluate(self, batch: Any) -> None:
        """Add a batch to the metrics."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """The metrics since the last call, JSON-able, None where undefined; starts them anew.

        They are of all processes together: keep sums in torchmetrics, which add them up.
        """
        raise NotImplementedError

    @classmethod
    def pooled(cls, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``results()`` of several test splits as those of all of them together, for cross-validation.

        Here the mean of each plain number that every split defines; a task that keeps counts adds these up.
        """
        names = [n for n, v in results[0].items() if isinstance(v, (int, float))]
        defined = [n for n in names if all(isinstance(one[n], (int, float)) for one in results)]
        return {n: sum(one[n] for one in results) / len(results) for n in defined}

    def pictures(self, data: Any) -> Any:
        """What a report shows of ``data`` (``shared.report.plots.Pictures``); None where a task has nothing to show."""
        return None

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """Predict for files and write ``output``, a file or a folder.

        described: what the data it was trained on said of themselves.  identity: what tells this model from others.
        """
        raise RequestError(f"{type(self).__name__} does not predict for files")

    def load_adapter(self, path: Path) -> None:
        """Put an adapter file in the place of the model's adapters; some tasks read other libraries' too.

        Raises RequestError where it does not fit; see ``Adapted.load``.
        """
        self.model.load(path)

    def generate(self, wanted: Wanted, *, progress: Callable[[int, int], None]) -> Made:
        """Make what is wanted. progress: told the steps that are done, and how many there will be.

        Raises RequestError where something is wanted that this task does not make.
        """
        raise RequestError(f"{type(self).__name__} does not generate")

    # -- training --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        if isinstance(self.optimiser, SPSA):
            if self.trainer.world_size > 1:
                raise RequestError("optimiser SPSA trains in one process: give trainer.devices 1")
            if self.trainer.precision == "16-mixed":
                raise RequestError("trainer.precision '16-mixed' scales gradients, SPSA has none: use 'bf16-mixed'")
        elif self.model.bank and not getattr(self.model.backbone, "differentiable", True):
            raise RequestError(f"{self.model.backbone_name} gives no gradient to train by: use optimiser.type SPSA")
        optimiser, schedule = self.optimiser.build(self.model, self.total_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is not None:  # a checkpoint holds what was prepared
            return
        if self.model.unprepared() and isinstance(self.trainer.strategy, Sharded):
            raise RequestError("trainer.strategy fsdp divides the weights a method reads before training: use ddp")
        with torch.random.fork_rng(devices=[]):
            seed_all(self.seed, PREPARE)
            self.model.prepare(_Moved(self), self._plain_loss)

    def _plain_loss(self, batch: Any) -> Tensor:
        with self.trainer.strategy.precision_plugin.train_step_context():
            return self.loss(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.step(self.global_step, self.seed)
        seed_all(torch.initial_seed(), self.global_rank)  # from here on each process draws its own

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        def whole() -> Tensor:
            loss = self.model.loss(self, batch) * (1.0 if self.adds_up else self.weight)
            return loss + self.weight * self.model.penalty()

        loss = self._without_gradients(whole, batch_idx) if isinstance(self.optimiser, SPSA) else whole()
        told = batch if isinstance(batch, Mapping) else {}
        self._last, self._several = (loss.detach(), list(told.get("name", []))), "task" in told
        self.log("train/loss", self._last[0], prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _without_gradients(self, loss: Callable[[], Tensor], batch_idx: int) -> Tensor:
        """The loss of SPSA's evaluations; their estimate of the gradient waits for ``backward``."""
        assert isinstance(self.optimiser, SPSA)
        parameters = list(self.model.trainable().values())
        numbers = (self.seed, self.global_step, batch_idx % self.trainer.accumulate_grad_batches)
        generator = torch.Generator().manual_seed(hash(numbers) & 0xFFFF_FFFF_FFFF)
        draws = self.optimiser.draws(sum(p.numel() for p in parameters), generator)
        self._estimate, value = self.optimiser.estimate(loss, parameters, self.global_step, draws)
        return value

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagation, or what SPSA estimated in place of it (a loss that never moves is no gradient)."""
        if self._estimate is None:
            super().backward(loss, *args, **kwargs)
            return
        estimate, self._estimate = self._estimate, None
        if self.silent is not None or bool(estimate.any()):
            assign(estimate, list(self.model.trainable().values()), 1 / self.trainer.accumulate_grad_batches)

    def on_after_backward(self) -> None:
        """Stop before a bad loss moves a weight, and before a whole training in which some tensor never trains."""
        loss, names = self._last
        if not torch.isfinite(loss):
            where = f"step {self.global_step}" + (f" (samples {', '.join(names)})" if names else "")
            raise WorkError(
                f"the training loss is {loss.item()} at {where}; check these samples or lower the learning rate"
            )
        if (self.silent is None or self.silent) and not self.model.state.drawn:  # else some adapters rest
            self._prove(last=not self._several or self.trainer.is_last_batch)

    def _prove(self, last: bool) -> None:
        """Note which tensors a gradient reached; an error where it is not finite, or ``last`` and some are missing."""
        trained = self.model.trainable()
        silent = set(trained) if self.silent is None else self.silent
        reached = [n for n, p in trained.items() if n in silent and p.grad is not None]
        self.silent = silent.difference(reached)
        if last:
            self._check_silent(trained)
        # Scaled half-precision gradients may overflow at first; the scaler skips that step and lowers its scale.
        scaled = self.trainer.precision == "16-mixed"
        if not scaled and (bad := [n for n in reached if not _finite(trained[n].grad)]):
            raise WorkError(
                f"the gradient of {_first(bad)} is not finite ({len(bad)} of {len(trained)} trainable tensors)"
            )

    def _check_silent(self, trained: Mapping[str, nn.Parameter]) -> None:
        silent = [n for n in trained if n in (self.silent or ())]
        if any(n.startswith("backbone.") and n not in silent for n in trained):
            # One that trains whole may have parts which this task does not use, such as a norm of its summary.
            silent = [n for n in silent if not n.startswith("backbone.")]
        if silent:
            raise WorkError(f"no gradient reaches {_first(silent)} ({len(silent)} of {len(trained)} trainable tensors)")

    def on_train_end(self) -> None:
        """A training that ended within its first epoch is no excuse."""
        if self.silent:
            self._check_silent(self.model.trainable())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.silent is not None:
            checkpoint["silent"] = sorted(self.silent)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.silent = set(checkpoint["silent"]) if "silent" in checkpoint else None

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: Any) -> None:
        metrics = [] if self.counts else [m for m in self.modules() if isinstance(m, Metric)]
        kept = [copy.deepcopy(metric.metric_state) for metric in metrics]
        self.evaluate(batch)
        for metric, state in zip(metrics, kept, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        found = self.outcome[split] = self.results()
        processes = self.trainer.strategy
        if not processes.reduce_boolean_decision(repr(processes.broadcast(found)) == repr(found)):
            raise WorkError(f"{type(self).__name__}.results() differ between processes: keep sums in torchmetrics")
        self.log_dict({f"{split}/{n}": float(v) for n, v in found.items() if isinstance(v, (int, float))})

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: whole(tensor) for name, tensor in self.model.trained_state().items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        mine = self.model.trained_state()
        self.model.load_trained_state({n: like(t, mine.get(n)) for n, t in state_dict.items()}, "checkpoint")
        return _IncompatibleKeys([], [])


class _Moved:
    """The training batches, on the task's device."""

    def __init__(self, task: Task):
        self.task = task

    def __iter__(self) -> Iterator[Any]:
        feed: Any = self.task.trainer.datamodule  # type: ignore[attr-defined]
        return (self.task.trainer.strategy.batch_to_device(batch) for batch in feed.loaders["train"])

    def __len__(self) -> int:
        feed: Any = self.task.trainer.datamodule  # type: ignore[attr-defined]
        return len(feed.loaders["train"])


def _finite(gradient: Any) -> bool:
    """Whether all of a gradient is finite, or all of this process's part of it."""
    return bool(torch.isfinite(gradient.to_local() if isinstance(gradient, DTensor) else gradient).all())


def _first(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
