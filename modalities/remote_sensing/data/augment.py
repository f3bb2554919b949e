"""Augmentation of whole batches in torch: crops, turns and flips, and changes of colour."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_colour(image: Tensor, size: int, *, smallest: float, colour: float) -> Tensor:
    """image float (B, bands, H, W), normalised, to (B, bands, size, size), from torch's global random state.

    smallest: least share of the area that a crop takes.  colour: strength of the colour changes, 0 for none.
    """
    return recoloured(_cropped(image, size, smallest), colour)


def _cropped(image: Tensor, size: int, smallest: float) -> Tensor:
    """Crops of any of the eight orientations, half of them also turned by up to 32 degrees, at aspects to 1.5.

    What a turned crop misses at a corner is mirrored.
    """
    count = len(image)
    side, aspect = _uniform(count, smallest, 1).sqrt(), _uniform(count, -0.2, 0.2).exp()
    across, down = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    angle = torch.randint(4, (count,)) * math.pi / 2 + (torch.rand(count) < 0.5) * _uniform(count, -0.55, 0.55)
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    to_right, to_below = _uniform(count, -1, 1) * (1 - across), _uniform(count, -1, 1) * (1 - down)
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([flip * across * cos, -down * sin, to_right], 1)
    columns = torch.stack([flip * across * sin, down * cos, to_below], 1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), [count, 1, size, size], align_corners=False)
    return F.grid_sample(image, grid.to(image), padding_mode="reflection", align_corners=False)


def recoloured(image: Tensor, strength: float) -> Tensor:
    """Saturation, contrast and brightness of each image, gain and offset of each band; a fifth become grey.

    So that features rest on texture and shape and not on colour alone, which sensors and seasons change.
    """
    count, bands, k = len(image), image.shape[1], strength
    grey = image.mean(1, keepdim=True)
    kept = torch.rand(count, 1, 1, 1) >= 0.2 * k
    image = grey + (image - grey) * kept * _uniform((count, 1, 1, 1), 1 - 0.8 * k, 1 + 0.4 * k)
    middle = image.mean((1, 2, 3), keepdim=True)
    image = (image - middle) * _uniform((count, 1, 1, 1), -0.4 * k, 0.4 * k).exp() + middle
    image = image + _uniform((count, 1, 1, 1), -0.5 * k, 0.5 * k)
    gain, offset = (_uniform((count, bands, 1, 1), -width * k, width * k) for width in (0.15, 0.25))
    return image * gain.exp() + offset


def reexposed(image: Tensor, strength: float) -> Tensor:
    """Normalised bands (B, bands, H, W) of each image under another sun, ground and sensor: gain and offset of all
    bands together and of each alone, normally distributed with deviation 0.15 * ``strength``, in log units and in
    deviations of the band."""
    per_image, per_band = (len(image), 1, 1, 1), (*image.shape[:2], 1, 1)
    gain, offset = (
        0.15 * strength * (torch.randn(per_image) + torch.randn(per_band)).to(image) for _ in ("gain", "offset")
    )
    return image * gain.exp() + offset


def _uniform(shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(low, high)
