"""Linear probe: the frozen backbone as it is, only the head trains."""

from __future__ import annotations

from dataclasses import dataclass

from shared.method import Method
from shared.sites import Sites


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Adapts nothing: the floor every method is compared with."""

    def sites(self, sites: Sites) -> None:
        return None
