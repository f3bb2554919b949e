"""AdapterDrop: the adapters of the lowest blocks rest, for good or in a training step (Rücklé et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shared.errors import RequestError


def drop(model: Any, lowest: int, drawn: int) -> None:
    """See ``Adapted.drop``."""
    if min(lowest, drawn) < 0:
        raise RequestError(f"AdapterDrop of {min(lowest, drawn)} blocks: use 0 or more")
    if model.state.merged:
        raise RequestError("adapters are merged into the weights; unmerge() before dropping some")
    if most := max(lowest, drawn):
        if not model.active:
            raise RequestError("AdapterDrop: no adapter is active")
        for name in model.active:
            _check(model, name, most)
    model.state.lowest, model.state.most, model.state.drawn = lowest, drawn, 0
    model.state.folds.clear()


def _check(model: Any, name: str, most: int) -> None:
    """Raises RequestError where the adapter has nothing below block ``most`` to drop, or nothing from there on."""
    kind = type(model.methods[name]).__name__
    if not model.methods[name].by_block:
        raise RequestError(f"AdapterDrop: {kind} {name!r} goes from block to block: its lowest cannot be left out")
    ports = [p for p in model.hosts().values() if name in p.around or any(name in on for on in p.on.values())]
    depths = sorted({port.depth for port in ports} - {-1})
    if not depths:
        raise RequestError(f"AdapterDrop: {kind} {name!r} acts in no block")
    if not depths[0] < most <= depths[-1]:
        few = f"use {depths[0] + 1} to {depths[-1]}" if depths[0] < depths[-1] else "there is but one"
        raise RequestError(
            f"AdapterDrop of {most} blocks: {kind} {name!r} acts in blocks {depths[0]} to {depths[-1]}: {few}"
        )


def draw(most: int, number: int, seed: int) -> int:
    """How many blocks rest in step ``number`` of a run: 0 to ``most``, alike in every process."""
    generator = torch.Generator().manual_seed(hash((seed, number, 1)) & 0xFFFF_FFFF_FFFF)
    return int(torch.randint(most + 1, (), generator=generator))


@contextmanager
def dropping(model: Any, most: int) -> Iterator[None]:
    """Adapters of up to ``most`` of the lowest blocks rest in each training step within it."""
    if most:
        model.drop(model.state.lowest, drawn=most)
    try:
        yield
    finally:
        if most:
            model.drop(model.state.lowest)
