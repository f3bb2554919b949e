"""Clips made by a model that RDTF trained: which frames are given, the two masks, and DDIM (Song et al., 2021)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.data.clips import pixels
from modalities.diffusion.frames import PICTURES, read_frames
from modalities.diffusion.masks import frame_mask, masked_condition
from modalities.diffusion.sampling import finite, to_bytes
from shared.errors import RequestError
from shared.generating import Made, Wanted

if TYPE_CHECKING:
    from modalities.diffusion.stickers.denoising import StickerDenoising

STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The noise of training, and how it is taken away again; see ``StickerDenoising``."""

    betas: Literal["scaled_linear", "linear"]
    guidance: float
    eta: float
    negative: str

    def __post_init__(self) -> None:
        if self.betas not in ("scaled_linear", "linear"):
            raise RequestError(f"betas {self.betas!r}: use scaled_linear or linear")
        if not 0 <= self.eta <= 1 or self.guidance < 1:
            raise RequestError(f"eta {self.eta:g} and guidance {self.guidance:g}: from 0 to 1, and at least 1")

    def training(self) -> Any:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        return DDPMScheduler(1000, 0.00085, 0.012, self.betas, clip_sample=False)

    def ddim(self, steps: int, *, pixels: bool) -> Any:
        """pixels: no latents; a clean clip is known to be in -1 to 1, and the last step leaves no noise in it."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        found = DDIMScheduler(
            1000, 0.00085, 0.012, self.betas, clip_sample=pixels, set_alpha_to_one=pixels, steps_offset=1
        )
        found.set_timesteps(steps)
        return found


def generate(task: StickerDenoising, wanted: Wanted, progress: Callable[[int, int], None]) -> Made:
    """See ``StickerDenoising.generate``. Raises RequestError where something is wanted that is not made here."""
    if wanted.views is not None or wanted.mesh is not None:
        raise RequestError("StickerDenoising makes clips: it takes neither views nor a mesh")
    frames = task.frames if wanted.frames is None else wanted.frames
    if not 2 <= frames <= task.frames:
        raise RequestError(f"frames {frames}: from 2 to {task.frames}, the frames it was trained with")
    side, factor = wanted.size or (task.size, task.size), task.latents.factor
    if side[0] != side[1] or side[0] % factor or side[0] < factor:
        raise RequestError(f"size {side[1]}x{side[0]}: clips are square, sides by {factor} pixels")
    if wanted.count < 1 or (wanted.steps is not None and not 1 <= wanted.steps <= 1000):
        raise RequestError(f"count {wanted.count} and steps {wanted.steps}: at least 1, and from 1 to 1000")
    places = {} if wanted.image is None else given_frames(wanted.image, frames)
    steps = STEPS if wanted.steps is None else wanted.steps
    guidance = task.sampler.guidance if wanted.guidance is None else wanted.guidance
    negative = task.sampler.negative if wanted.negative is None else wanted.negative
    clips = sample(
        task, places, frames=frames, side=side[0], prompt=wanted.prompt, negative=negative, count=wanted.count,
        steps=steps, guidance=guidance, seed=wanted.seed, progress=progress,
    )  # fmt: skip
    settings = {
        "prompt": wanted.prompt or None, "negative": negative if wanted.prompt else None,
        "image": None if wanted.image is None else str(wanted.image), "given": sorted(places), "width": side[1],
        "height": side[0], "frames": frames, "count": wanted.count, "steps": steps,
        "guidance": guidance if wanted.prompt else None, "eta": task.sampler.eta, "sampler": "DDIM",
        "seed": wanted.seed,
    }  # fmt: skip
    return Made(kind="frames", images=list(to_bytes(finite(clips).transpose(1, 2))), settings=settings, rate=task.rate)


def given_frames(path: Path, frames: int) -> dict[int, np.ndarray]:
    """The given frames uint8 (H, W, 4) by place: one image, the first of an animated one, or a folder's by number."""
    if path.is_dir():
        found = {}
        for file in sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES):
            number = re.findall(r"\d+", file.stem)
            if not number or not 0 <= int(number[-1]) < frames or int(number[-1]) in found:
                raise RequestError(
                    f"{file}: its name must end in its place, a number of its own from 0 to {frames - 1}"
                )
            found[int(number[-1])] = read_frames(file)[0][0]
    else:
        found = dict(enumerate(read_frames(path)[0]))
    if not 1 <= len(found) < frames:
        raise RequestError(f"{path}: {len(found)} frames are given; from 1 to {frames - 1} leave something to make")
    return found


@torch.no_grad()
def sample(
    task: StickerDenoising, places: dict[int, np.ndarray], *, frames: int, side: int, prompt: str, negative: str,
    count: int, steps: int, guidance: float, seed: int, progress: Callable[[int, int], None],
) -> Tensor:  # fmt: skip
    """Clips (count, C, frames, side, side) in -1 to 1. Clip i has the noise of seed + i, whatever ``count``.

    The condition is the same for the prompt and what it is guided away from. Without a prompt no text is told, and
    nothing guides.
    """
    task.eval()
    real = frame_mask([frames] * count, task.frames).to(task.device)
    given = _given(task, places, side, real)
    text = task.tell([prompt] * count, bool(prompt))
    away = task.tell([negative] * count, True) if prompt and guidance > 1 else None
    seeds = range(seed, seed + count)
    x = denoise(task, given, real, text, away, steps=steps, guidance=guidance, seeds=seeds, progress=progress)
    return task.latents.decode(x[:, :, :frames])


@torch.no_grad()
def denoise(
    task: StickerDenoising, given: Tensor, real: Tensor, text: dict[str, Tensor], away: dict[str, Tensor] | None, *,
    steps: int, guidance: float, seeds: Sequence[int], progress: Callable[[int, int], None],
) -> Tensor:  # fmt: skip
    """Latents (B, C, F, h, w) from noise of a seed for each clip.

    given: condition latents of that shape.  real: (B, F).  text: tokens.  away: those it is guided away from, or None.
    """
    device, ddim = task.device, task.sampler.ddim(steps, pixels=task.latents.vae is None)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn((1, *given.shape[1:]), generator=g) for g in draws]).to(given)
    if away is not None:
        text = {name: torch.cat([away[name], tokens]) for name, tokens in text.items()}
    x, shown = noise, real[:, None, :, None, None]
    for number, step in enumerate(ddim.timesteps.tolist()):
        # The padding is noised zeros in training; left to the model, it would drift where no loss ever looked.
        padding = ddim.add_noise(torch.zeros_like(x), noise, torch.tensor([step], device=device))
        x = torch.where(shown > 0, x, padding)
        both = torch.cat([torch.cat([x, given], dim=1)] * (1 if away is None else 2))
        said = task.model(both, torch.tensor([step], device=device), **text).sample.to(x.dtype)
        if away is not None:
            without, within = said.chunk(2)
            said = without + guidance * (within - without)
        # Where a clean clip was cut to -1 to 1, the noise is what leads to it (Dhariwal and Nichol, 2021).
        x = ddim.step(
            said, step, x, eta=task.sampler.eta, use_clipped_model_output=True,
            generator=draws if task.sampler.eta else None,
        ).prev_sample  # fmt: skip
        progress(number + 1, steps)
    return x


def _given(task: StickerDenoising, places: dict[int, np.ndarray], side: int, real: Tensor) -> Tensor:
    """Condition latents (count, C, F, h, w): zero where nothing is given."""
    clip = torch.zeros(1, task.bands, task.frames, side, side)
    mask = torch.zeros(task.frames)
    for place, frame in places.items():
        clip[:, :, place], mask[place] = pixels(frame[None], side, task.bands)[:, 0], 1
    x = task.latents.encode(clip.to(task.device), mask[None].to(task.device), draw=False)
    return masked_condition(x.expand(len(real), *x.shape[1:]), mask, real)
