"""Checkpoints of published segmentors: an adapter's tensors among those of a frozen backbone and a head."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shared import weights
from shared.errors import RequestError


def adapter_of(path: str | Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors below ``backbone.<prefix>``, by what follows, and those left of backbone and head, by name.

    Raises RequestError where the file cannot be read (see ``weights.read``), holds none of the adapter's tensors, or
    one that belongs neither to ``backbone.`` nor to ``decode_head.``.
    """
    state, start = weights.read(path), f"backbone.{prefix}"
    if all(name.startswith(prefix) for name in state):  # reading takes off a prefix that all names share
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
    mine = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
    left = {name: tensor for name, tensor in state.items() if not name.startswith(start)}
    if not mine:
        raise RequestError(f"{path}: none of its {len(state)} tensors is the adapter's ({start}…)")
    if unknown := [name for name in left if not name.startswith(("backbone.", "decode_head."))]:
        raise RequestError(f"{path}: {len(unknown)} unknown tensors (first: {unknown[0]})")
    return mine, left
