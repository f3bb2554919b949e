"""The order of training samples, from a seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
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
