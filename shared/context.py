"""Context: what one call tells the adapters beside the tensors that flow through the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


class Context:
    """Named values of the call in progress: the token grid, a side network's maps, camera rays, number of frames ...

    One object is shared by a backbone and the adapters on it; the backbone and outer adapters write, inner adapters
    read, and the adapted model clears it when the call ends. Reading a name nobody wrote is an error that says so.
    """

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(vars(self))) or "nothing"
        raise AttributeError(
            f"the context of this call holds no {name!r} (it holds {known}): whoever provides it did not run"
        )

    @contextmanager
    def behind(self, name: str, tokens: Tensor) -> Iterator[None]:
        """Within the block ``name`` holds what it held, with ``tokens`` (n, ...) behind it."""
        told = vars(self)
        outer = told.get(name)
        told[name] = tokens if outer is None else torch.cat([outer, tokens.to(outer)])
        try:
            yield
        finally:
            if outer is None:
                del told[name]
            else:
                told[name] = outer

    def clear(self) -> None:
        self.__dict__.clear()
