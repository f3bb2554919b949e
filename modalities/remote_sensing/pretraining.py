"""Pretraining: a backbone learns from a few patches of each image what the others look like, and what is shown."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from shared.adapted import Adapted
from shared.backbone import TokenBackbone
from shared.errors import RequestError
from shared.training.optimiser import Optimiser
from shared.training.task import Task

Grid = tuple[int, int]


class Pretraining(Task):
    """Masked images (He et al., 2022) and, where wanted, class labels, on the same few tokens.

    Only the tokens of ``keep`` of the patches run through the backbone, which makes a step cheap; its summary is
    classified, and the head rebuilds pixels of others.

    keep: share of the patches that is seen in training.  rebuild: share that the head rebuilds, of the others.
    label_weight: of the classification loss, 0 to pretrain without labels.  pixel_weight: of the reconstruction loss.

    Results of a split: ``loss`` (weighted sum), ``pixel_error`` (unseen patches, masks drawn from a fixed seed) and
    ``accuracy`` (of whole images, nothing dropped; chance where the labels have no weight).
    """

    monitor: ClassVar[str] = "validation/loss"

    def __init__(
        self, model: Adapted, data: Any, optimiser: Optimiser, *, keep: float = 0.25, rebuild: float = 0.25,
        label_weight: float = 1.0, pixel_weight: float = 1.0,
    ):  # fmt: skip
        super().__init__(model, optimiser)
        if min(keep, rebuild) <= 0 or keep + rebuild > 1:
            raise RequestError(f"task: keep {keep} and rebuild {rebuild} are above 0 and together at most 1")
        if min(label_weight, pixel_weight) < 0 or label_weight + pixel_weight == 0:
            raise RequestError(
                f"task: label_weight {label_weight}, pixel_weight {pixel_weight}: one above 0, none below"
            )
        backbone, head = model.backbone, model.head
        if not isinstance(backbone, TokenBackbone) or not hasattr(head, "reconstruct"):
            raise RequestError("pretraining needs a token backbone, such as TimmViT, and the head PretrainingHead")
        head.use(labels=label_weight > 0, pixels=pixel_weight > 0)  # type: ignore[union-attr]
        self.keep, self.rebuild = keep, rebuild
        self.label_weight, self.pixel_weight = label_weight, pixel_weight
        self.accuracy = MulticlassAccuracy(len(data.classes), average="micro")
        self.losses, self.errors = MeanMetric(nan_strategy="error"), MeanMetric(nan_strategy="error")

    def loss(self, batch: dict[str, Any]) -> Tensor:
        image, head = batch["image"], self._head
        encoded, seen, hidden, grid = self._encode(image)
        total = image.new_zeros(())
        if self.label_weight:
            logits = head.classify(self._backbone.summarise(encoded))
            total = total + self.label_weight * head.loss(logits, batch["label"])
        if self.pixel_weight:
            total = total + self.pixel_weight * self._pixel_error(image, encoded, seen, hidden, grid)
        return total

    def evaluate(self, batch: dict[str, Any]) -> None:
        image, label = batch["image"], batch["label"]
        logits = self.model(image)
        error = self._pixel_error(image, *self._encode(image, torch.Generator().manual_seed(0)))
        self.accuracy.update(logits, label)
        self.errors.update(error, len(image))
        total = self.label_weight * self._head.loss(logits, label) + self.pixel_weight * error
        self.losses.update(total, len(image))

    def results(self) -> dict[str, Any]:
        metrics = {"loss": self.losses, "pixel_error": self.errors, "accuracy": self.accuracy}
        found = {name: metric.compute().item() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return found

    @property
    def _backbone(self) -> TokenBackbone:
        return self.model.backbone  # type: ignore[return-value]

    @property
    def _head(self) -> Any:
        return self.model.head

    def _encode(self, image: Tensor, random: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Grid]:
        """The last block's tokens (B, prefix + n, C) of some patches alone, these patches (B, n), those to rebuild
        (B, m), and the grid."""
        backbone, prefix = self._backbone, self._backbone.prefix
        tokens, grid, extras = backbone.embed(image)
        if extras:
            raise RequestError(
                f"pretraining drops tokens; {backbone.name} with its {', '.join(extras)} does not allow it"
            )
        count = grid[0] * grid[1]
        shown, hidden = max(1, round(self.keep * count)), max(1, round(self.rebuild * count))
        order = torch.rand(len(image), count, generator=random).argsort(1).to(image.device)
        seen, hidden = order[:, :shown], order[:, shown : shown + hidden]
        chosen = tokens[:, prefix:].gather(1, seen[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :prefix], chosen], 1)
        for block in backbone.blocks:
            tokens = block(tokens)
        return tokens, seen, hidden, grid

    def _pixel_error(self, image: Tensor, encoded: Tensor, seen: Tensor, hidden: Tensor, grid: Grid) -> Tensor:
        tokens = self._backbone.final(encoded)[:, self._backbone.prefix :]
        return self._head.reconstruction_loss(self._head.reconstruct(tokens, seen, hidden, grid), image, hidden)
