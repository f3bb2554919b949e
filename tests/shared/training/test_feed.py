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

from shared.training.feed import Key, Seeded, Shares, Turns, seed_all

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
