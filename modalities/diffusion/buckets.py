"""Image sizes in buckets, and a sampler whose batches never mix them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from shared.errors import RequestError


class Size(NamedTuple):
    """Pixels."""

    height: int
    width: int


class Draw(NamedTuple):
    """One image to make: which one, at which size, and the seed of what is random about it (its crop)."""

    index: int
    size: Size
    seed: int


def squares(low: int, high: int, step: int) -> list[Size]:
    """The anchors: a square every ``step`` pixels from ``low`` to ``high``, both included."""
    if step < 1 or not step <= low <= high or low % step or high % step:
        raise RequestError(f"sizes {low} to {high} pixels by {step}: both ends must be multiples of the step")
    return [Size(side, side) for side in range(low, high + 1, step)]


def buckets(low: int, high: int, step: int, ratio: tuple[float, float]) -> list[Size]:
    """All sizes to train at, in order.

    For every anchor and every longer side, the shorter side that brings the area nearest to the anchor's; all sides
    are multiples of ``step`` from ``low`` to ``high`` pixels, width over height is within ``ratio``.

    Raises RequestError where the ends are no multiples of the step, or the ratios exclude squares.
    """
    if not 0 < ratio[0] <= 1 <= ratio[1]:
        raise RequestError(f"ratio {ratio[0]:g} to {ratio[1]:g} (width over height): it must include 1")
    anchors = squares(low, high, step)
    found = set()
    for anchor in anchors:
        area = anchor.height * anchor.width
        for long in range(anchor.height, high + 1, step):
            short = min(range(low, long + 1, step), key=lambda side: abs(side * long - area))
            found |= {Size(short, long), Size(long, short)}
    return sorted(size for size in found if ratio[0] <= size.width / size.height <= ratio[1])


def weights(sizes: Sequence[Size], probability: str, base: int) -> torch.Tensor:
    """How often each size is drawn, summing to 1.

    probability: "uniform"; "area", in proportion to it; or "distance", in proportion to 1 + |log2(area / base^2)|, so
    that sizes far from the ``base`` size (pixels of a side) come more often.
    """
    areas = torch.tensor([float(size.height * size.width) for size in sizes], dtype=torch.float64)
    if probability == "area":
        raw = areas
    elif probability == "distance":
        raw = 1 + (areas / base**2).log2().abs()
    else:
        raw = torch.ones_like(areas)
    return raw / raw.sum()


class BucketSampler(Sampler):
    """One epoch of batches, each at one size drawn by chance; images are drawn without repetition.

    An item is a batch: ``batch_size`` draws; what is left of the images after the last whole batch is dropped.
    ``set_epoch`` gives another order; seed and epoch decide everything. Where several processes train, the engine gives
    each its share of a batch, so all work at the same size in the same step.
    """

    def __init__(
        self,
        images: int,
        sizes: Sequence[Size],
        *,
        batch_size: int,
        weights: torch.Tensor | None = None,
        seed: int = 0,
    ):
        self.images, self.sizes, self.batch_size, self.seed, self.epoch = images, list(sizes), batch_size, seed, 0
        self.weights = torch.ones(len(self.sizes), dtype=torch.float64) if weights is None else weights

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.images, generator=generator).tolist()
        seeds = torch.randint(2**31, (self.images,), generator=generator).tolist()
        steps = len(self)
        chosen = torch.multinomial(self.weights, max(steps, 1), replacement=True, generator=generator).tolist()
        for step in range(steps):
            images = order[step * self.batch_size :][: self.batch_size]
            yield [Draw(index, self.sizes[chosen[step]], seeds[index]) for index in images]


def cover(height: int, width: int, size: Size, seed: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """How an image of (height, width) becomes one of ``size``: the size to resize it to, then (top, left) of the crop.

    seed: of the crop's place, None means the middle.
    """
    scale = max(size.height / height, size.width / width)
    resized = (max(size.height, math.floor(height * scale + 0.5)), max(size.width, math.floor(width * scale + 0.5)))
    spare = (resized[0] - size.height, resized[1] - size.width)
    if seed is None:
        return resized, (spare[0] // 2, spare[1] // 2)
    generator = torch.Generator().manual_seed(seed)
    top, left = (int(torch.randint(most + 1, (), generator=generator)) for most in spare)
    return resized, (top, left)
