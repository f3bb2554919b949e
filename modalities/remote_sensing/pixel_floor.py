"""The floor of Landsat-8 Biome: logistic regression on single pixels, each scene tested by what the others taught.

    python -m modalities.remote_sensing.pixel_floor DIR [--folds 11] [--pixels 2000] [--seeds 3]

DIR is that of ``LandsatBiome``. A seed draws ``--pixels`` of each training tile; the confusion matrices of all folds
are added up, as ``omniadapt compare --folds`` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from modalities.remote_sensing.data import LandsatBiome
from modalities.remote_sensing.scene_probe import logistic_regression
from modalities.remote_sensing.segmentation import measure
from shared.errors import RequestError


def confusion(folds: Iterable[LandsatBiome], pixels: int, seed: int, decay: float = 1e-3) -> Tensor:
    """Counts (K, K), rows truth, columns prediction, over the test scenes of all folds.

    folds: data without augmentation.  pixels: drawn by ``seed`` from each training tile.  decay: of the regression.
    """
    total = torch.zeros(1)
    for data in folds:
        random, classes = torch.Generator().manual_seed(seed), len(data.classes)
        drawn = [_draw(batch, pixels, random) for batch in data.train()]
        features, labels = torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn])
        predict = logistic_regression(features, labels, classes, decay)
        for batch in data.test():
            features, labels = _pixels(batch)
            pairs = labels * classes + predict(features)
            total = total + torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    return total


def _pixels(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Bands (N, C) and labels (N,) of all labelled pixels of a batch."""
    labels = batch["mask"].flatten()
    labelled = labels != LandsatBiome.ignore_index
    return batch["image"].movedim(1, -1).flatten(0, 2)[labelled], labels[labelled]


def _draw(batch: dict[str, Any], count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    features, labels = _pixels(batch)
    chosen = torch.randperm(len(labels), generator=random)[: count * len(batch["name"])]
    return features[chosen], labels[chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modalities.remote_sensing.pixel_floor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("root")
    parser.add_argument("--folds", type=int, default=11)
    parser.add_argument("--pixels", type=int, default=2000, help="of each training tile")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    try:
        if min(given.pixels, given.seeds) < 1:
            raise RequestError(f"pixels {given.pixels} and seeds {given.seeds}: both are at least 1")
        folds = [LandsatBiome(root=given.root, fold=k, folds=given.folds, augment=False) for k in range(given.folds)]
        found = [measure(confusion(folds, given.pixels, seed), folds[0].classes) for seed in range(given.seeds)]
        for name in ("miou", "oa", *(f"iou/{c}" for c in folds[0].classes)):
            values = torch.tensor([one[name] for one in found])
            print(f"{name:20s} {values.mean():.3f} +- {values.std(correction=int(len(values) > 1)):.3f}")
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
