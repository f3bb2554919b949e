"""Full fine-tuning: every weight of the backbone trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.method import Method
from shared.sites import Sites
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """The whole backbone trains and leaves eval mode: the reference every method is compared with."""

    trains_backbone: ClassVar[bool] = True
    record: ClassVar[Record] = Record(
        categories=("reference",), acts_on="weights", form="in place", mergeable="no", trains="0",
        why="the formula counts adapters: here all weights of the backbone train",
    )  # fmt: skip

    def sites(self, sites: Sites) -> None:
        return None
