"""Text classification: a class for every text, measured by the confusion matrix; prediction for files of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from modalities.language.backbones import TransformersText
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class TextClassification(Task):
    """Trains and measures an adapted language model with a head, such as ``TextHead``.

    data: it gives ``classes`` (names) and ``vocabulary``; its batches are those of ``Texts``.

    Results of a split: ``loss`` (mean over texts) and those of ``measure``.
    """

    monitor: ClassVar[str] = "validation/accuracy"

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser):
        super().__init__(model, optimiser)
        if isinstance(data.classes, Mapping):
            raise RequestError("data of several tasks need the task MultiTaskTextClassification")
        self.classes, head = tuple(data.classes), model.head
        if not (hasattr(head, "loss") and hasattr(head, "predict")):
            raise RequestError("text classification needs a head: TextHead")
        if head.classes != len(self.classes):  # type: ignore[union-attr]
            raise RequestError(f"the head has {head.classes} classes, the data {len(self.classes)}")  # type: ignore[union-attr]
        check_fit(model, data)
        self.confusion = MulticlassConfusionMatrix(len(self.classes), validate_args=False)
        self.mean_loss = MeanMetric(nan_strategy="error")

    @property
    def head(self) -> Any:
        return self.model.head

    def outputs(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, classes)."""
        return self.model(batch["tokens"], batch["mask"])

    def criterion(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        return self.head.loss(outputs, batch["label"])

    def evaluate(self, batch: dict[str, Any]) -> None:
        output = self.outputs(batch)
        scores = self.head.predict(output)
        if not torch.isfinite(scores).all():
            raise WorkError(f"the class scores are not finite on samples {', '.join(batch['name'])}")
        self.mean_loss.update(self.criterion(output, batch), len(scores))
        self.confusion.update(scores.argmax(1), batch["label"])

    def results(self) -> dict[str, Any]:
        found = {"loss": self.mean_loss.compute().item(), **measure(self.confusion.compute(), self.classes)}
        self.mean_loss.reset()
        self.confusion.reset()
        return found

    @torch.no_grad()
    def scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens int64 (B, N), mask bool (B, N) to class probabilities (B, classes), in eval mode."""
        training = self.training
        self.eval()
        try:
            return self.head.predict(self.model(tokens, mask))
        finally:
            self.train(training)

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """Classify the texts of files. options: ``overwrite``; ``kind`` may be "probabilities"."""
        from modalities.language.predicting import classify_files

        def scores(batch: dict[str, Tensor]) -> Tensor:
            return self.scores(batch["tokens"].to(self.device), batch["mask"].to(self.device)).cpu()

        classify_files(scores, self.classes, described["reading"], inputs, output, **options)


def check_fit(model: Adapted, data: Any) -> None:
    """Raises RequestError where the model is none of language, or the data's tokens or texts are too many for it."""
    backbone = model.backbone
    if not isinstance(backbone, TransformersText):
        raise RequestError("a language task needs a language backbone: TransformersText or SmallLM")
    known = getattr(data, "vocabulary", None)
    if known is not None and known > backbone.vocabulary:
        raise RequestError(
            f"data.tokenizer has {known} tokens, {backbone.name} knows {backbone.vocabulary}: use the tokenizer that "
            "belongs to the backbone"
        )
    if backbone.longest is not None and getattr(data, "max_length", 0) > backbone.longest:
        raise RequestError(
            f"the data give texts of up to {data.max_length} tokens, {backbone.name} takes {backbone.longest}: lower "
            "data.max_length or data.length"
        )


def measure(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What a confusion matrix says; counts (K, K), rows truth, columns prediction.

    ``accuracy``.  ``macro_f1``: mean of F1 over the classes that occur in truth or prediction.
    ``balanced_accuracy``: mean of recall over the classes that occur in truth.  ``f1/<class>`` and ``recall/<class>``,
    None where undefined.  ``support/<class>``: texts in truth.  ``confusion``: the counts as lists.
    ``unit``: what is counted.
    """
    counts = confusion.double()
    hit, truth, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = [
        2 * h / (t + s) if t + s else None for h, t, s in zip(hit.tolist(), truth.tolist(), said.tolist(), strict=True)
    ]
    recall = [h / t if t else None for h, t in zip(hit.tolist(), truth.tolist(), strict=True)]
    return {
        "accuracy": (hit.sum() / counts.sum()).item() if counts.sum() else None,
        "macro_f1": _mean(f1),
        "balanced_accuracy": _mean(recall),
        **{f"f1/{name}": value for name, value in zip(classes, f1, strict=True)},
        **{f"recall/{name}": value for name, value in zip(classes, recall, strict=True)},
        **{f"support/{name}": int(n) for name, n in zip(classes, truth, strict=True)},
        "confusion": confusion.long().tolist(),
        "unit": "texts",
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
