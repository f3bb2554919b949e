"""Classification: one class for each image, measured by the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training.optimiser import Optimiser
from shared.training.spsa import SPSA
from shared.training.task import Task


class Classification(Task):
    """Trains and measures an adapted model whose head offers ``loss`` and ``predict``.

    model: with a head.  data: it gives ``classes`` (names) and ``bands``; its batches hold ``image`` (B, bands, H, W),
    ``label`` (B,) and ``name``. Data that are normalised by the backbone's statistics are told them here.

    Results of a split: ``loss`` (mean over samples) and those of ``measure``.
    """

    monitor: ClassVar[str] = "validation/accuracy"

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser | SPSA):
        super().__init__(model, optimiser)
        self.classes, self.bands = tuple(data.classes), data.bands
        head: Any = model.head
        if not (hasattr(head, "loss") and hasattr(head, "predict")):
            raise RequestError("classification needs a head, such as LinearHead")
        if head.classes != len(self.classes):
            raise RequestError(f"the head has {head.classes} classes, the data {len(self.classes)}")
        if hasattr(data, "normalise_by"):
            data.normalise_by(model.backbone)
        self.confusion = MulticlassConfusionMatrix(len(self.classes), validate_args=False)
        self.mean_loss = MeanMetric(nan_strategy="error")

    @property
    def head(self) -> Any:
        return self.model.head

    def outputs(self, batch: dict[str, Any]) -> Any:
        return self.model(batch["image"])

    def criterion(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        return self.head.loss(outputs, batch["label"])

    def evaluate(self, batch: dict[str, Any]) -> None:
        output, label = self.outputs(batch), batch["label"]
        scores = self.head.predict(output)
        if not torch.isfinite(scores).all():
            raise WorkError(f"the class scores are not finite on samples {', '.join(batch['name'])}")
        self.mean_loss.update(self.head.loss(output, label), len(label))
        self.confusion.update(scores.argmax(1), label)

    def results(self) -> dict[str, Any]:
        found = {"loss": self.mean_loss.compute().item(), **measure(self.confusion.compute(), self.classes)}
        self.mean_loss.reset()
        self.confusion.reset()
        return found

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W), normalised, to class probabilities (B, classes), in eval mode."""
        if image.ndim != 4 or image.shape[1] != self.bands:
            raise RequestError(f"image of shape {tuple(image.shape)}: the model takes (B, {self.bands}, H, W)")
        training = self.training
        self.eval()
        try:
            scores = self.head.predict(self.outputs({"image": image.to(self.device)}))
        finally:
            self.train(training)
        if not torch.isfinite(scores).all():
            raise WorkError("the class scores are not finite: the image holds NaN, or the weights do")
        return scores

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        overwrite: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Classify images, and write a table of their labels and class probabilities (see ``labels.label_files``)."""
        from modalities.images.data import Preparation
        from modalities.images.labels import label_files

        if unfit := [name for name, value in options.items() if value is not None]:
            option = "as" if unfit[0] == "kind" else unfit[0]
            raise RequestError(f"predict: classification has no --{option}; it writes labels and probabilities")
        label_files(self.predict, self.classes, Preparation.of(described), inputs, output, overwrite=overwrite)

    def pictures(self, data: Any, count: int = 12) -> Any:
        """``count`` images spread over the test split with truth and prediction, errors in a frame of their own."""
        from shared.report.plots import COLOURS, Pictures

        samples: Any = data.test().dataset
        chosen = sorted({round(i * (len(samples) - 1) / max(count - 1, 1)) for i in range(count)})
        colours, shown = {"right": COLOURS[0], "wrong": COLOURS[5]}, []
        for index in chosen:
            sample = samples[index]
            said, truth = int(self.predict(sample["image"][None])[0].argmax()), int(sample["label"])
            told = self.classes[truth] if said == truth else f"{self.classes[truth]}, said to be {self.classes[said]}"
            picture = framed(data.display(sample["image"]), colours["right" if said == truth else "wrong"])
            shown.append((f"{sample['name']}: {told}", picture))
        rows = []
        for start in range(0, len(shown), 4):
            told = f"{start + 1} to {min(start + 4, len(shown))} of {len(shown)} out of {len(samples)} test images"
            rows.append((told, dict(shown[start : start + 4])))
        return Pictures(rows, {"Frame": colours})

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Refuses, before it reaches the device, a batch that would train or measure wrongly."""
        image, label, names = batch["image"], batch["label"], ", ".join(batch["name"])
        if image.ndim != 4 or image.shape[1] != self.bands or label.shape != image.shape[:1]:
            shapes = f"images {tuple(image.shape)} and labels {tuple(label.shape)}"
            raise RequestError(f"samples {names}: {shapes} do not fit {self.bands} bands and each other")
        if image.dtype != (wanted := self.model.dtype):
            raise RequestError(f"samples {names}: images are {image.dtype}, the model computes in {wanted}")
        if not torch.isfinite(image).all():
            raise RequestError(f"samples {names}: an image holds NaN or infinity")
        strange = label[(label < 0) | (label >= len(self.classes))]
        if len(strange):
            raise RequestError(
                f"samples {names}: label {strange[0].item()}; this data set has 0 to {len(self.classes) - 1}"
            )
        return batch


def measure(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What a confusion matrix says; counts (K, K), rows truth, columns prediction.

    ``accuracy``: share of the images that are right.  ``macro_f1``: mean of F1 over the classes that occur in truth or
    prediction.  ``recall/<class>`` and ``support/<class>``: share of its images that are found, and how many there are.
    ``confusion``: the counts as lists.  ``unit``: what is counted.
    None where a number is undefined: the recall of a class without images, the first two where nothing counts.
    """
    counts = confusion.double()
    hit, truth, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = truth + said > 0
    f1 = (2 * hit / (truth + said))[occurs]
    recall = [h / n if n else None for h, n in zip(hit.tolist(), truth.tolist(), strict=True)]
    return {
        "accuracy": (hit.sum() / counts.sum()).item() if len(f1) else None,
        "macro_f1": f1.mean().item() if len(f1) else None,
        **{f"recall/{name}": value for name, value in zip(classes, recall, strict=True)},
        **{f"support/{name}": int(n) for name, n in zip(classes, truth, strict=True)},
        "confusion": confusion.long().tolist(),
        "unit": "images",
    }


def framed(picture: np.ndarray, colour: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 in a frame of the colour "#rrggbb", a sixteenth of its side wide."""
    wide = max(picture.shape[0] // 16, 1)
    paint = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    whole = np.full((picture.shape[0] + 2 * wide, picture.shape[1] + 2 * wide, 3), paint)
    whole[wide:-wide, wide:-wide] = picture
    return whole
