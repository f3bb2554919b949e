"""Processes share every batch and take turns in evaluations: every sample once, whatever else each has drawn."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shared.training.feed import Ahead, Key, Seeded, Shares, Timed, Turns, rebuilt, seed_all
from shared.training.order import EpochSampler

ORDER = SimpleNamespace(seed=7)


def loader(count: int, batch_size: int = 4) -> DataLoader:
    return DataLoader(range(count), batch_size, shuffle=True)  # type: ignore[arg-type]


def shares(count: int, rank: int, world: int, epoch: int = 0, ready: int = 0) -> Shares:
    epochs = SimpleNamespace(current=SimpleNamespace(processed=epoch))
    batches = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=ready)))
    return Shares(loader(count), ORDER, SimpleNamespace(epoch_progress=epochs, epoch_loop=batches), rank, world)


def drawn(sampler: Any, state: int) -> list[Any]:
    torch.manual_seed(state)
    return list(sampler)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 23), world=st.integers(1, 6), epoch=st.integers(0, 3))
def test_shares_are_the_batches_of_one_process(count: int, world: int, epoch: int) -> None:
    whole = drawn(shares(count, 0, 1, epoch), 0)
    samplers = [shares(count, rank, world, epoch) for rank in range(world)]
    parts = [drawn(sampler, state) for state, sampler in enumerate(samplers)]
    for number, batch in enumerate(whole):
        counted = [key for part, s in zip(parts, samplers, strict=True) if s.weights[number] for key in part[number]]
        assert sorted(counted) == sorted(batch)  # seeds too
        assert all(part[number] for part in parts)
        assert sum(s.weights[number] for s in samplers) == pytest.approx(world)
        means = [np.mean([key.index for key in part[number]]) for part in parts]
        weighted = [s.weights[number] * mean for s, mean in zip(samplers, means, strict=True)]
        assert np.mean(weighted) == pytest.approx(np.mean([key.index for key in batch]))


@given(count=st.integers(1, 23), ready=st.integers(0, 6))
def test_shares_go_on_within_an_epoch(count: int, ready: int) -> None:
    whole = drawn(shares(count, 0, 1), 0)
    sampler = shares(count, 0, 1, ready=ready)
    assert drawn(sampler, 1) == whole[ready % len(whole) :]
    assert len(sampler.weights) == len(whole)


def test_orders_and_seeds_differ_between_epochs() -> None:
    first, second = (drawn(shares(23, 0, 1, epoch), 0) for epoch in (0, 1))
    assert [key.index for batch in first for key in batch] != [key.index for batch in second for key in batch]
    assert len({key.seed for batch in [*first, *second] for key in batch}) == 46


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 23), world=st.integers(1, 6))
def test_turns_take_every_batch_once(count: int, world: int) -> None:
    """Also of a loader that shuffles, whatever each process has drawn before."""
    whole = drawn(Turns(loader(count), ORDER, 0, 1), 0)
    samplers = [Turns(loader(count), ORDER, rank, world) for rank in range(world)]
    parts = [drawn(sampler, state) for state, sampler in enumerate(samplers)]
    assert {len(part) for part in parts} == {len(samplers[0])}
    taken = {}
    for sampler, part in zip(samplers, parts, strict=True):
        for step, batch in enumerate(part):
            if sampler.counts(step):
                assert sampler.number(step) not in taken
                taken[sampler.number(step)] = batch
    assert [taken[number] for number in range(len(whole))] == whole


def test_a_sample_draws_by_its_key_alone() -> None:
    class Draws:
        def __getitem__(self, index: int) -> tuple[int, float, float, float]:
            return index, random.random(), np.random.rand(), torch.rand(()).item()

    dataset = Seeded(Draws())  # type: ignore[arg-type]
    first = dataset[Key(3, 5)]
    seed_all(99)
    assert dataset[Key(3, 5)] == first
    again = dataset[Key(3, 6)]
    assert all(a != b for a, b in zip(first[1:], again[1:], strict=True))


def viewed(epoch: int, views: int, ordered: bool, rank: int = 0, world: int = 1) -> list[Key]:
    """The keys of an epoch over seven samples."""
    made = shares(7, rank, world, epoch)
    if ordered:
        made = Shares(DataLoader(range(7), 4, sampler=EpochSampler(7, 5)), ORDER, made.loop, rank, world, views)  # type: ignore[arg-type]
    made.views = views
    return [key for batch in drawn(made, 0) for key in batch]


@pytest.mark.parametrize("ordered", [False, True])
def test_views_take_turns_wherever_a_sample_falls(ordered: bool) -> None:
    """Sample and seed are those of its view: the epoch, the place in it and the process change the order alone."""
    epochs = [viewed(epoch, 3, ordered) for epoch in range(7)]
    assert sorted(epochs[0]) == sorted(epochs[3]) == sorted(epochs[6])
    assert epochs[0] != epochs[3]
    seeds = [{key.seed for key in epoch} for epoch in epochs[:3]]
    assert [len(each) for each in seeds] == [7, 7, 7]
    assert len(set().union(*seeds)) == 21
    assert [sorted(key.index for key in epoch) for epoch in epochs[:3]] == [
        list(range(ordered * 7 * view, ordered * 7 * view + 7)) for view in range(3)
    ]
    halves = [viewed(4, 3, ordered, rank, 2) for rank in range(2)]
    assert sorted([*halves[0], *halves[1]]) == sorted(epochs[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 9])
def test_batches_are_shown_one_ahead_and_given_in_their_order(count: int, workers: int) -> None:
    shown: list[list[int]] = []
    plain = DataLoader(range(count), 2, num_workers=workers)  # type: ignore[arg-type]
    made = rebuilt(plain, plain.dataset, plain.batch_sampler, lambda batch: shown.append(batch.tolist()))  # type: ignore[arg-type]
    assert isinstance(made, Ahead)
    for _ in range(2):
        shown.clear()
        for number, batch in enumerate(made):
            assert batch.tolist() == shown[number] == list(range(2 * number, min(2 * number + 2, count)))
            assert len(shown) == min(number + 2, len(made))
        assert len(shown) == len(made)
    assert type(rebuilt(plain, plain.dataset, plain.batch_sampler)) is Timed  # type: ignore[arg-type]
