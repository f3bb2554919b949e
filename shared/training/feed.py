"""What training is fed: the batches of the data, divided among processes, and random numbers that can be had again."""

from __future__ import annotations

import math
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from shared.errors import RequestError
from shared.training.order import EpochSampler

ORDER, SAMPLE, STEP, EVALUATION, PREPARE = range(5)  # what random numbers are for: each purpose has seeds of its own


def seed_all(*numbers: int) -> int:
    """Seed Python, NumPy and torch with a number of 32 bits that is another for every tuple of numbers; returns it."""
    number = _hash(*numbers)
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes 20 times as long, too long for every sample
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_built():
        torch.mps.manual_seed(number)
    return number


def _hash(*numbers: int) -> int:
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)[0])


class Key(NamedTuple):
    """A sample and the seed it is drawn with."""

    index: Any
    seed: int


class Seeded(Dataset):
    """A data set whose random numbers follow from the key alone, whichever process or worker draws them."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Any:
        seed_all(key.seed)
        return self.dataset[key.index]


class Shares(Sampler):
    """This process's shares of an epoch's training batches, the same number of steps in every process.

    loop: the trainer's, which knows the epoch, and the batch at which a run goes on within it.  rank, world: process
    ``rank`` takes every ``world``-th sample of a batch; of one with fewer samples than processes, those left without
    take the first, at weight 0.

    views: how many augmentations a sample has, which take turns by epoch; None: every epoch draws its own.

    weights: of the shares handed out in this epoch, by batch: share of the samples times ``world``. Averaged over
    processes, losses times weights are the loss of the whole batch.
    """

    def __init__(self, loader: DataLoader, order: Any, loop: Any, rank: int, world: int, views: int | None = None):
        self.views = views
        self.batches: Any = batches_of(loader)
        self.order, self.loop, self.whole = order, loop, loader.batch_sampler is None
        self.rank, self.world = rank, world
        self.weights: list[float] = []
        found = (self.batches, getattr(self.batches, "sampler", None))
        self.samplers = [sampler for sampler in found if sampler is not None]
        self.generator = torch.Generator()
        for sampler in self.samplers:
            if hasattr(sampler, "generator"):
                sampler.generator = self.generator

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """The whole order is drawn here at once, with seeds that all processes share."""
        epoch, seed = self.loop.epoch_progress.current.processed, self.order.seed
        start = self.loop.epoch_loop.batch_progress.current.ready % len(self)
        self.generator.manual_seed(seed_all(seed, ORDER, epoch))
        for sampler in self.samplers:
            if hasattr(sampler, "set_epoch"):  # Lightning does it too, but after the first epoch's iterator was made
                sampler.set_epoch(epoch)
        self.weights = [0.0] * start
        return self._shares(list(self.batches)[start:], start, seed, epoch)

    def _shares(self, batches: list[Any], start: int, seed: int, epoch: int) -> Iterator[Any]:
        for number, batch in enumerate(batches, start):
            size = _size(batch)
            places = range(size)[self.rank :: self.world]
            self.weights.append(len(places) * self.world / size)
            if self.views and not self.whole and isinstance(batch, (list, tuple)):
                yield [self._viewed(batch[place], seed, epoch % self.views) for place in places or [0]]
            else:
                yield _keyed(batch, places or [0], self.whole, seed, SAMPLE, epoch, number)

    def _viewed(self, index: Any, seed: int, view: int) -> Key:
        """A sample in one of its augmentations, whatever the epoch and its place in it."""
        ordered = next((sampler for sampler in self.samplers if isinstance(sampler, EpochSampler)), None)
        sample = index if ordered is None else index % ordered.length
        drawn = _hash(seed, SAMPLE, view, zlib.crc32(repr(sample).encode()))
        return Key(sample if ordered is None else view * ordered.length + sample, drawn)


class Turns(Sampler):
    """Whole batches of an evaluation in turn: process ``rank`` of ``world`` takes every ``world``-th.

    All processes take as many steps, so the last round is filled up with the last batch; see ``counts``.
    """

    def __init__(self, loader: DataLoader, order: Any, rank: int, world: int):
        self.batches: Any = batches_of(loader)
        self.order, self.whole, self.rank, self.world = order, loader.batch_sampler is None, rank, world

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world)

    def __iter__(self) -> Iterator[Any]:
        seed = self.order.seed
        seed_all(seed, EVALUATION)
        batches = list(self.batches)
        for step in range(len(self)):
            number = min(self.number(step), len(batches) - 1)
            batch = batches[number]
            yield _keyed(batch, range(_size(batch)), self.whole, seed, EVALUATION, number)

    def number(self, step: int) -> int:
        """Which of all batches comes in this process's step."""
        return step * self.world + self.rank

    def counts(self, step: int) -> bool:
        """Whether the batch of this process's step is one of its own, not one that fills up."""
        return self.number(step) < len(self.batches)


class Timed(DataLoader):
    """A loader that adds up the seconds that whoever asks for batches waits for them."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        began = time.perf_counter()
        iterator = super().__iter__()
        self.waited += time.perf_counter() - began
        return self._counted(iterator)

    def _counted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - began
            yield batch


class Feed(LightningDataModule):
    """Hands the loaders to Lightning, seeded: training in shares, evaluation in turns.

    cache: of the model that is fed (``shared.cache.FrozenPrefix``); it is shown each batch one ahead.
    """

    def __init__(self, loaders: dict[str, DataLoader], order: Any, cache: Any = None):
        super().__init__()
        self.loaders, self.order, self.cache = loaders, order, cache
        self.training: Timed | None = None
        self.shares: Shares | None = None
        self.turns: dict[str, Turns] = {}

    def train_dataloader(self) -> DataLoader:
        loader, trainer = self.loaders["train"], self.trainer
        assert trainer is not None
        self.shares = Shares(loader, self.order, trainer.fit_loop, trainer.global_rank, trainer.world_size, self._views)
        self.training = rebuilt(loader, Seeded(loader.dataset), self.shares, self._expect)
        return self.training

    def val_dataloader(self) -> DataLoader:
        return self._in_turns("validation")

    def test_dataloader(self) -> DataLoader:
        return self._in_turns("test")

    def _in_turns(self, split: str) -> DataLoader:
        loader, trainer = self.loaders[split], self.trainer
        assert trainer is not None
        self.turns[split] = Turns(loader, self.order, trainer.global_rank, trainer.world_size)
        return rebuilt(loader, Seeded(loader.dataset), self.turns[split], self._expect)

    @property
    def _views(self) -> int | None:
        return None if self.cache is None else self.cache.settings.views

    @property
    def _expect(self) -> Callable[[Any], None] | None:
        return None if self.cache is None else self.cache.expect


class Ahead(Timed):
    """A loader that shows each batch to ``expect`` while the one before it is worked on."""

    expect: Callable[[Any], None]

    def __iter__(self) -> Any:
        return self._ahead(super().__iter__())

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        held = []
        for batch in batches:
            self.expect(batch)
            held.append(batch)
            if len(held) == 2:
                yield held.pop(0)
        yield from held


def batches_of(loader: DataLoader) -> Any:
    """What gives a loader's batches as lists of indices; its sampler, where the data set makes the batches."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _size(batch: Any) -> int:
    """Samples of a batch, as far as its indices say; 1 where the data set makes it from one index."""
    return len(batch) if isinstance(batch, (list, tuple)) else 1


def _keyed(batch: Any, places: Sequence[int], whole: bool, *numbers: int) -> Any:
    """These places of a batch with their seeds; one key where the data set makes whole batches."""
    if not isinstance(batch, (list, tuple)):
        return Key(batch, _hash(*numbers))
    if whole:
        return Key([batch[place] for place in places], _hash(*numbers, places[0]))
    return [Key(batch[place], _hash(*numbers, place)) for place in places]


def check(loaders: dict[str, DataLoader], world: int) -> None:
    """Raises RequestError where a split is empty or its loader cannot be fed from."""
    for split, loader in loaders.items():
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            raise RequestError(f"the {split} split is an iterable data set: give one with numbered samples")
    if empty := [split for split, loader in loaders.items() if not len(loader)]:
        raise RequestError(f"the {' and '.join(empty)} split has no batch: add samples or lower the batch size")
    if world == 1:
        return
    for split, loader in loaders.items():
        if isinstance(loader.sampler, DistributedSampler):
            raise RequestError(f"the {split} loader divides samples among processes: leave that to the engine")
    if not isinstance(next(iter(batches_of(loaders["train"]))), (list, tuple)):
        raise RequestError("the train loader gives whole batches, which cannot be divided among processes: use one")


def rebuilt(
    loader: DataLoader, dataset: Dataset, batches: Sampler, expect: Callable[[Any], None] | None = None
) -> Timed:
    """The loader with another data set and other batches of its indices; ``expect`` is shown each batch one ahead."""
    order = {"batch_size": None, "sampler": batches} if loader.batch_sampler is None else {"batch_sampler": batches}
    made = (Timed if expect is None else Ahead)(
        dataset,
        **order,  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # the workers' own seeds: every sample brings its own
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    if isinstance(made, Ahead) and expect is not None:
        made.expect = expect
    return made
