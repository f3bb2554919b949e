"""Folds: changed tensors that inference keeps, each read only while everything it was made of is as it was.

A fold is made where adapters are in force without gradients. It never touches the frozen tensor, so undoing it costs
nothing. ``Adapted.eval`` makes those of the active adapters, so that the first batch is as fast as the bare model's; an
adapter switched to later runs beside its layers until what that has cost would have paid for its folds.

What torch does not count cannot be seen: writing in place through ``tensor.data`` or a NumPy view of a parameter.
``train()``, ``eval()`` and ``Adapted.fold`` start anew. Steps of fused optimisers, which it does not count either, are
counted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Active = tuple[tuple[str, float], ...]  # (name, strength) of adapters in force, in order
SPARE = 256 * 2**20


def _count_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimiser.param_groups:
        torch.autograd.graph.increment_version([p for p in group["params"] if not p.is_inference()])


register_optimizer_step_post_hook(_count_step)


class Fold:
    """A changed tensor, and what it was made of: the frozen tensor, and all that the adapters hold.

    Storages are kept alive with it, so that no new one can come to lie where an old one was.
    """

    __slots__ = ("holders", "plain", "tensors", "value", "weight")

    def __init__(self, value: Tensor, weight: Tensor, adapters: Iterable[nn.Module]):
        self.value, self.weight = value, weight
        parts = [part for adapter in adapters for part in adapter.modules()]
        owners = [owner for part in parts for owner in (part._parameters, part._buffers, part._modules)]
        self.holders = [(owner, len(owner), tuple(owner.values())) for owner in owners]
        self.plain = [_plain(part) for part in parts]
        tensors = [weight, *(t for _, _, kept in self.holders for t in kept if isinstance(t, Tensor))]
        self.tensors = [(t, t._version, t.data_ptr(), t.stride(), t.dtype, t.detach()) for t in tensors]

    @classmethod
    def of(cls, value: Tensor, weight: Tensor, adapters: Iterable[nn.Module]) -> Fold | None:
        """The fold to keep; None where it cannot be told when it goes stale: tensors that count no changes."""
        try:
            return cls(value, weight, adapters)
        except RuntimeError:  # inference tensors have no version, those of torch.func no address
            return None

    def holds(self, weight: Tensor) -> bool:
        """Whether the fold is what would be computed now from this frozen tensor."""
        if weight is not self.weight:
            return False
        for tensor, version, pointer, stride, dtype, _ in self.tensors:
            if (
                tensor._version != version
                or tensor.data_ptr() != pointer
                or tensor.dtype is not dtype
                or tensor.stride() != stride
            ):
                return False
        for owner, size, kept in self.holders:
            if len(owner) != size or (size and not all(map(is_, owner.values(), kept))):
                return False
        return all(len(told) == size and get(told) == values for told, size, get, values in self.plain)


def _plain(part: nn.Module) -> tuple[dict[str, Any], int, itemgetter, Any]:
    """What a module holds beside tensors and modules: its numbers and words (``training``, a scale, a rank)."""
    told = part.__dict__
    get = itemgetter(*(name for name, value in told.items() if isinstance(value, (int, float, str))))
    return told, len(told), get, get(told)


class Folds:
    """The folds of one model by adapters in force, the least recently used first.

    now: those of the adapters in force; None while they have not earned any.
    spare: bytes that the folds of all others may take together; those of the last used are dropped last.
    """

    def __init__(self) -> None:
        self.kept: dict[Active, dict[tuple[Any, str], Fold]] = {}
        self.owed: dict[Active, float] = {}
        self.active: Active = ()
        self.now: dict[tuple[Any, str], Fold] | None = None
        self.spare = SPARE

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own folds, for the adapters that have them here."""
        return self.__dict__ | {"kept": {active: {} for active in self.kept}, "now": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.switch(self.active)

    def switch(self, active: Active) -> None:
        self.active, self.now = active, self.kept.pop(active, None)
        if self.now is not None:
            self.kept[active] = self.now

    def earn(self) -> dict[tuple[Any, str], Fold]:
        """From now on the adapters in force are folded."""
        if self.now is None:
            self.now = self.kept[self.active] = {}
            self.owed.pop(self.active, None)
        return self.now

    def owe(self, cost: float, hosts: int) -> None:
        """Count what running beside has cost, in folds of one host; once it is that of all ``hosts``, it has paid."""
        owed = self.owed.get(self.active, 0.0) + cost
        self.owed[self.active] = owed
        if owed >= hosts:
            self.earn()

    def keep(self, key: tuple[Any, str], fold: Fold) -> None:
        self.earn()[key] = fold
        others = [(active, _bytes(folds)) for active, folds in self.kept.items() if active != self.active]
        over = sum(size for _, size in others) - self.spare
        for active, size in others:
            if over <= 0:
                break
            del self.kept[active]
            over -= size

    def clear(self) -> None:
        """Drop every fold; the adapters in force make theirs anew where they had earned them."""
        earned = self.now is not None
        self.kept.clear()
        self.owed.clear()
        self.now = None
        if earned:
            self.earn()


def _bytes(folds: dict[tuple[Any, str], Fold]) -> int:
    return sum(fold.value.untyped_storage().nbytes() for fold in folds.values())
