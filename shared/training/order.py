"""The order of training samples, from a seed and the epoch alone; batches of one task each, of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Each epoch a permutation drawn from (seed, epoch), as positions ``epoch * length + i``.

    Epochs follow one another as it is iterated; ``set_epoch`` (which Lightning calls) goes to a given one.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        start, self.epoch = self.epoch * self.length, self.epoch + 1
        return iter((order + start).tolist())


def shares(batches: Sequence[int], temperature: float | None) -> list[int]:
    """How many batches of an epoch each of several data sets has, at least 1; together as many as they are.

    batches: of one pass over each, N.  temperature: T of ``N ** (1 / T)``, to which shares are proportional (Raffel et
    al., 2020): 1 is every batch once, None the same number for all, as far as whole numbers go.
    """
    total, most = sum(batches), max(batches)
    powers = [1.0 if temperature is None else math.exp(math.log(n / most) / temperature) for n in batches]
    exact = [total * power / sum(powers) for power in powers]
    found = [max(1, int(share)) for share in exact]
    while (left := total - sum(found)) > 0:  # to those that rounding took most from
        behind = [share - have for share, have in zip(exact, found, strict=True)]
        found[behind.index(max(behind))] += 1
    while left < 0:  # from those that can spare one
        found[found.index(max(found))] -= 1
        left += 1
    return found


class TaskBatches(Sampler[list[int]]):
    """Batches of one data set each, as indices into several laid end to end; their order is drawn by ``generator``.

    An epoch has ``shares`` of each. A data set is shuffled anew each epoch, and again where its share is more than one
    pass; of less than a pass, an epoch takes the first batches.

    sizes, batch_sizes: samples of each, and of its batches.
    """

    def __init__(
        self, sizes: Sequence[int], batch_sizes: Sequence[int], temperature: float | None, generator: torch.Generator
    ):
        self.sizes, self.batch_sizes, self.generator = list(sizes), list(batch_sizes), generator
        passes = [-(-size // each) for size, each in zip(sizes, batch_sizes, strict=True)]
        self.counts = shares(passes, temperature)

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        batches, start = [], 0
        for size, each, count in zip(self.sizes, self.batch_sizes, self.counts, strict=True):
            own: list[list[int]] = []
            while len(own) < count:
                order = (torch.randperm(size, generator=self.generator) + start).tolist()
                own += [order[i : i + each] for i in range(0, size, each)]
            batches += own[:count]
            start += size
        return iter([batches[i] for i in torch.randperm(len(batches), generator=self.generator).tolist()])
