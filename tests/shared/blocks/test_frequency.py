"""The frequency split: the published one on any grid, and what must hold of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.blocks.frequency import half_side, split


def literal(maps: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """The published steps: two transforms back, of the shifted spectrum inside and outside a square."""
    height, width = maps.shape[-2:]
    c = int((min(height, width) * cutoff) // 2)
    mask = torch.zeros(height, width, dtype=maps.dtype)
    mask[height // 2 - c : height // 2 + c, width // 2 - c : width // 2 + c] = 1
    spectrum = torch.fft.fftshift(torch.fft.fft2(maps, norm="ortho"), dim=(-2, -1))
    low, high = (
        torch.fft.ifft2(torch.fft.ifftshift(spectrum * m, dim=(-2, -1)), norm="ortho").real for m in (mask, 1 - mask)
    )
    return low, high


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 11), (5, 4)])
@pytest.mark.parametrize("cutoff", [0.3, 0.6, 1.0])
def test_the_split_is_the_published_one_on_any_grid(size, cutoff) -> None:
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    for ours, theirs in zip(split(maps, cutoff), literal(maps, cutoff), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_low_and_high_are_the_input() -> None:
    maps = torch.randn(2, 5, 32, 32)
    low, high = split(maps, 0.3)
    assert (low + high - maps).abs().max() < 1e-5
    assert low.std() > 0.1
    assert high.std() > 0.1


def test_a_constant_map_is_low_and_without_a_square_everything_is_high() -> None:
    constant = torch.full((1, 2, 8, 8), 3.0)
    low, high = split(constant, 0.3)
    torch.testing.assert_close(low, constant)
    assert high.abs().max() < 1e-6
    assert half_side(8, 8, 0.2) == 0
    maps = torch.randn(1, 2, 8, 8)
    low, high = split(maps, 0.2)
    assert not low.any()
    assert torch.equal(high, maps)


def test_64_of_1024_frequencies_are_low_at_the_published_size() -> None:
    """Waves of one frequency pass whole (both it and its mirror are in), by half (one is), or not at all."""
    assert (half_side(32, 32, 0.3), half_side(32, 32, 0.2)) == (4, 3)
    spectrum = torch.eye(1024, dtype=torch.complex128).view(1024, 32, 32)
    waves = torch.fft.ifft2(spectrum, norm="ortho")
    parts = [split(part, 0.3)[0] for part in (waves.real, waves.imag)]
    kept = torch.fft.fft2(torch.complex(*parts), norm="ortho").flatten(1).diagonal().real
    assert kept.sum().item() == pytest.approx(64)
    assert sorted(set(kept.mul(2).round().long().tolist())) == [0, 1, 2]
    assert int((kept > 0.75).sum()) == 49  # -3 to 3 in both directions


def test_half_precision_is_split_too() -> None:
    maps = torch.randn(1, 2, 8, 8)
    low, high = split(maps.bfloat16(), 0.6)
    assert low.dtype == high.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), split(maps, 0.6)[0], rtol=0, atol=0.05)
