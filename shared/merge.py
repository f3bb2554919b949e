"""Merging: adapters written into the stored weights, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError
from shared.host import Port


def merge(model: Any) -> None:
    """Store what reading each adapted parameter gives now, and what adapters around a host make of its parameters.

    A copy of each frozen tensor is kept, and the adapters are read in eval mode. Raises RequestError where an active
    adapter acts on activations and has no merged form; nothing is changed then.
    """
    unmerge(model)
    with torch.no_grad(), evaluating(model.bank):
        hosts = [(path, model.backbone.get_submodule(path), port) for path, port in model.hosts().items()]
        values = [(host, port, _values(model.state.active, path, host, port)) for path, host, port in hosts]
        for host, port, tensors in values:
            for name, value in tensors.items():
                port.store(host, name, value)
    model.state.merged = model.state.active


def unmerge(model: Any) -> None:
    """Copy the frozen weights back."""
    with torch.no_grad():
        for path, port in model.hosts().items():
            if port.stored:
                port.restore(model.backbone.get_submodule(path))
    model.state.merged = ()


@contextmanager
def evaluating(bank: nn.Module) -> Iterator[None]:
    """Adapters in eval mode within it, each in its own again after it."""
    modes = [(module, module.training) for module in bank.modules()]
    bank.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _values(active: tuple[tuple[str, float], ...], path: str, host: nn.Module, port: Port) -> dict[str, Tensor]:
    """The tensors of one host that the active adapters change, as they will be stored."""
    found: dict[str, Tensor] = {
        name: port.read(host, name).clone()  # type: ignore[union-attr]
        for name, adapters in port.on.items()
        if adapters.keys() & dict(active).keys()
    }
    for name, strength in active:
        for adapter in port.around.get(name, ()):
            if port.rests(adapter):
                continue
            change = adapter.merged({**host._parameters, **found})
            if change is None or (strength != 1.0 and not adapter.additive):
                raise RequestError(
                    f"adapter {name!r} cannot be merged: it acts on activations at {path or 'the model'}"
                    + ("" if change is None else f" and takes no strength (got {strength:g})")
                )
            for parameter, value in change.items():
                before = found.get(parameter, host._parameters[parameter])
                found[parameter] = _part(before, value, strength).to(_dtype(host))
    return found


def _part(before: Tensor | None, after: Tensor, strength: float) -> Tensor:
    return strength * after if before is None else torch.lerp(before.to(after.dtype), after, strength)


def _dtype(host: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in host._parameters.values() if parameter is not None)
