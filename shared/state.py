"""What all hosts of one model share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from shared.folds import Active, Folds

if TYPE_CHECKING:
    from shared.host import Port


class State:
    """What all hosts of one model share, so that switching costs the same whatever the depth and number of adapters.

    active: (name, strength) of the adapters in force, in order.  merged: the same for what the stored weights hold.
    form: "auto", or "separate" to keep low-rank changes beside the product.  folds: what inference keeps.
    half: precision of the frozen products (``shared.half``), None: that of the weights as they came.
    rows: in a call whose samples have adapters of their own, how hosts are to run; by_rows: how the last such call ran;
    tried: by kind of input, the hosts that are not given one row a sample; stackable: names of adapters that can run so
    (see ``shared.rows``).
    hosts: how many there are.
    lowest: blocks, from the first, whose adapters rest.  drawn: as many of those in training mode, in this step, of
    0 to ``most``.
    """

    def __init__(self) -> None:
        self._active: Active = ()
        self.merged: Active = ()
        self.form = "auto"
        self.half: torch.dtype | None = None
        self.folds = Folds()
        self.rows: Rows | None = None
        self.by_rows = ""
        self.tried: dict[tuple, dict[Port, str]] = {}
        self.stackable: set[str] = set()
        self.hosts = 0
        self.lowest, self.drawn, self.most = 0, 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tried": {}, "rows": None}

    def renew(self) -> None:
        """Forget what followed from the hosts and adapters as they were."""
        self.folds.clear()
        self.tried.clear()
        self.stackable.clear()

    @property
    def active(self) -> Active:
        return self._active

    @active.setter
    def active(self, active: Active) -> None:
        self._active = active
        self.folds.switch(active)


class Rows(Protocol):
    """How hosts run where each row of the batch has its own adapter."""

    def call(self, port: Port, host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any: ...

    def read(self, port: Port, parameter: str) -> None:
        """Called where an adapted parameter is read as a tensor."""
