"""Whether training makes sampled views of one object agree: adapted models against their frozen base, pair by pair.

    python -m modalities.diffusion.multi_view.probe RUN [RUN ...] [--objects 32] [--steps 20] [--sheet FILE.png]

RUN: finished runs of recipes whose data know their geometry and give no reference; all use one base. For each test
object all models make its views from the same noise. Means and standard errors over objects, of: ``disagreement``
(see ``multi_view.agreement``); its difference to the base and to the last run named, of the same object; ``contrast``,
how far the object's colours are from grey; and ``relative``, disagreement over contrast, with its difference to the
last run: views that have only gone pale disagree less, but not relatively. The sheet shows views of the first objects,
a row each of the true ones, the base and the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.geometry.cameras import Cameras
from modalities.diffusion.multi_view import sampling
from modalities.diffusion.multi_view.agreement import disagreement
from modalities.diffusion.sampling import to_bytes
from shared.errors import RequestError, exit_status
from shared.store import write_atomically

HEADER = ("", "disagreement", "less base", "less last", "contrast", "relative", "less last")
WIDTHS = (24, *[18] * 6)


def measured(images: Tensor, sample: dict[str, Any]) -> tuple[float, float]:
    """Disagreement of the views of an object and their contrast. images: (V, 3, H, W) in 0 to 1."""
    around = Cameras(sample["c2w"], sample["projection"], ("",) * len(images))
    tolerance = 2 * float(around.extent[0, 0]) / images.shape[-1]
    total, count = disagreement(images, around, sample["positions"], sample["alpha"], tolerance)
    if not count:
        raise RequestError(f"{sample['name']}: no point that two views see: the data must know positions")
    return float(total / count), float((images - 0.5).abs().mean(1)[sample["alpha"] > 0.5].mean())


def made(task: Any, sample: dict[str, Any], seed: int, steps: int) -> Tensor:
    """The views that a model makes of an object's maps, (V, 3, H, W) in 0 to 1."""
    count, _, height, width = sample["image"].shape
    settings = {"views": count, "height": height, "width": width, "steps": steps, "seed": seed, "guidance": 1.0}
    control = sample["control"].to(task.device) if task.conditioned else None
    found = sampling.in_pixels(task, settings, control, None, lambda step: None)
    return torch.from_numpy(found).permute(0, 3, 1, 2) / 255


def views_of(tasks: dict[str, Any], sample: dict[str, Any], seed: int, steps: int) -> dict[str, Tensor]:
    """The views (V, 3, H, W) of an object: the true ones, those of the base, and of each task by its name."""
    found = {"true views": (sample["image"] + 1) / 2}
    for name, task in (("base", next(iter(tasks.values()))), *tasks.items()):
        with task.model.disabled() if name == "base" else nullcontext():
            found[name] = made(task, sample, seed, steps)
    return found


def measure(samples: Sequence[dict[str, Any]], views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(objects, 2) of disagreement and contrast by name, of each sample's ``views_of``."""
    pairs = list(zip(samples, views, strict=True))
    return {name: torch.tensor([measured(images[name], sample) for sample, images in pairs]) for name in views[0]}


def sheet(views: Sequence[dict[str, Tensor]], columns: int = 3, zoom: int = 4) -> Tensor:
    """One image (3, H, W) in 0 to 1 of what ``views_of`` gives of some objects, white between them."""
    blocks = [torch.cat([torch.cat(list(images), -1) for images in each.values()], -2) for each in views]
    blocks = [F.pad(block, (1, 1, 1, 1), value=1.0) for block in blocks]
    blocks += [torch.ones_like(blocks[0])] * (-len(blocks) % columns)
    lines = [torch.cat(blocks[i : i + columns], -1) for i in range(0, len(blocks), columns)]
    return torch.cat(lines, -2).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)


def table(found: dict[str, Tensor]) -> list[list[str]]:
    """Rows of text, of the columns of ``HEADER``."""
    last, rows = list(found)[-1], []
    relative = {name: values[:, 0] / values[:, 1] for name, values in found.items()}
    for name, values in found.items():
        less = [_spread(values[:, 0] - found[other][:, 0]) if name != other else "" for other in ("base", last)]
        less_relative = _spread(relative[name] - relative[last]) if name != last else ""
        rows.append([name, _spread(values[:, 0]), *less, _spread(values[:, 1]), _spread(relative[name]), less_relative])
    return rows


def _spread(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    from shared import recipe, run

    parser = argparse.ArgumentParser(prog="python -m modalities.diffusion.multi_view.probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--objects", type=int, default=32, help="of the split")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--sheet", type=Path, help="a PNG file to write, of the first 6 objects")
    given = parser.parse_args(arguments)
    if given.objects < 2 or given.steps < 1:
        raise RequestError("--objects from 2, --steps from 1")
    tasks = {str(folder): run.load(folder).task.eval() for folder in given.runs}
    data = recipe.load(str(given.runs[0] / run.RECIPE)).build("data")
    for folder, task in tasks.items():
        _check(folder, task, next(iter(tasks.values())))
    samples = [data.sample(given.split, index, None) for index in range(given.objects)]
    views = [views_of(tasks, sample, index, given.steps) for index, sample in enumerate(samples)]
    rows = table(measure(samples, views))
    for row in (HEADER, *rows):
        print("".join(f"{cell:{width}}" for cell, width in zip(row, WIDTHS, strict=True)).rstrip())
    if given.sheet is not None:
        _save(sheet(views[:6]), given.sheet)


def _save(image: Tensor, path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.fromarray(to_bytes(image * 2 - 1)).save(file, "PNG", optimize=True)
    write_atomically(path, file.getvalue())


def _check(folder: str, task: Any, first: Any) -> None:
    """A run must be one of views in pixels, on the base of the first."""
    if not hasattr(task, "refers"):
        raise RequestError(f"{folder}: trains {type(task).__name__}, no MultiViewDenoising")
    if task.pipeline is not None or task.refers:
        raise RequestError(f"{folder}: views in pixels, of a model without a reference, can be measured here")
    same = all(
        torch.equal(a, b) for a, b in zip(task.unet.own_state().values(), first.unet.own_state().values(), strict=True)
    )
    if not same:
        raise RequestError(f"{folder}: another base than that of the first run")


if __name__ == "__main__":
    sys.exit(main())
