"""Semantic segmentation: a class for every pixel, measured by the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from modalities.remote_sensing.data.augment import reexposed
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.mapping import Feed, map_files
from shared.training import processes
from shared.training.optimiser import Optimiser
from shared.training.task import Task


class Segmentation(Task):
    """Trains and measures an adapted model whose head offers ``loss`` and ``predict``.

    model: with a head.  data: it gives ``classes`` (names), ``bands`` and ``ignore_index``; its batches hold ``image``
    (B, bands, H, W), ``mask`` (B, H, W) and ``name``.
    exposure: strength of random changes of gain and offset of training images and their bands
    (``data.augment.reexposed``), for test scenes whose light and ground are other than those trained on.

    Results of a split: ``loss`` (mean over samples) and those of ``measure``.
    """

    monitor: ClassVar[str] = "validation/miou"
    dates: ClassVar[int] = 1  # images of a sample, one after the other along its channels

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser, *, exposure: float = 0.0):
        super().__init__(model, optimiser)
        if exposure < 0:
            raise RequestError(f"task.exposure {exposure}: use 0 (no change) or a number above, such as 1")
        self.exposure = exposure
        self.classes, self.bands, self.ignore_index = tuple(data.classes), data.bands, data.ignore_index
        head: Any = model.head
        if not (hasattr(head, "loss") and hasattr(head, "predict")):
            raise RequestError("segmentation needs a head: LightDecoder, LinearDecoder or Mask2FormerHead")
        if getattr(head, "dates", 1) != self.dates:
            many = "two dates" if self.dates == 2 else "one image"
            raise RequestError(f"head {type(head).__name__}: {type(self).__name__} needs one that reads {many}")
        if head.ignore_index != self.ignore_index:
            raise RequestError(f"head.ignore_index {head.ignore_index}: the data use {self.ignore_index}")
        if head.classes != len(self.classes):
            raise RequestError(f"the head has {head.classes} classes, the data {len(self.classes)}")
        self.confusion = MulticlassConfusionMatrix(
            len(self.classes), ignore_index=self.ignore_index, validate_args=False
        )
        self.mean_loss = MeanMetric(nan_strategy="error")

    @property
    def head(self) -> Any:
        return self.model.head

    @property
    def channels(self) -> int:
        """Of an ``image``."""
        return self.dates * self.bands

    def forward(self, image: Tensor) -> Any:
        """What the model says of images (B, channels, H, W)."""
        return self.model(image)

    def outputs(self, batch: dict[str, Any]) -> Any:
        image = reexposed(batch["image"], self.exposure) if self.exposure else batch["image"]
        return self(image)

    def criterion(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        mask = batch["mask"]
        if not self.adds_up:
            return self.head.loss(outputs, mask)
        return self.head.loss(outputs, mask if self.weight else mask * 0 + self.ignore_index, processes.total)

    @property
    def adds_up(self) -> bool:
        return getattr(self.head, "adds_up", False)

    @property
    def redraws(self) -> str:
        return "set task.exposure to 0" if self.exposure else ""

    def evaluate(self, batch: dict[str, Any]) -> None:
        self.score(batch, self.confusion, self.mean_loss)

    def score(self, batch: dict[str, Any], confusion: MulticlassConfusionMatrix, mean_loss: MeanMetric) -> None:
        """Add a batch to these."""
        image, mask = batch["image"], batch["mask"]
        output = self(image)
        scores = self.head.predict(output, mask.shape[1:])
        if not torch.isfinite(scores).all():
            raise WorkError(f"the class scores are not finite on samples {', '.join(batch['name'])}")
        mean_loss.update(self.head.loss(output, mask), len(image))
        confusion.update(scores.argmax(1), mask)

    def results(self) -> dict[str, Any]:
        found = {"loss": self.mean_loss.compute().item(), **measure(self.confusion.compute(), self.classes)}
        self.mean_loss.reset()
        self.confusion.reset()
        return found

    @classmethod
    def pooled(cls, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """From the sum of the confusion matrices, so that every pixel counts once; ``loss`` is the splits' mean."""
        classes = [name.partition("/")[2] for name in results[0] if name.startswith("iou/")]
        total = torch.tensor([one["confusion"] for one in results]).sum(0)
        return {"loss": sum(one["loss"] for one in results) / len(results), **measure(total, classes)}

    @torch.no_grad()
    def scores(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W), normalised, to class scores (B, classes, H, W), in eval mode."""
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise RequestError(f"image of shape {tuple(image.shape)}: the model takes (B, {self.channels}, H, W)")
        training, size = self.training, (image.shape[2], image.shape[3])
        if not (training or self.model.training):  # a walk through all modules takes as long as a small window
            return self.head.predict(self(image), size)
        self.eval()
        try:
            return self.head.predict(self(image), size)
        finally:
            self.train(training)

    def predict(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W), normalised, to class indices (B, H, W)."""
        scores = self.scores(image)
        if not torch.isfinite(scores).all():
            raise WorkError("the class scores are not finite: the image holds NaN, or the weights do")
        return scores.argmax(1)

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """Map rasters of any size. options: those of ``shared.mapping.map_files``, such as ``kind`` and ``window``."""

        def scores(image: Tensor) -> Tensor:
            return self.scores(image.to(self.device))

        map_files(scores, Feed.of(described), inputs, output, identity=identity, **options)

    def pictures(self, data: Any, count: int = 4) -> Any:
        """``count`` samples spread over the test split: the image (in a row of its own where it has several band
        combinations), then truth, prediction and errors."""
        from shared.report.plots import RIGHT, WRONG, Pictures, class_colours, mistakes, paint

        samples: Any = data.test().dataset
        colours, rows, ignored = class_colours(self.classes), [], False
        for index in sorted({round(i * (len(samples) - 1) / max(count - 1, 1)) for i in range(count)}):
            sample = samples[index]
            truth, said = sample["mask"].numpy(), self.predict(sample["image"][None].to(self.device))[0].cpu().numpy()
            maps = [paint(mask, list(colours.values()), self.ignore_index) for mask in (truth, said)]
            errors = mistakes(truth, said, self.ignore_index)
            counts = truth != self.ignore_index
            ignored |= not counts.all()
            right = f"{(truth == said)[counts].mean():.1%} of its pixels are right" if counts.any() else "no labels"
            views, shown = data.displays(sample["image"]), {"truth": maps[0], "prediction": maps[1], "errors": errors}
            caption = f"{sample['name']}: {right}"
            rows += [(caption, views | shown)] if len(views) == 1 else [(sample["name"], views), (caption, shown)]
        unlabelled = {"ignored": "#000000"} if ignored else {}
        judged = {"right": RIGHT, "wrong": WRONG}
        return Pictures(rows, {"Classes": colours | unlabelled, "Errors": judged | unlabelled})

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Refuses, before it reaches the device, a batch that would train or measure wrongly."""
        image, mask, names = batch["image"], batch["mask"], ", ".join(batch["name"])
        if image.ndim != 4 or image.shape[1] != self.channels or mask.shape != image[:, 0].shape:
            shapes = f"images {tuple(image.shape)} and masks {tuple(mask.shape)}"
            raise RequestError(f"samples {names}: {shapes} do not fit {self.channels} bands and each other")
        if image.dtype != (wanted := self.model.dtype):
            raise RequestError(f"samples {names}: images are {image.dtype}, the model computes in {wanted}")
        if not torch.isfinite(image).all():
            raise RequestError(f"samples {names}: an image holds NaN or infinity")
        strange = mask[((mask < 0) | (mask >= len(self.classes))) & (mask != self.ignore_index)]
        if len(strange):
            values = f"0 to {len(self.classes) - 1} and {self.ignore_index} (ignored)"
            raise RequestError(f"samples {names}: mask value {strange[0].item()}; this data set has {values}")
        return batch


def measure(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What a confusion matrix says; counts (K, K), rows truth, columns prediction.

    ``oa``: overall accuracy.  ``iou/<class>``.  ``miou`` and ``f1``: means of IoU and F1 over the classes that
    occur in truth or prediction.  ``support/<class>``: pixels in truth.  ``confusion``: the counts as lists.
    None where a number is undefined: the IoU of a class that occurs in neither, the first three where nothing counts.
    """
    counts = confusion.double()
    hit, truth, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = truth + said > 0
    iou = (hit / (truth + said - hit))[occurs]
    f1 = (2 * hit / (truth + said))[occurs]
    each = dict.fromkeys(classes) | dict(
        zip([c for c, o in zip(classes, occurs, strict=True) if o], iou.tolist(), strict=True)
    )
    return {
        "miou": iou.mean().item() if len(iou) else None,
        "oa": (hit.sum() / counts.sum()).item() if len(iou) else None,
        "f1": f1.mean().item() if len(iou) else None,
        **{f"iou/{name}": value for name, value in each.items()},
        **{f"support/{name}": int(n) for name, n in zip(classes, truth, strict=True)},
        "confusion": confusion.long().tolist(),
    }
