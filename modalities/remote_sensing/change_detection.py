"""Change detection: for every pixel of two dates whether it changed, measured on the class of change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from modalities.remote_sensing.segmentation import Segmentation
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.training.optimiser import Optimiser


class ChangeDetection(Segmentation):
    """Trains and measures a model that reads two dates with one encoder, as ``Segmentation`` does one that reads one.

    model: with a head of ``heads.change``.  data: of pairs (``data.pairs.Pairs``): ``image`` (B, 2 * bands, H, W) holds
    the bands before and then those after, ``mask`` (B, H, W) 0 for unchanged, 1 for change.
    exposure: as in ``Segmentation``, drawn for either date.

    Results of a split: ``loss`` (mean over samples) and those of ``measure_change``.
    """

    monitor: ClassVar[str] = "validation/iou"
    dates: ClassVar[int] = 2

    def __init__(self, model: Adapted, data: Any, optimiser: Optimiser, *, exposure: float = 0.0):
        super().__init__(model, data, optimiser, exposure=exposure)
        if len(self.classes) != 2:
            raise RequestError(f"change detection has two classes, unchanged and change; the data {len(self.classes)}")

    def forward(self, image: Tensor) -> Any:
        """Both dates through the model, one after the other along the batch."""
        return self.model(torch.cat(image.chunk(2, 1)))

    def results(self) -> dict[str, Any]:
        found = {"loss": self.mean_loss.compute().item(), **measure_change(self.confusion.compute(), self.classes)}
        self.mean_loss.reset()
        self.confusion.reset()
        return found

    @classmethod
    def pooled(cls, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """From the sum of the confusion matrices, so that every pixel counts once; ``loss`` is the splits' mean."""
        classes = [name.partition("/")[2] for name in results[0] if name.startswith("support/")]
        total = torch.tensor([one["confusion"] for one in results]).sum(0)
        return {"loss": sum(one["loss"] for one in results) / len(results), **measure_change(total, classes)}

    def predict_files(
        self, inputs: Sequence[Path], output: Path, *, described: Mapping[str, Any], identity: Mapping[str, Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """Map what changed between two rasters, or between those of one name in two folders: before, after.

        options: those of ``shared.mapping.map_files``, such as ``kind``, ``window`` and ``reproject``.
        """
        if len(inputs) != 2 or inputs[0].is_dir() != inputs[1].is_dir():
            raise RequestError(f"{len(inputs)} inputs: give two files or two folders, before and after")
        super().predict_files(
            inputs[:1], output, described=described, identity=identity, after=inputs[1], **options
        )  # fmt: skip


def measure_change(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What counts (2, 2), rows truth, columns prediction, say of the second class, change.

    ``iou``, ``f1``, ``precision`` and ``recall`` of change.  ``oa``: overall accuracy.  ``support/<class>``: pixels in
    truth.  ``confusion``: the counts as lists. None where a number is undefined.
    """
    counts = confusion.double()
    hit, false, missed = counts[1, 1], counts[0, 1], counts[1, 0]

    def share(part: Tensor, whole: Tensor) -> float | None:
        return (part / whole).item() if whole > 0 else None

    return {
        "iou": share(hit, hit + false + missed),
        "f1": share(2 * hit, 2 * hit + false + missed),
        "precision": share(hit, hit + false),
        "recall": share(hit, hit + missed),
        "oa": share(counts.diagonal().sum(), counts.sum()),
        **{f"support/{name}": int(n) for name, n in zip(classes, counts.sum(1), strict=True)},
        "confusion": confusion.long().tolist(),
    }
