"""A double of ElasticDiffusion (Haji-Ali et al., 2024), a sampler of any size that knows nothing but a UNet to call.

What the text asks for is taken from shrunken latents of the size that the UNet knows, the detail from windows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def sample(
    unet: Any, schedule: Any, text: Tensor, empty: Tensor, latent: Tensor, *, steps: int = 4, known: int = 8,
    resampled: int = 3, fresh: float = 0.3, guidance: float = 10.0, reduced: float = 0.8, weight: float = 0.5,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """latent (1, C, H, W) of noise; the latent without it.

    known: the side that the UNet works at; the longer of H and W is a multiple of it, the other of their quotient.
    resampled: how often a shrunken latent is drawn for a step, with ``fresh`` of its pixels new.  reduced: share of
    the steps in which x0 is drawn to that of the shrunken latent, ``weight`` of the way at first.
    """
    generator, cell = torch.Generator().manual_seed(seed), max(latent.shape[-2:]) // known
    schedule.set_timesteps(steps)
    for i, t in enumerate(schedule.timesteps):

        def call(x: Tensor, tokens: Tensor, t: Tensor = t) -> Tensor:
            return unet(x, t, encoder_hidden_states=tokens.expand(len(x), -1, -1)).sample

        small, direction = _pick(latent, cell, generator), torch.zeros(())
        for _ in range(resampled):
            new = torch.rand(small.shape[-2:], generator=generator) < fresh
            small = torch.where(new, _pick(latent, cell, generator), small)
            without = call(small, empty)
            change = call(small, text) - without
            direction = direction + _grown(change, cell) / resampled
        noise = _windows(latent, lambda x: call(x, empty), known) + guidance * direction
        alpha = schedule.alphas_cumprod[t]
        if i < reduced * steps:
            x0, rough = (
                (x - (1 - alpha).sqrt() * e) / alpha.sqrt()
                for x, e in ((latent, noise), (small, without + guidance * change))
            )
            pull = weight * (1 + math.cos(math.pi * i / (reduced * steps))) / 2
            x0 = x0 - pull * _grown(F.avg_pool2d(x0, cell) - rough, cell)
            noise = (latent - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        latent = schedule.step(noise, t, latent).prev_sample
    return latent


def _pick(latent: Tensor, cell: int, generator: torch.Generator) -> Tensor:
    """One pixel of each cell at random: (1, C, H, W) -> (1, C, H / cell, W / cell)."""
    height, width = latent.shape[-2] // cell, latent.shape[-1] // cell
    down, right = (torch.randint(cell, (height, width), generator=generator) for _ in range(2))
    return latent[..., torch.arange(height)[:, None] * cell + down, torch.arange(width) * cell + right]


def _grown(x: Tensor, cell: int) -> Tensor:
    return F.interpolate(x, scale_factor=cell, mode="nearest")


def _windows(latent: Tensor, call: Any, known: int) -> Tensor:
    """What is said of each square of half the known side, seen in a window of that side; all windows at once."""
    half, (height, width) = known // 2, latent.shape[-2:]
    squares = [(y, x) for y in range(0, height, half) for x in range(0, width, half)]
    corners = [(_start(y, height, known), _start(x, width, known)) for y, x in squares]
    said = call(torch.cat([latent[..., top : top + known, left : left + known] for top, left in corners]))
    found = torch.empty_like(latent)
    for (y, x), (top, left), each in zip(squares, corners, said, strict=True):
        found[0, :, y : y + half, x : x + half] = each[:, y - top : y - top + half, x - left : x - left + half]
    return found


def _start(at: int, size: int, known: int) -> int:
    """Of the window, within the latent, around what begins at ``at``."""
    return min(max(at - known // 4, 0), size - known)
