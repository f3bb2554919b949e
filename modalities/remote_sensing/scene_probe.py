"""The linear probe on scenes: how well a logistic regression on frozen summaries tells a few classes apart.

    python -m modalities.remote_sensing.scene_probe FOLDER [--weights FILE] [--train 7] [--seeds 10] [--size 128]

FOLDER holds one folder of JPEG or PNG photographs for each class. For each seed, ``--train`` photographs of a class,
drawn at random, train the regression and the others test it; the table gives mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modalities.images.data import read_image
from modalities.remote_sensing.data.archive import resized
from shared.errors import RequestError, exit_status
from shared.logistic import logistic_regression


def read_scenes(folder: Path) -> tuple[list[Tensor], Tensor, list[str]]:
    """Photographs uint8 (3, H, W) of any size, their class indices (N,), and the names of the classes."""
    classes = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    files = [(i, file) for i, kind in enumerate(classes) for file in sorted(kind.iterdir()) if _is_photograph(file)]
    if len(classes) < 2 or {i for i, _ in files} != set(range(len(classes))):
        raise RequestError(f"{folder}: wants two or more folders, one for each class, with JPEG or PNG files in each")
    photographs = [torch.from_numpy(read_image(file)) for _, file in files]
    return photographs, torch.tensor([i for i, _ in files]), [path.name for path in classes]


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png")


@torch.no_grad()
def summaries(
    backbone: nn.Module, photographs: Sequence[Tensor], size: int, mean: Sequence[float], std: Sequence[float]
):
    """Frozen summaries (N, C) of photographs resized to ``size`` pixels. mean, std: of each band, in stored units."""
    shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    backbone.eval()
    rows = [backbone(resized(((p.float() - shift) / scale)[None], size)).summary for p in photographs]
    return torch.cat(rows)


def colour_features(photographs: Sequence[Tensor], bins: int = 8) -> Tensor:
    """The floor (N, 6 * (bins + 2)): a histogram, mean and deviation of each band and of its gradients."""
    return torch.stack([torch.cat([_described(band, bins) for band in _with_gradients(p)]) for p in photographs])


def _with_gradients(photograph: Tensor) -> list[Tensor]:
    bands = photograph.float() / 255
    down, across = bands.diff(dim=1)[:, :, 1:], bands.diff(dim=2)[:, 1:]
    return [*bands, *(4 * down.hypot(across)).clamp(max=1)]


def _described(values: Tensor, bins: int) -> Tensor:
    share = values.histc(bins, 0, 1) / values.numel()
    return torch.cat([share, values.mean()[None], values.std()[None]])


def probe(features: Tensor, labels: Tensor, *, train: int = 7, seeds: int = 10) -> Tensor:
    """Accuracies (seeds,) on the photographs that ``train`` of each class, drawn by the seed, leave over."""
    classes, found = int(labels.max()) + 1, []
    if (fewest := int(labels.bincount().min())) <= train or train < 1 or seeds < 1:
        raise RequestError(
            f"train {train} and seeds {seeds}: 1 to {fewest - 1} of {fewest} in the smallest class, and 1"
        )
    for seed in range(seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        drawn = torch.cat([order[labels[order] == c][:train] for c in range(classes)])
        rest = torch.ones(len(labels), dtype=torch.bool).scatter(0, drawn, False)
        predict = logistic_regression(features[drawn], labels[drawn], classes)
        found.append((predict(features[rest]) == labels[rest]).float().mean())
    return torch.stack(found)


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    from modalities.remote_sensing.backbones import MEAN, STD, AerialViT

    parser = argparse.ArgumentParser(prog="python -m modalities.remote_sensing.scene_probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, help="other weights of AerialViT than the packaged ones")
    parser.add_argument("--train", type=int, default=7, help="photographs of each class that train")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--size", type=int, default=128, help="pixels a side that the backbone sees")
    given = parser.parse_args(arguments)
    photographs, labels, classes = read_scenes(given.folder)
    ours = AerialViT(3, checkpoint=None if given.weights is None else str(given.weights))
    rows = {
        f"{ours.name}, {ours.source}": summaries(ours, photographs, given.size, MEAN, STD),
        "the same, random weights": summaries(AerialViT(3, weights="random"), photographs, given.size, MEAN, STD),
        "colour and gradient histograms": colour_features(photographs),
    }
    print(f"{len(labels)} photographs, {len(classes)} classes, {given.train} of each train, {given.seeds} seeds")
    for name, features in rows.items():
        found = probe(features, labels, train=given.train, seeds=given.seeds)
        print(f"{name:60s} {found.mean():.3f} +- {found.std():.3f}")


if __name__ == "__main__":
    sys.exit(main())
