"""Methods: a published way to adapt, as where it acts and what it puts there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from shared.adapter import Adapter, WeightAdapter
from shared.sites import Site, Sites


@dataclass(frozen=True, kw_only=True)
class Method:
    """The life of a method; a subclass is a frozen dataclass whose fields are its whole configuration.

    Only ``sites`` and ``build`` (or ``build_all``) are needed. ``adapters`` below are the modules of one attached
    adapter, by site key.
    """

    trains_backbone: ClassVar[bool] = False

    def sites(self, sites: Sites) -> Sites | None:
        """Where to act; None says "nowhere, on purpose" (an empty selection is an error)."""
        raise NotImplementedError(f"{type(self).__name__} selects no sites")

    def build(self, site: Site) -> Adapter | WeightAdapter:
        """The module for one site."""
        raise NotImplementedError(f"{type(self).__name__} builds nothing")

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        """The modules of all sites by key; override it where sites share modules or depend on their order."""
        return {site.key: self.build(site) for site in sites}

    def step(self, adapters: Mapping[str, nn.Module], number: int) -> None:
        """Called before each training step, for schedules."""

    def penalty(self, adapters: Mapping[str, nn.Module]) -> Tensor | None:
        """An extra loss of the step, or None."""

    def arguments(self) -> dict[str, Any]:
        """The configuration, JSON-able: what an adapter file records."""
        return dataclasses.asdict(self)
