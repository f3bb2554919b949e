"""What an adapter changes at sizes its base was not trained at: held-out denoising loss and a kernel distance.

    python -m modalities.diffusion.size_probe RUN [--sizes 16,32,48,64] [--samples 96] [--steps 15]

RUN is a finished run of an adapter whose recipe's data can be read. At each square size, in pixels: the loss on the
test images, mean and standard error over them; and the kernel distance (Binkowski et al., 2018, KID) between test
images and samples, on the features of the package's AerialViT at 96 pixels, times 1000, mean and standard deviation
over 30 subsets of half the samples. The last column is that of as many training images, the floor.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from modalities.diffusion.buckets import Size
from shared.errors import RequestError
from shared.generating import Wanted

TOGETHER, SUBSETS, SIDE = 16, 30, 96


class Summaries(nn.Module):
    """Images uint8 (N, 3, H, W) to AerialViT's summaries (N, C)."""

    num_features = 192

    def __init__(self) -> None:
        super().__init__()
        from shared import catalog

        self.backbone = catalog.find("AerialViT", "backbone").load()(3).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 127.5 - 1, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return torch.cat([self.backbone(part).summary for part in x.split(TOGETHER)])


def distance(features: nn.Module, real: Tensor, made: Tensor) -> tuple[float, float]:
    """1000 times KID of two sets of images uint8 (N, 3, H, W): mean and deviation over subsets."""
    from torchmetrics.image.kid import KernelInceptionDistance

    if min(len(real), len(made)) < 4:
        raise RequestError(f"{len(real)} real and {len(made)} made images: at least 4 of each make a distance")
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # that it keeps the features, which are few
        metric = KernelInceptionDistance(feature=features, subsets=SUBSETS, subset_size=min(len(real), len(made)) // 2)
    metric.update(real, real=True)
    metric.update(made, real=False)
    mean, spread = metric.compute()
    return 1000 * float(mean), 1000 * float(spread)


@torch.no_grad()
def losses(task: Any, batches: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard error, over images, of the denoising loss; noise and steps are the same in every call."""
    generator, errors = torch.Generator().manual_seed(0), []
    total = task.schedule.config.num_train_timesteps
    for batch in batches:
        x = task.encode(batch["image"].to(task.device))
        for part in range(4):
            noise = torch.randn(x.shape, generator=generator).to(x)
            steps = ((torch.arange(len(x), device=x.device) + (part + 0.5) / 4) * total / len(x)).long()
            errors.append(task._errors(x, noise, steps, task.condition(batch, batch["caption"])).cpu())
    found = torch.cat(errors)
    return float(found.mean()), float(found.std() / len(found) ** 0.5)


def batches(data: Any, split: str, side: int, most: int) -> list[dict[str, Any]]:
    """Images of a split at a square size, in batches."""
    images = [data.sample(split, (index, Size(side, side), None)) for index in range(min(most, data.count(split)))]
    return [default_collate(images[start : start + TOGETHER]) for start in range(0, len(images), TOGETHER)]


def pixels(loaded: Sequence[dict[str, Any]]) -> Tensor:
    """The images of batches, uint8 (N, 3, H, W)."""
    return ((torch.cat([batch["image"] for batch in loaded]) + 1) * 127.5).round().byte()


def samples(task: Any, side: int, count: int, steps: int) -> Tensor:
    """Images of the task, uint8 (N, 3, side, side)."""
    wanted = Wanted(size=(side, side), count=count, steps=steps)
    made = task.generate(wanted, progress=lambda done, total: None)
    return torch.cat([torch.from_numpy(group) for group in made.images]).permute(0, 3, 1, 2).contiguous()


def measure(task: Any, data: Any, sides: Sequence[int], count: int, steps: int) -> Iterator[list[str]]:
    """A row of text for each size: losses of the frozen and the adapted model, their distances, and the floor."""
    features = Summaries()
    for side in sides:
        test = batches(data, "test", side, count)
        real = pixels(test)
        found: list[tuple[tuple[float, float], tuple[float, float]]] = []
        for strip in (task.model.disabled, nullcontext):
            with strip():
                found.append((losses(task, test), distance(features, real, samples(task, side, count, steps))))
        floor = distance(features, real, pixels(batches(data, "train", side, count)))
        row = [*(_spread(loss, 4) for loss, _ in found), *(_spread(kid, 1) for _, kid in found), _spread(floor, 1)]
        yield [f"{side} x {side}", *row]


def _spread(found: tuple[float, float], digits: int) -> str:
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    from shared import recipe, run

    parser = argparse.ArgumentParser(prog="python -m modalities.diffusion.size_probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", type=Path)
    parser.add_argument("--sizes", default="16,32,48,64", help="sides in pixels, with commas between")
    parser.add_argument("--samples", type=int, default=96, help="images of a size, real and made")
    parser.add_argument("--steps", type=int, default=15, help="of the sampler")
    given = parser.parse_args(arguments)
    try:
        if given.samples < 4 or not all(side.isdigit() and int(side) for side in given.sizes.split(",")):
            raise RequestError("--samples from 4, --sizes such as 16,32")
        task = run.load(given.run).task
        data = recipe.load(str(given.run / run.RECIPE)).build("data")
        print(f"{'size':10}{'loss, frozen':20}{'adapted':20}{'KID, frozen':16}{'adapted':16}{'floor':16}")
        for row in measure(task, data, [int(side) for side in given.sizes.split(",")], given.samples, given.steps):
            print(
                "".join(f"{cell:{width}}" for cell, width in zip(row, (10, 20, 20, 16, 16, 16), strict=True)).rstrip()
            )
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
