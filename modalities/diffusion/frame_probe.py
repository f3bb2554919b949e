"""Whether a model of clips uses the frames it is given: test clips told by the right ones, another clip's, and none.

    python -m modalities.diffusion.frame_probe RUN [RUN ...] [--clips 32] [--steps 12]

RUN is a finished run of ``StickerDenoising`` whose recipe's data can be read. Four cases: the first frame is given;
every second one; the first half; the last half. The text is told in all of them. The first table has the squared error
of the noise, the mean at five timesteps spread over the schedule; the second the root mean square difference between
sampled and true clips over all bands, which go from 0 to 1. Both are of the frames that are not given, on the same
noise whatever is given. Their columns: the right frames; how much more the error is with another test clip's, and with
none. Of pixels also how much more it is, below zero: less, for what needs no model: the nearest given frames repeated,
those on both sides blended linearly, and the frames of that training clip (of the first 512) that is nearest in the
given ones. Last are the errors of the given frames themselves, which the model makes anew: as they are given and, of
noise, as they are not. Differences are paired over clips; ± is the standard error over them, not over trainings. Clips
are taken without padding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from modalities.diffusion.masks import interpolations, masked_condition
from modalities.diffusion.stickers.sampling import denoise
from shared.errors import RequestError, exit_status

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the schedule
KNOWN = 512  # training clips looked at
NOISE = ("noise", "right frames", "another's", "none", "the given", "not given")
PIXELS = ("pixels", "right frames", "another's", "none", "repeated", "blended", "nearest clip", "the given")
PAIRED = (3, 6)  # columns of values that are compared, the others stand alone
WIDTH = 20


def cases(frames: int) -> dict[str, Tensor]:
    """Which frames are given, (F,), 1 or 0."""
    half = frames // 2
    found = {
        "first frame": (1,) + (0,) * (frames - 1),
        "every second": interpolations(frames)[0],
        "first half": (1,) * half + (0,) * (frames - half),
        "last half": (0,) * (frames - half) + (1,) * half,
    }
    return {name: torch.tensor(given).float() for name, given in found.items()}


def whole(data: Any, split: str, most: int) -> dict[str, Any]:
    """A batch of the first clips of a split, all frames real."""
    data = replace(data, key_frames=(data.frames, data.frames))
    return default_collate([data.sample(split, index) for index in range(min(most, data.count(split)))])


@torch.no_grad()
def noise_errors(task: Any, x: Tensor, given: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The squared error (N, F) of the noise in each frame of latents x, given condition latents."""
    generator, found = torch.Generator().manual_seed(0), []
    for level in LEVELS:
        steps = torch.full((len(x),), int(level * task.schedule.config.num_train_timesteps), device=x.device)
        noise = torch.randn(x.shape, generator=generator).to(x)
        noisy: Any = task.schedule.add_noise(x, noise, steps)
        said = task.model(torch.cat([noisy, given], dim=1), steps, **text).sample
        found.append((said.float() - noise).square().mean((1, 3, 4)).cpu())
    return torch.stack(found).mean(0)


def difference(clips: Tensor, others: Tensor, which: Tensor) -> Tensor:
    """The root mean square (N,), in 0 to 1, between clips (N, C, F, H, W) in -1 to 1, in some frames (F,)."""
    return ((clips.clamp(-1, 1) - others) / 2)[:, :, which].square().flatten(1).mean(1).sqrt()


def repeated(clips: Tensor, given: Tensor) -> Tensor:
    """Each frame is the nearest given one, the earlier of two."""
    places = given.nonzero()[:, 0]
    nearest = (torch.arange(len(given))[:, None] - places).abs().argmin(1)
    return clips[:, :, places[nearest]]


def blended(clips: Tensor, given: Tensor) -> Tensor:
    """Each frame lies on the line between the given ones before and after it, or is the only one there is."""
    places, found = given.nonzero()[:, 0].tolist(), []
    for frame in range(len(given)):
        before = max((p for p in places if p <= frame), default=places[0])
        after = min((p for p in places if p >= frame), default=places[-1])
        share = (frame - before) / (after - before) if after > before else 0.0
        found.append(torch.lerp(clips[:, :, before], clips[:, :, after], share))
    return torch.stack(found, dim=2)


def nearest(clips: Tensor, given: Tensor, known: Tensor) -> Tensor:
    """The known clip that is nearest to each of the clips in its given frames."""
    told = given > 0
    apart = torch.cdist(clips[:, :, told].flatten(1), known[:, :, told].flatten(1))
    return known[apart.argmin(1)]


def measure(task: Any, data: Any, clips: int, steps: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each case its name, the noise's errors (N, 5) and the pixels' (N, 7), in the order of the tables."""
    task.eval()
    batch, known = whole(data, "test", clips), whole(data, "train", KNOWN)["clip"]
    clip, real = batch["clip"], batch["frame_mask"].to(task.device)
    if len(clip) < 2:
        raise RequestError(f"{len(clip)} test clips: another clip's frames need 2")
    x, text = task.latents.encode(clip.to(task.device), real, draw=False), task.tell(batch["caption"], True)
    away = task.tell([task.sampler.negative] * len(clip), True) if task.sampler.guidance > 1 else None
    sampler = {"steps": steps, "guidance": task.sampler.guidance, "seeds": range(len(clip))}
    for name, given in cases(data.frames).items():
        missing, errors, made = given == 0, [], []
        for source in (x, x.roll(1, 0), torch.zeros_like(x)):
            told = masked_condition(source, given, real)
            errors.append(noise_errors(task, x, told, text))
            latents = denoise(task, told, real, text, away, progress=lambda done, total: None, **sampler)
            made.append(task.latents.decode(latents).float().cpu())
        floors = [repeated(clip, given), blended(clip, given), nearest(clip, given, known)]
        pixels = [difference(other, clip, missing) for other in (*made, *floors)]
        pixels.append(difference(made[0], clip, given > 0))
        noise = [e[:, missing].mean(1) for e in errors] + [errors[i][:, ~missing].mean(1) for i in (0, 2)]
        yield name, torch.stack(noise, dim=1), torch.stack(pixels, dim=1)


def row(name: str, values: Tensor, paired: int) -> list[str]:
    """A line of text: the first column, the next ones less it, the rest as they are."""
    less = [_spread(values[:, i] - values[:, 0], "+") for i in range(1, paired)]
    return [name, _spread(values[:, 0]), *less, *(_spread(v) for v in values[:, paired:].unbind(1))]


def _spread(values: Tensor, sign: str = "") -> str:
    return f"{values.mean():{sign}.4f} ± {values.std() / len(values) ** 0.5:.4f}"


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    from shared import recipe, run

    parser = argparse.ArgumentParser(prog="python -m modalities.diffusion.frame_probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--clips", type=int, default=32, help="of the test split, at most")
    parser.add_argument("--steps", type=int, default=12, help="of the sampler")
    given = parser.parse_args(arguments)
    if given.clips < 2 or given.steps < 1:
        raise RequestError("--clips from 2, --steps from 1")
    for folder in given.runs:
        task = run.load(folder).task
        if not hasattr(task, "curriculum"):
            raise RequestError(f"{folder}: trains {type(task).__name__}, no StickerDenoising")
        data = recipe.load(str(folder / run.RECIPE)).build("data")
        found = list(measure(task, data, given.clips, given.steps))
        print(f"{folder}: {len(found[0][1])} clips")
        noise, pixels = ([row(name, table[i], PAIRED[i]) for name, *table in found] for i in (0, 1))
        for line in (NOISE, *noise, PIXELS, *pixels):
            print("".join(f"{cell:{WIDTH}}" for cell in line).rstrip())


if __name__ == "__main__":
    sys.exit(main())
