"""Full fine-tuning: every weight of the backbone trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.method import Method
from shared.sites import Sites


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """The whole backbone trains and leaves eval mode: the reference every method is compared with."""

    trains_backbone: ClassVar[bool] = True

    def sites(self, sites: Sites) -> None:
        return None
