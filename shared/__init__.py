"""The adapter core of omniadapt: adapters, sites, methods and files, for any modality.

Names are loaded when first used, so that a command line can answer before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.adapted import Adapted as Adapted
    from shared.adapted import adapt as adapt
    from shared.adapted import trainable as trainable
    from shared.adapter import Adapter as Adapter
    from shared.adapter import WeightAdapter as WeightAdapter
    from shared.backbone import Backbone as Backbone
    from shared.errors import RequestError as RequestError
    from shared.errors import WorkError as WorkError
    from shared.method import Method as Method
    from shared.methods import LoRA as LoRA
    from shared.run import load as load
    from shared.sites import Site as Site
    from shared.sites import Sites as Sites
    from shared.taxonomy import Record as Record

_HOME = {
    "Adapted": "shared.adapted", "adapt": "shared.adapted", "trainable": "shared.adapted",
    "Adapter": "shared.adapter", "WeightAdapter": "shared.adapter", "Backbone": "shared.backbone",
    "RequestError": "shared.errors", "WorkError": "shared.errors", "Method": "shared.method",
    "LoRA": "shared.methods", "Site": "shared.sites", "Sites": "shared.sites",
    "Record": "shared.taxonomy", "load": "shared.run",
}  # fmt: skip
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'shared' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
