"""Classification of texts in several tasks: batches of one task each, a head and scores for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from modalities.language.classification import check_fit, measure
from modalities.language.heads import TextHeads
from shared import catalog
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser
from shared.training.task import Task

SCORES = ("accuracy", "macro_f1", "balanced_accuracy")


class MultiTaskTextClassification(Task):
    """Trains and measures an adapted language model with ``TextHeads`` on ``SeveralTasks``; each call names its task.

    Results of a split: ``loss`` (mean over texts); ``accuracy``, ``macro_f1`` and ``balanced_accuracy``, each the mean
    over tasks; ``<score>/<task>``, ``support/<task>`` (texts), and ``confusions`` by task, counts as in ``measure``.
    """

    monitor: ClassVar[str] = "validation/accuracy"

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser):
        super().__init__(model, optimiser)
        if not isinstance(data.classes, Mapping):
            raise RequestError("classification in several tasks needs data of several: SeveralTasks")
        self.classes = {task: tuple(names) for task, names in data.classes.items()}
        if not isinstance(model.head, TextHeads):
            raise RequestError("classification in several tasks needs a head for each: TextHeads")
        if model.head.classes != {task: len(names) for task, names in self.classes.items()}:
            raise RequestError(f"the heads have classes {model.head.classes}, which are not those of the data")
        check_fit(model, data)
        self._check_tasks()
        sizes = [len(names) for names in self.classes.values()]
        self.starts = dict(zip(self.classes, (sum(sizes[:i]) for i in range(len(sizes))), strict=True))
        # The classes of all tasks behind each other: a process that saw no batch of some task has counts of it too.
        self.confusion = MulticlassConfusionMatrix(sum(sizes), validate_args=False)
        self.mean_loss = MeanMetric(nan_strategy="error")

    def _check_tasks(self) -> None:
        for name in self.model.active:
            method = self.model.methods[name]
            known = (*getattr(method, "tasks", ()), *getattr(method, "further", ()))
            if known and set(known) != set(self.classes):
                what = f"{type(method).__name__} has tasks {', '.join(known)}"
                raise RequestError(f"method.tasks: {what}, the data {', '.join(self.classes)}: name the same")

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.classes)

    def outputs(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, classes of the batch's task)."""
        return self.model(batch["tokens"], batch["mask"], context={"task": batch["task"]})

    def criterion(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        return self._head.loss(outputs, batch["label"])

    @property
    def _head(self) -> Any:
        return self.model.head

    def evaluate(self, batch: dict[str, Any]) -> None:
        output, start = self.outputs(batch), self.starts[batch["task"]]
        scores = self._head.predict(output)
        if not torch.isfinite(scores).all():
            where = f"{batch['task']}, samples {', '.join(batch['name'])}"
            raise WorkError(f"the class scores are not finite on {where}")
        self.mean_loss.update(self.criterion(output, batch), len(scores))
        self.confusion.update(scores.argmax(1) + start, batch["label"] + start)

    def results(self) -> dict[str, Any]:
        loss, counts = self.mean_loss.compute().item(), self.confusion.compute()
        self.mean_loss.reset()
        self.confusion.reset()
        own = {task: slice(start, start + len(self.classes[task])) for task, start in self.starts.items()}
        found = {task: measure(counts[part, part], self.classes[task]) for task, part in own.items()}
        return {
            "loss": loss,
            **{name: _mean([each[name] for each in found.values()]) for name in SCORES},
            **{f"{name}/{task}": each[name] for name in SCORES for task, each in found.items()},
            **{f"support/{task}": sum(map(sum, each["confusion"])) for task, each in found.items()},
            "confusions": {task: each["confusion"] for task, each in found.items()},
            "unit": "texts",
            "by": "task",
        }

    @torch.no_grad()
    def scores(self, tokens: Tensor, mask: Tensor, task: str) -> Tensor:
        """tokens int64 (B, N), mask bool (B, N) to the task's class probabilities (B, classes), in eval mode."""
        training = self.training
        self.eval()
        try:
            return self._head.predict(self.model(tokens, mask, context={"task": task}))
        finally:
            self.train(training)

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        task: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Classify the texts of files as ``task`` does. options: those of ``TextClassification``.

        Raises RequestError where no task of the run is named.
        """
        from modalities.language.predicting import classify_files

        if task is None:
            raise RequestError(f"this run has several tasks: name one with --task, of {', '.join(self.classes)}")
        if task not in self.classes:
            have = f"{catalog.nearest(task, self.classes)} (it has: {', '.join(self.classes)})"
            raise RequestError(f"--task {task}: the run has no such task{have}")

        def scores(batch: dict[str, Tensor]) -> Tensor:
            return self.scores(batch["tokens"].to(self.device), batch["mask"].to(self.device), task).cpu()

        classify_files(scores, self.classes[task], described["reading"][task], inputs, output, **options)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    return None if any(value is None for value in values) else sum(values) / len(values)  # type: ignore[arg-type]
