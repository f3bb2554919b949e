"""What an adapter changes at sizes its base was not trained at: held-out denoising loss and a kernel distance.

    python -m modalities.diffusion.size_probe RUN [CONTROL] [--sizes 16,32,48,64] [--images 120] [--samples 96]
        [--steps 15]

RUN is a finished run of an adapter whose recipe's data can be read. At each square size, in pixels, for the frozen
and the adapted model: the denoising loss on the test images; and the kernel distance (Binkowski et al., 2018, KID)
between test images and samples, on the features of the package's AerialViT at 96 pixels, times 1000. The comparison is
paired: both models get the same images, noise and timesteps, both sample from the same noise, and both distances are
taken on the same subsets. "adapted - frozen" is the mean difference: of the loss with its standard error over images,
of the distance with its standard deviation over 100 random halves, which estimates its standard error (the jackknife
that leaves out half: Shao and Wu, 1989). Below zero the adapted model is better; a difference less than twice its error
cannot be told from none. The error is that of the test images and samples, not that of another training. The floor is
the distance to as many training images.

CONTROL is another finished run, of the same base and images, that takes the frozen model's place: say one trained as
long at the base's size alone, so that what is left to RUN is not owed to longer training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from modalities.diffusion.buckets import Size
from shared.errors import RequestError, exit_status
from shared.generating import Wanted

TOGETHER, HALVES, SIDE = 16, 100, 96
HEADS = ("size", "loss, frozen", "adapted", "adapted - frozen", "KID, frozen", "adapted", "adapted - frozen", "floor")
WIDTHS = (10, 14, 10, 22, 14, 14, 18, 0)


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


def distances(features: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """1000 times KID of two sets of images uint8 (N, 3, H, W), on random halves of both: (100,).

    Of the larger set as many count as the smaller has. The halves depend on the numbers of images alone, so that two
    results can be subtracted.
    """
    from torchmetrics.image.kid import poly_mmd

    count = min(len(real), len(made))
    if count < 4:
        raise RequestError(f"{len(real)} real and {len(made)} made images: at least 4 of each make a distance")
    generator = torch.Generator().manual_seed(0)
    sets = [features(images[:count]).double() for images in (real, made)]
    halves = ([s[torch.randperm(count, generator=generator)[: count // 2]] for s in sets] for _ in range(HALVES))
    return 1000 * torch.stack([poly_mmd(*pair) for pair in halves])


@torch.no_grad()
def losses(task: Any, batches: Sequence[dict[str, Any]]) -> Tensor:
    """The denoising loss of each image (N,), the mean at four timesteps spread over the schedule.

    Noise and timesteps depend on the sizes of the batches alone, so that two results can be subtracted.
    """
    generator, found = torch.Generator().manual_seed(0), []
    total = task.schedule.config.num_train_timesteps
    for batch in batches:
        x = task.encode(batch["image"].to(task.device))
        condition, errors = task.condition(batch, batch["caption"]), []
        for part in range(4):
            noise = torch.randn(x.shape, generator=generator).to(x)
            steps = ((part + (torch.arange(len(x), device=x.device) + 0.5) / len(x)) * total / 4).long()
            errors.append(task._errors(x, noise, steps, condition).cpu())
        found.append(torch.stack(errors).mean(0))
    return torch.cat(found)


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


def measure(
    task: Any, control: Any, data: Any, sides: Sequence[int], images: int, count: int, steps: int
) -> Iterator[list[str]]:
    """A row of text for each size; see the head of this file. Without samples (count 0), only the losses.

    control: a task, or None for the frozen model of ``task``.
    """

    def both(result: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Of the model compared with, and of the adapted one."""
        if control is not None:
            return result(control), result(task)
        with task.model.disabled():
            frozen = result(task)
        return frozen, result(task)

    features = Summaries() if count else None
    task.eval()
    for side in sides:
        test = batches(data, "test", side, images)
        before, adapted = both(lambda model, test=test: losses(model, test))
        change = adapted - before
        error = float(change.std()) / len(change) ** 0.5
        row = [
            f"{side} x {side}",
            f"{before.mean():.5f}",
            f"{adapted.mean():.5f}",
            f"{change.mean():+.5f} ± {error:.5f}",
        ]
        if features is not None:
            real = pixels(test)
            far, near = both(
                lambda model, side=side, real=real: distances(features, real, samples(model, side, count, steps))
            )
            floor = distances(features, real, pixels(batches(data, "train", side, len(real))))
            row += [f"{d.mean():{sign}.0f} ± {d.std():.0f}"
                    for d, sign in ((far, ""), (near, ""), (near - far, "+"), (floor, ""))]  # fmt: skip
        yield row


def _control(folder: Path, task: Any, data: Any) -> Any:
    """The task of a run to compare with. Raises RequestError where its base or test images are others."""
    from shared import recipe, run

    control = run.load(folder).task
    ours, theirs = task.unet.own_state(), control.unet.own_state()
    if ours.keys() != theirs.keys() or not all(torch.equal(value, theirs[name]) for name, value in ours.items()):
        raise RequestError(f"{folder}: another base than that of the run it is compared with")
    other = recipe.load(str(folder / run.RECIPE)).build("data")
    names = [[batch["name"] for batch in batches(d, "test", data.step, d.count("test"))] for d in (data, other)]
    if names[0] != names[1]:
        raise RequestError(f"{folder}: other test images than those of the run it is compared with")
    return control


def _line(cells: Iterable[str]) -> str:
    return "".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=False)).rstrip()


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    from shared import recipe, run

    parser = argparse.ArgumentParser(prog="python -m modalities.diffusion.size_probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("control", metavar="CONTROL", type=Path, nargs="?", help="compared with, not the frozen model")
    parser.add_argument("--sizes", default="16,32,48,64", help="sides in pixels, with commas between")
    parser.add_argument("--images", type=int, default=120, help="test images of a size, at most")
    parser.add_argument("--samples", type=int, default=96, help="of a size, from each model; 0 leaves the KID out")
    parser.add_argument("--steps", type=int, default=15, help="of the sampler")
    given = parser.parse_args(arguments)
    sides = [int(side) if side.isdigit() else 0 for side in given.sizes.split(",")]
    if given.images < 4 or (given.samples and given.samples < 4) or min(sides) < 1:
        raise RequestError("--images from 4, --samples 0 or from 4, --sizes such as 16,32")
    task = run.load(given.run).task
    data = recipe.load(str(given.run / run.RECIPE)).build("data")
    control = None if given.control is None else _control(given.control, task, data)
    heads = HEADS if control is None else [head.replace("frozen", "control") for head in HEADS]
    print(_line(heads[: 8 if given.samples else 4]))
    for row in measure(task, control, data, sides, given.images, given.samples, given.steps):
        print(_line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
