"""What a recipe says of the cache."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shared.errors import RequestError

Precision = Literal["exact", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """How the frozen prefix is kept.

    precision: "exact" (every bit as computed: training gives the weights it gives without a cache), "float16", or
    "int8" (codes of 8 bits with a scale for each 64 channels of a token).
    views: how many augmentations each training sample has; epoch e trains on number e modulo ``views``, so the first
    ``views`` epochs fill the cache.
    gigabytes: of 10^9 bytes, the most that ``folder`` may hold, of all models together; what does not fit any more is
    computed each time.
    folder: where; runs share it, for what is found there is always right.
    """

    precision: Precision = "float16"
    views: int = 1
    gigabytes: float = 20.0
    folder: str = "runs/cache"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise RequestError(f"cache precision {self.precision!r}: use {', '.join(get_args(Precision))}")
        if type(self.views) is not int or self.views < 1:
            raise RequestError(f"cache views {self.views!r}: use a whole number of augmentations, at least 1")
        if type(self.gigabytes) not in (int, float) or not self.gigabytes > 0:
            raise RequestError(f"cache gigabytes {self.gigabytes!r}: use a number above 0")
        if not isinstance(self.folder, str) or not self.folder:
            raise RequestError(f"cache folder {self.folder!r}: give the path of a folder")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Cache:
        """As a recipe spells it. Raises RequestError that names a key that is unknown or has no fit value."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; nearest: {near[0]!r}" if near else f" (it has: {', '.join(known)})"
                raise RequestError(f"trainer.cache.{key}: no such setting{hint}")
        try:
            return cls(**given)
        except RequestError as error:
            raise RequestError(f"trainer.{str(error).replace('cache ', 'cache.', 1)}") from None
