"""Language modelling: the next token of running text, by the model's own head."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import SumMetric

from modalities.language.backbones import TransformersText
from modalities.language.classification import check_fit
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class LanguageModelling(Task):
    """Trains and measures an adapted causal language model by the cross entropy of each next token.

    The scores come from the backbone's own head (``backbone.lm_head=true``), tied to its embedding where the model ties
    them, and frozen as the backbone is; a recipe names no head.

    data: it gives ``vocabulary``; its batches are those of ``Corpus`` or, scored in part, of ``Instructions``.

    Results of a split: ``loss`` (nats a token), ``perplexity`` (its exponential) and ``bits_per_byte`` (which does not
    depend on the tokenizer), over all tokens.
    """

    monitor: ClassVar[str] = "validation/loss"

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser):
        super().__init__(model, optimiser)
        check_fit(model, data)
        backbone: TransformersText = model.backbone  # type: ignore[assignment]
        if backbone.lm_head is None or not backbone.causal:
            what = "is no causal model" if not backbone.causal else "was built without its head: backbone.lm_head=true"
            raise RequestError(f"language modelling needs a causal backbone with its own head; {backbone.name} {what}")
        if model.head is not None:
            raise RequestError("language modelling uses the backbone's own head: the recipe names none")
        self.nats, self.count, self.bytes = (SumMetric(nan_strategy="error") for _ in range(3))
        for metric in (self.nats, self.count, self.bytes):
            metric.set_dtype(torch.float64)

    def outputs(self, batch: dict[str, Any]) -> Tensor:
        """Scores of every next token (B, N - 1, vocabulary)."""
        states = self.model(batch["tokens"], batch["mask"]).states
        return self.model.backbone.logits(states[:, :-1])  # type: ignore[union-attr,operator]

    def criterion(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean cross entropy over the scored tokens that follow another."""
        known = _scored(batch)
        return F.cross_entropy(outputs[known].float(), batch["tokens"][:, 1:][known])

    def evaluate(self, batch: dict[str, Any]) -> None:
        count = _scored(batch).sum()
        self.nats.update(self.criterion(self.outputs(batch), batch).double() * count)
        self.count.update(count)
        self.bytes.update(batch["bytes"].sum())

    def results(self) -> dict[str, Any]:
        nats, count, size = (metric.compute().item() for metric in (self.nats, self.count, self.bytes))
        for metric in (self.nats, self.count, self.bytes):
            metric.reset()
        loss = nats / count
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else None,
            "bits_per_byte": nats / math.log(2) / size if size else None,
        }


def _scored(batch: dict[str, Any]) -> Tensor:
    """Which of the tokens behind the first are to be predicted: bool (B, N - 1)."""
    return batch.get("scored", batch["mask"])[:, 1:]
