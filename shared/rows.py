"""A batch whose samples use different adapters: one forward of the frozen model where that is right, else one for each.

It is right where all adapters named are low-rank changes of linear layers that are called, or bottlenecks before, after
or beside a module (``shared.stacked``), and where every host has the samples on the axis of the batch. The latter is
tried out once for each kind of input: the bare model runs on a few samples and on one fewer, and what every host is
given must shrink by that row; models that cut images into windows or put tokens first fail it. What was chosen, and
why not one forward, stands in ``state.by_rows`` after the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shared.blocks.placement import take
from shared.errors import RequestError
from shared.host import Port, calls_linear
from shared.stacked import CannotStack, Stacked, branches

TRIED = 3  # samples that the bare model is tried out on


def run_by_rows(model: Any, adapters: Sequence[str | None], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call ``model`` with each sample's own adapter (None: the bare model).

    Tensors (in nested inputs too) are batched along the model's ``batch_dim`` (0 unless its backbone says otherwise)
    where they have the batch's length there.
    """
    names, axis = list(adapters), getattr(model.backbone, "batch_dim", 0)
    first = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)), None)
    if first is None or first.ndim <= axis or first.shape[axis] != len(names):
        size = "no tensor" if first is None else f"{first.shape[axis] if first.ndim > axis else 0} samples"
        raise RequestError(f"adapters names {len(names)} samples; the batch has {size}")
    for name in dict.fromkeys(names):
        model.known(*(() if name is None else (name,)))
    with _in_force(model, ()):
        if len(set(names)) > 1:
            try:
                _check(model, names, axis, args, kwargs)
                model.state.rows, model.state.by_rows = Stacked(names, axis, first.device), "in one forward"
                return model(*args, **kwargs)
            except CannotStack as reason:
                model.state.by_rows = f"one forward an adapter: {reason}"
            finally:
                model.state.rows = None
        return _one_by_one(model, names, axis, args, kwargs)


def _one_by_one(model: Any, names: list[str | None], axis: int, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run each distinct adapter on its samples and put the outputs back in order."""
    if len(set(names)) == 1:
        model.activate(*names[:1] if names[0] is not None else ())
        model.state.by_rows = "in one forward"
        return model(*args, **kwargs)
    parts, order = [], []
    for name in dict.fromkeys(names):
        model.activate(*(() if name is None else (name,)))
        index = [i for i, n in enumerate(names) if n == name]
        given, named = _picked((args, kwargs), index, len(names), axis)
        parts.append(model(*given, **named))
        order += index
    leaves, spec = zip(*(tree_flatten(part) for part in parts), strict=True)
    back = sorted(range(len(order)), key=order.__getitem__)
    joined = [
        torch.cat(group, dim=axis).index_select(axis, torch.tensor(back, device=group[0].device))
        if isinstance(group[0], Tensor) and group[0].ndim > axis
        else group[0]
        for group in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, spec[0])


def _picked(tree: Any, index: list[int], size: int, axis: int) -> Any:
    """Of every batched tensor the samples ``index``; all others whole."""

    def pick(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == size
        return leaf.index_select(axis, torch.tensor(index, device=leaf.device)) if batched else leaf

    return tree_map(pick, tree)


def _check(model: Any, names: list[str | None], axis: int, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises CannotStack where one forward would not be what each adapter's own is."""
    state = model.state
    if torch.compiler.is_compiling():
        raise CannotStack("the model is being compiled")
    if state.merged:
        raise CannotStack("adapters are merged into the weights")
    if state.half is not None:
        raise CannotStack("the frozen weights are in half precision")
    if state.lowest or state.drawn:
        raise CannotStack("adapters of the lowest blocks rest")
    if any(module.training for module in model.backbone.modules()):
        raise CannotStack("the backbone is in training mode")
    hosts = [(model.backbone.get_submodule(path), port) for path, port in model.hosts().items()]
    for name in [name for name in dict.fromkeys(names) if name is not None and name not in state.stackable]:
        if model.methods[name].saving() is not None:
            raise CannotStack(f"adapter {name!r} keeps activations in a way of its own")
        reached = [port for host, port in hosts if branches(port, host, name)]
        acting = [len(found.get(name, ())) for port in reached for found in (port.around, *port.on.values())]
        if sum(acting) != len(model.bank[name]):
            raise CannotStack(f"adapter {name!r} has modules that act on no host")
        state.stackable.add(name)
    kind = _kind((args, kwargs), len(names), axis)
    if kind not in state.tried:
        state.tried[kind] = _tried(model, len(names), axis, args, kwargs)
    unfit = state.tried[kind]
    for _, port in hosts:
        if port in unfit and (set(port.around) | {n for on in port.on.values() for n in on}) & set(names):
            raise CannotStack(unfit[port])


def _kind(tree: Any, size: int, axis: int) -> tuple:
    """What decides how a model treats its inputs: their nesting, types and numbers of axes, and settings given beside.

    Raises CannotStack for objects that a run could change, such as a cache of keys.
    """
    leaves, spec = tree_flatten(tree)
    found: list[Any] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append((leaf.ndim, leaf.dtype, leaf.ndim > axis and leaf.shape[axis] == size))
        elif isinstance(leaf, (int, float, str, bool, type(None), torch.dtype)):
            found.append((type(leaf), leaf))
        else:
            raise CannotStack(f"the input holds a {type(leaf).__name__}")
    return tuple(found)


def _tried(model: Any, size: int, axis: int, args: tuple, kwargs: dict[str, Any]) -> dict[Port, str]:
    """The hosts that are not given one row a sample, each with what is the matter."""
    count = min(TRIED, size)
    many = _recorded(model, list(range(count)), size, axis, args, kwargs)
    fewer = _recorded(model, list(range(1, count)), size, axis, args, kwargs)
    unfit: dict[Port, str] = {}
    for port in many.given.keys() | fewer.given.keys() | many.read_of | fewer.read_of:
        pairs = many.given.get(port, []), fewer.given.get(port, [])
        if port in many.read_of:
            unfit[port] = "an adapted tensor is read without a call of its layer"
        elif len(pairs[0]) != len(pairs[1]) or not all(map(_one_less, *pairs)):
            unfit[port] = "a layer is not given one row a sample, in the batch's order"
    return unfit


def _one_less(many: Tensor | None, fewer: Tensor | None) -> bool:
    """Whether both tell of rows, and the second of all but the first row of the first."""
    if many is None or fewer is None or len(many) != len(fewer) + 1:
        return False
    return torch.allclose(many[1:], fewer, rtol=1e-2, atol=1e-3 * float(many.abs().max()))


class _Record:
    """What hosts are given in a run of the bare model: for each call two numbers that tell every row."""

    def __init__(self, axis: int, count: int):
        self.axis, self.count = axis, count
        self.given: dict[Port, list[Tensor | None]] = {}
        self.read_of: set[Port] = set()

    def read(self, port: Port, parameter: str) -> None:
        if port.on.get(parameter):
            self.read_of.add(port)

    def call(self, port: Port, host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            x = take(args, kwargs)[0]
        except RequestError:  # called with nothing that it could be given
            x = None
        self.given.setdefault(port, []).append(self._rows(x))
        read = set(self.read_of)
        output = forward(host, *args, **kwargs)
        if calls_linear(host):  # its own call reads its weight
            self.read_of = read
        return output

    def _rows(self, x: Any) -> Tensor | None:
        if not isinstance(x, Tensor) or x.ndim <= self.axis + 1 or x.shape[self.axis] != self.count:
            return None
        rows = x.movedim(self.axis, 0).reshape(self.count, -1).double()
        places = torch.arange(rows.shape[1], device=x.device, dtype=rows.dtype).mul_(0.7).cos_()
        return torch.stack([rows @ places, rows.norm(dim=1)], dim=1)


def _recorded(model: Any, index: list[int], size: int, axis: int, args: tuple, kwargs: dict[str, Any]) -> _Record:
    given, named = _picked((args, kwargs), index, size, axis)
    record, context = _Record(axis, len(index)), named.pop("context", None)
    model.state.rows = record
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.context.__dict__.update(context or {})
            model.backbone(*given, **named)
    finally:
        model.state.rows = None
        model.context.clear()
    return record


@contextmanager
def _in_force(model: Any, active: tuple) -> Iterator[None]:
    before, model.state.active = model.state.active, active
    try:
        yield
    finally:
        model.state.active = before
