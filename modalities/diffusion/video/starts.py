"""Where the frames of a video start from: the first frame, degraded and noised, or noise that frames share.

The frame similarity prior is I2V-Adapter's (Guo et al., 2023); the kinds of noise are those its code offers beside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shared.errors import RequestError

BLUR, SIGMA = 9, 18.0  # of the prior: pixels of the latents


def blurred(latents: Tensor) -> Tensor:
    """(B, C, F, h, w), each frame blurred by a Gaussian of 9 x 9 with sigma 18, mirrored at its edges."""
    from torchvision.transforms.functional import gaussian_blur

    if min(latents.shape[-2:]) <= BLUR // 2:
        small = " x ".join(map(str, latents.shape[-2:]))
        raise RequestError(f"latents of {small}: the prior's blur of {BLUR} x {BLUR} needs at least {BLUR // 2 + 1}")
    frames = latents.transpose(1, 2).flatten(0, 1)
    return gaussian_blur(frames, [BLUR, BLUR], [SIGMA, SIGMA]).unflatten(0, (len(latents), -1)).transpose(1, 2)


def degraded(latents: Tensor, mask: Tensor) -> Tensor:
    """Latents (B, C, F, h, w) where ``mask`` is 1, blurred ones where it is 0; the first frame stays as it is."""
    mixed = mask * latents + (1 - mask) * blurred(latents)
    return torch.cat([latents[:, :, :1], mixed[:, :, 1:]], dim=2)


def related(noise: Tensor, kind: str) -> Tensor:
    """Independent noise (B, C, F, h, w) made noise that frames share.

    kind: "mixed" (half its variance is the first frame's), "progressive" (4/5 of it is the frame's before), "lamp"
    (0.2 of the first frame's plus 0.8 of its own, which has 0.68 of the variance, as published) or "iid".
    """
    first, *others = noise.unbind(2)
    if kind == "mixed":
        return torch.stack([first, *(math.sqrt(0.5) * (first + own) for own in others)], dim=2)
    if kind == "progressive":
        frames = [first]
        for own in others:
            frames.append(math.sqrt(0.8) * frames[-1] + math.sqrt(0.2) * own)
        return torch.stack(frames, dim=2)
    if kind == "lamp":
        return torch.stack([first, *(0.2 * first + 0.8 * own for own in others)], dim=2)
    return noise


def started(
    first: Tensor, frames: int, schedule: Any, timestep: int, generator: torch.Generator,
    *, start: str = "prior", mask_p: float = 0.5,
) -> Tensor:  # fmt: skip
    """The latents (B, C, F, h, w) that sampling starts from at ``timestep``; the first frame is ``first``, clean.

    first: (B, C, h, w).  schedule: a scheduler of diffusers.  mask_p: of the prior, the share of elements that are
    blurred: more of it allows more motion.
    """
    still = first[:, :, None].expand(-1, -1, frames, -1, -1)
    noise = torch.randn(still.shape, generator=generator).to(first)
    if start == "prior":
        mask = (torch.rand(still.shape, generator=generator) >= mask_p).to(first)
        latents = schedule.add_noise(degraded(still, mask), noise, torch.tensor([timestep], device=first.device))
    else:
        latents = related(noise, start) * float(schedule.init_noise_sigma)
    return torch.cat([still[:, :, :1], latents[:, :, 1:]], dim=2)
