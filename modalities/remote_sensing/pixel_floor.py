"""The floor of a recipe that labels pixels: logistic regression on single pixels of its training images.

    python -m modalities.remote_sensing.pixel_floor RECIPE [key=value ...] [--folds 11] [--balanced] [--seeds 3]

A pixel is told by its bands; of two dates, by those of both and how far they lie apart. A seed draws ``--pixels`` of
each training image (or tile); ``--balanced`` as many of each class, without which a rare class is seldom answered.
With ``--folds`` the confusion matrices of all folds are added up, as ``omniadapt compare --folds`` does. The last rows
are the IoU of answering one class everywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.remote_sensing.segmentation import measure
from shared import recipe
from shared.errors import RequestError, exit_status
from shared.logistic import logistic_regression


def confusion(folds: Iterable[Any], pixels: int, seed: int, decay: float = 1e-3, balanced: bool = False) -> Tensor:
    """Counts (K, K), rows truth, columns prediction, over the test images of all folds.

    folds: data.  pixels: drawn by ``seed`` from each training image.  decay: of the regression.  balanced: draw as many
    of each class that a batch holds.
    """
    total = torch.zeros(1)
    for data in folds:
        random, classes = torch.Generator().manual_seed(seed), len(data.classes)
        drawn = [_draw(_pixels(batch, data), pixels * len(batch["name"]), random, balanced) for batch in data.train()]
        features, labels = torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn])
        predict = logistic_regression(features, labels, classes, decay)
        for batch in data.test():
            features, labels = _pixels(batch, data)
            pairs = labels * classes + predict(features)
            total = total + torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    return total


def _pixels(batch: dict[str, Any], data: Any) -> tuple[Tensor, Tensor]:
    """What is told of all labelled pixels of a batch (N, C), and their labels (N,)."""
    image, mask = batch["image"], batch["mask"]
    if image.shape[1] == 2 * data.bands:
        before, after = image.chunk(2, 1)
        image = torch.cat([image, (after - before).abs()], 1)
    if image.shape[2:] != mask.shape[1:]:  # masks that keep their own size
        image = F.interpolate(image, mask.shape[1:], mode="bilinear")
    labels = mask.flatten()
    labelled = labels != data.ignore_index
    return image.movedim(1, -1).flatten(0, 2)[labelled], labels[labelled]


def _draw(known: tuple[Tensor, Tensor], count: int, random: torch.Generator, balanced: bool) -> tuple[Tensor, Tensor]:
    features, labels = known
    order = torch.randperm(len(labels), generator=random)
    if balanced:
        each = [order[labels[order] == c] for c in labels.unique().tolist()]
        order = torch.cat([one[: min([count // len(each), *map(len, each)])] for one in each])
    chosen = order[:count]
    return features[chosen], labels[chosen]


def _folds(asked: argparse.Namespace) -> list[Any]:
    """The recipe's data of each fold, their training images as they are."""
    chosen, found = recipe.load(asked.recipe, asked.overrides), []
    for fold in range(asked.folds or 1):
        one = chosen.replaced(data={"fold": fold, "folds": asked.folds}) if asked.folds else chosen
        found.append(data := one.build("data"))
        if hasattr(data, "augment"):
            data.augment = False
    return found


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modalities.remote_sensing.pixel_floor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", help="a recipe file, or a name that 'omniadapt list recipes' shows")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--folds", type=int)
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--pixels", type=int, default=2000, help="of each training image")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    if min(given.pixels, given.seeds) < 1:
        raise RequestError(f"pixels {given.pixels} and seeds {given.seeds}: both are at least 1")
    folds = _folds(given)
    classes = folds[0].classes
    counts = [confusion(folds, given.pixels, seed, balanced=given.balanced) for seed in range(given.seeds)]
    found = [measure(one, classes) for one in counts]
    for name in ("miou", "oa", *(f"iou/{c}" for c in classes)):
        values = torch.tensor([one[name] for one in found])
        print(f"{name:20s} {values.mean():.3f} +- {values.std(correction=int(len(values) > 1)):.3f}")
    shares = counts[0].sum(1) / counts[0].sum()
    for name, share in zip(classes, shares.tolist(), strict=True):
        print(f"{f'all {name}':20s} {share:.3f}")


if __name__ == "__main__":
    sys.exit(main())
