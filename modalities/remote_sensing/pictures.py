"""What a segmentation task shows of its data: image, truth and prediction side by side."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from shared.report.plots import Pictures, class_colours, paint

if TYPE_CHECKING:
    from modalities.remote_sensing.segmentation import Segmentation


def side_by_side(task: Segmentation, data: Any, count: int = 4, among: int = 64) -> Pictures:
    """The ``count`` test samples with most classes among the first ``among``, in the order of the test split.

    data: gives ``test()``, ``classes`` and ``ignore_index``, and ``display`` that makes an image visible.
    """
    colours = class_colours(data.classes)
    samples = list(islice((sample for batch in data.test() for sample in _single(batch)), among))
    ranked = sorted(range(len(samples)), key=lambda i: -len(samples[i]["mask"].unique()))
    rows = []
    for sample in (samples[i] for i in sorted(ranked[:count])):
        predicted = task.predict(sample["image"][None].to(task.device))[0].cpu()
        masks = {"truth": sample["mask"], "prediction": predicted}
        painted = {label: paint(m.numpy(), list(colours.values()), data.ignore_index) for label, m in masks.items()}
        rows.append((sample["name"], {"image": data.display(sample["image"]), **painted}))
    return Pictures(rows, colours)


def _single(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: values[i] for key, values in batch.items()} for i in range(len(batch["name"]))]
