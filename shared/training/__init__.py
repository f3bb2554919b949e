"""Training: optimiser, task and engine, for any modality."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.training.engine import Engine as Engine
    from shared.training.engine import fit as fit
    from shared.training.optimiser import Optimiser as Optimiser
    from shared.training.processes import launch as launch
    from shared.training.spsa import SPSA as SPSA
    from shared.training.task import Task as Task

_HOME = {
    "Engine": "shared.training.engine", "fit": "shared.training.engine",
    "Optimiser": "shared.training.optimiser", "SPSA": "shared.training.spsa", "Task": "shared.training.task",
    "launch": "shared.training.processes",
}  # fmt: skip
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'shared.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
