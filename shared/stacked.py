"""A batch whose rows have different adapters in one forward of the frozen model: the branches by batched products.

B rows, T positions of a row, I inputs, O outputs, w the greatest width or rank among the adapters; narrower ones are
padded with zeros. The branches of a host are stacked when it runs, from the adapters as they are then, and let go after
it: nothing can be stale, nothing stays in memory, and gradients reach every adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from shared.adapter import Branch
from shared.blocks.bottleneck import ACTIVATIONS
from shared.blocks.placement import on_output, take
from shared.host import Port, calls_linear

LINEAR = "linear"  # the place of a low-rank change of a linear layer's weight: beside it, in the input's precision


class CannotStack(Exception):
    """Says why a batch cannot run in one forward; it then runs once for each adapter."""


def branches(port: Port, host: nn.Module, name: str) -> list[Branch]:
    """What the adapter ``name`` does at a host; several branches are parts of one change of a fused projection's rows.

    Raises CannotStack where it does something else too.
    """
    found: list[Branch] = []
    for adapter in port.around.get(name, ()):
        if (branch := adapter.as_branch()) is None:
            raise CannotStack(f"adapter {name!r} has a {type(adapter).__name__}, which is no plain branch")
        found.append(branch._replace(dropout=branch.dropout if adapter.training else 0.0))
    for parameter, by_name in port.on.items():
        if name not in by_name:
            continue
        if parameter != "weight" or not calls_linear(host):
            raise CannotStack(f"adapter {name!r} changes {parameter} of a {type(host).__name__}, not a linear layer's")
        for rows, adapter in by_name[name]:
            if (factors := adapter.factors()) is None:
                raise CannotStack(f"adapter {name!r} has a {type(adapter).__name__}, whose change is no two factors")
            down, up, scale, dropout = factors
            dropout = dropout if adapter.training else 0.0
            found.append(Branch(LINEAR, rows, down, None, "none", up, None, scale, dropout))
    parts = sorted(branch.rows or (0, 0) for branch in found)
    apart = all(branch.rows for branch in found) and all(a[1] <= b[0] for a, b in pairwise(parts))
    if len(found) > 1 and not (apart and len({branch.place for branch in found}) == 1):
        raise CannotStack(f"adapter {name!r} acts on one {type(host).__name__} in more than one way")
    if any(branch.dropout for branch in found):
        raise CannotStack(f"adapter {name!r} drops inputs in training")
    return found


class Stacked:
    """How hosts run in such a call. names: of the rows' adapters, None for the bare model.  axis: of the rows."""

    def __init__(self, names: Sequence[str | None], axis: int, device: torch.device):
        self.names, self.axis, self.device = names, axis, device
        self.distinct = list(dict.fromkeys(name for name in names if name is not None))
        self.places: dict[tuple[str, ...], Tensor] = {}

    def read(self, port: Port, parameter: str) -> None:
        if port.on.get(parameter, {}).keys() & set(self.distinct):
            raise CannotStack(f"an adapted {parameter} is read without a call of its layer")

    def call(self, port: Port, host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host on all rows, each with its adapter's branches."""
        groups: dict[tuple, dict[str, Branch]] = {}
        for name in self.distinct:
            if name in port.around or any(name in by_name for by_name in port.on.values()):
                for branch in branches(port, host, name):
                    dtype = None if branch.place == LINEAR else branch.down.dtype
                    groups.setdefault((branch.place, branch.rows, branch.activation, dtype), {})[name] = branch
        if not groups:
            return forward(host, *args, **kwargs)
        x, rest, kwargs = take(args, kwargs)
        self._check(x)
        given = x
        for (place, *_), group in groups.items():
            if place == "before":
                x = self._added(x, x, None, group)
        if calls_linear(host) and "weight" in port.on:
            y = F.linear(x, port.frozen(host, "weight"), host.bias)  # type: ignore[arg-type]
            for (place, rows, *_), group in groups.items():
                if place == LINEAR:
                    y = self._added(y, x, rows, group, fresh=not torch.is_grad_enabled())
        else:
            y = forward(host, x, *rest, **kwargs)
        return on_output(y, lambda y: self._after(y, given, groups))

    def _after(self, y: Tensor, x: Tensor, groups: dict[tuple, dict[str, Branch]]) -> Tensor:
        before = y
        for (place, rows, *_), group in groups.items():
            if place in ("after", "beside"):
                self._check(y)
                part = before if rows is None else before[..., slice(*rows)]
                y = self._added(y, x if place == "beside" else part, rows, group)
        return y

    def _check(self, x: Tensor) -> None:
        if x.ndim <= self.axis + 1 or x.shape[self.axis] != len(self.names):
            raise CannotStack(f"a layer is given {tuple(x.shape)}, which has no axis of {len(self.names)} rows")

    def _added(
        self, y: Tensor, x: Tensor, rows: tuple[int, int] | None, group: dict[str, Branch], fresh: bool = False
    ) -> Tensor:
        """``y`` plus the branches of ``x``, each row with its own. fresh: y is nobody else's and may be changed."""
        members, own = list(group.values()), self._places(tuple(group))
        x, out = self._rows_first(x), self._rows_first(y)  # (B, T, I), (B, T, O)
        dtype = x.dtype if members[0].place == LINEAR else members[0].down.dtype
        down = self._stack([m.down for m in members], own, dtype)  # (B, w, I)
        up = self._stack([m.up * m.scale for m in members], own, dtype)  # (B, w, O)
        h = torch.bmm(down, x.to(dtype).transpose(1, 2))  # (B, w, T): the narrow side first
        if any(m.down_bias is not None for m in members):
            h = h + self._bias([m.down_bias for m in members], members, 0, own, dtype)[:, :, None]
        h = ACTIVATIONS[members[0].activation](h).transpose(1, 2)
        bias = None
        if any(m.up_bias is not None for m in members):
            bias = self._bias([m.up_bias for m in members], members, 1, own, dtype)[:, None]  # (B, 1, O)
        a, b = rows or (0, out.shape[-1])
        if fresh and self.axis == 0 and y.is_contiguous() and bias is None and y.dtype is dtype:
            out[..., a:b].baddbmm_(h, up)
            return y
        if bias is None and rows is None and y.dtype is dtype:
            changed = torch.baddbmm(out, h, up)
        else:
            change = torch.bmm(h, up) if bias is None else torch.baddbmm(bias, h, up)
            part = out[..., a:b] + change.to(y.dtype)
            changed = part if rows is None else torch.cat([out[..., :a], part, out[..., b:]], dim=-1)
        return changed.reshape(y.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def _rows_first(self, x: Tensor) -> Tensor:
        return x.movedim(self.axis, 0).reshape(len(self.names), -1, x.shape[-1])

    def _places(self, group: tuple[str, ...]) -> Tensor:
        """(B,): where each row's adapter stands in the group's stack; behind its end where it has none there."""
        if group not in self.places:
            at = {name: i for i, name in enumerate(group)}
            places = [at.get(name, len(group)) for name in self.names]  # type: ignore[arg-type]
            self.places[group] = torch.tensor(places, device=self.device)
        return self.places[group]

    @staticmethod
    def _stack(tensors: list[Tensor], own: Tensor, dtype: torch.dtype) -> Tensor:
        """Of (w_i, n) each to (B, w, n), with zeros below and for rows without an adapter."""
        none = tensors[0].new_zeros(1, *tensors[0].shape[1:])
        return pad_sequence([*tensors, none], batch_first=True)[own].to(dtype)

    @staticmethod
    def _bias(given: list[Tensor | None], members: list[Branch], axis: int, own: Tensor, dtype: torch.dtype) -> Tensor:
        """The biases of the down (axis 0) or up layers as (B, w) or (B, O), those of up scaled as the branch is."""
        filled = []
        for bias, member in zip(given, members, strict=True):
            size = (member.down.shape[0], member.up.shape[1])[axis]
            value = member.down.new_zeros(size) if bias is None else bias
            filled.append(value * member.scale if axis else value)
        return Stacked._stack(filled, own, dtype)
