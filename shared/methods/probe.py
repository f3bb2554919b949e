"""Linear probe: the frozen backbone as it is, only the head trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.method import Method
from shared.sites import Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Adapts nothing: the floor every method is compared with."""

    record: ClassVar[Record] = Record(
        categories=("reference",), acts_on="nothing", form="none", mergeable="no", trains="0", backward=False
    )

    def sites(self, sites: Sites) -> None:
        return None
