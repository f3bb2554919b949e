"""Frequency split: a map as the sum of its low and its high spatial frequencies."""

from __future__ import annotations

import torch
from torch import Tensor


def split(maps: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Maps (..., h, w) as (low, high), whose sum they are.

    Low are the 2c x 2c frequencies from -c to c - 1 in both directions, c as ``half_side`` says; of what they give back
    the real part. That of a square which is not symmetric is that of its mean with its mirror image, so half a spectrum
    will do. Half precision is transformed in float32.
    """
    height, width = maps.shape[-2:]
    half = half_side(height, width, cutoff)
    kept = _low(height, half, maps.device)[:, None] * _low(width, half, maps.device)
    mirrored = kept.flip(0, 1).roll((1, 1), (0, 1))
    share = ((kept + mirrored) / 2)[:, : width // 2 + 1]
    exact = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
    spectrum = torch.fft.rfft2(exact, norm="ortho") * share.to(exact.dtype)
    low = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho").to(maps.dtype)
    return low, maps - low


def half_side(height: int, width: int, cutoff: float) -> int:
    """c, half the side of the square of low frequencies: ``cutoff`` of the shorter side, halved and rounded down."""
    return int(min(height, width) * cutoff // 2)


def _low(count: int, half: int, device: torch.device) -> Tensor:
    """1.0 where a frequency of ``count`` samples, in the order of the transform, is from -half to half - 1."""
    frequency = (torch.arange(count, device=device) + count // 2) % count - count // 2
    return ((frequency >= -half) & (frequency < half)).float()
