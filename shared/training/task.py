"""The task: what one training and one evaluation step are, as Lightning runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser


class Task(LightningModule):
    """Base of every modality's tasks. Subclasses give ``loss``, ``evaluate`` and ``results``.

    Its state dict is ``model.trained_state()``: a checkpoint never holds frozen weights, and loading is strict.

    Those whose ``loss`` is one of the model's outputs give these two instead of it, ``outputs`` and ``criterion``: so
    methods can train that need several passes.

    monitor: the metric that picks the best checkpoint ("<split>/<name of results()>"); an engine may name another.
    seed: of the run.
    outcome: the results of the last evaluation of each split.
    """

    monitor: ClassVar[str] = "validation/loss"

    def __init__(self, model: Adapted, optimiser: Optimiser):
        super().__init__()
        self.model, self.optimiser = model, optimiser
        self.total_steps, self.seed = 1, 0
        self.outcome: dict[str, dict[str, Any]] = {}
        self._proved = False

    def loss(self, batch: Any) -> Tensor:
        """The scalar training loss of a batch, without the methods' extra losses."""
        return self.criterion(self.outputs(batch), batch)

    def outputs(self, batch: Any) -> Any:
        """What the model says of a batch, such as logits (B, classes)."""
        raise RequestError(f"{type(self).__name__} gives a loss but no outputs, which this method trains on")

    def criterion(self, outputs: Any, batch: Any) -> Tensor:
        """The scalar training loss of such outputs."""
        raise NotImplementedError

    def evaluate(self, batch: Any) -> None:
        """Add a batch to the metrics."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """The metrics since the last call, JSON-able, None where undefined; starts them anew."""
        raise NotImplementedError

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

    # -- training --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimiser, schedule = self.optimiser.build(self.model, self.total_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # a checkpoint holds what was prepared
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.model.prepare(_Moved(self), self._plain_loss)

    def _plain_loss(self, batch: Any) -> Tensor:
        with self.trainer.strategy.precision_plugin.train_step_context():
            return self.loss(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.step(self.global_step, self.seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model.loss(self, batch) + self.model.penalty()
        self._last = loss.detach(), list(batch["name"]) if isinstance(batch, Mapping) and "name" in batch else []
        self.log("train/loss", self._last[0], prog_bar=True)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_after_backward(self) -> None:
        """Stop before a bad loss moves a weight, and before a whole training in which some tensor never trains."""
        loss, names = self._last
        if not torch.isfinite(loss):
            where = f"step {self.global_step}" + (f" (samples {', '.join(names)})" if names else "")
            raise WorkError(
                f"the training loss is {loss.item()} at {where}; check these samples or lower the learning rate"
            )
        if not self._proved:
            self._prove()

    def _prove(self) -> None:
        self._proved = True
        trained = self.model.trainable()
        if silent := [n for n, p in trained.items() if p.grad is None]:
            raise WorkError(f"no gradient reaches {_first(silent)} ({len(silent)} of {len(trained)} trainable tensors)")
        # Scaled half-precision gradients may overflow at first; the scaler skips that step and lowers its scale.
        scaled = self.trainer.precision == "16-mixed"
        if not scaled and (bad := [n for n, p in trained.items() if not torch.isfinite(p.grad).all()]):  # type: ignore[arg-type]
            raise WorkError(
                f"the gradient of {_first(bad)} is not finite ({len(bad)} of {len(trained)} trainable tensors)"
            )

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        self.outcome[split] = self.results()
        scalars = {f"{split}/{n}": float(v) for n, v in self.outcome[split].items() if isinstance(v, (int, float))}
        self.log_dict(scalars, sync_dist=self.trainer.world_size > 1)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.model.trained_state()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        self.model.load_trained_state(state_dict, "checkpoint")
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


def _first(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
