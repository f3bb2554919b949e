"""Hosts: how adapters act on a frozen module without replacing it or restating its forward.

A host keeps its identity, its type and its state-dict keys: only its class is swapped, for a cached subclass of the
same name whose ``forward`` runs the active adapters around the original one, and whose adapted parameters are
properties that give the changed tensor to whoever reads them. So a fused kernel, ``nn.MultiheadAttention`` or any code
that reads ``layer.weight`` without calling ``layer`` is right by construction. The stored parameter never changes
unless the adapters are merged on request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapter import Adapter, WeightAdapter
from shared.errors import RequestError
from shared.linear import CONVOLUTIONS, Piece, changed, convolution_beside, dropped, linear, linear_beside
from shared.sites import Site


class State:
    """What all hosts of one model share, so that switching costs the same whatever the depth and number of adapters.

    active: (name, strength) of the adapters in force, in order.  merged: the same for what the stored weights hold.
    form: "auto", or "separate" to keep low-rank changes beside the product.
    """

    def __init__(self) -> None:
        self.active: tuple[tuple[str, float], ...] = ()
        self.merged: tuple[tuple[str, float], ...] = ()
        self.form = "auto"


class Port:
    """The adapters of one host: around its call by adapter name, and on its tensors by parameter and adapter name."""

    def __init__(self, state: State):
        self.state = state
        self.around: dict[str, list[Adapter]] = {}
        self.on: dict[str, dict[str, list[tuple[tuple[int, int] | None, WeightAdapter]]]] = {}
        self.stored: dict[str, Tensor | None] = {}  # originals, while merged; None for a bias that had not been
        self.folded: dict[str, tuple[Any, Tensor]] = {}
        self.ran: set[int] = set()  # ids of the adapters used since last cleared: the proof of effect reads it

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"folded": {}, "ran": set()}

    def frozen(self, host: nn.Module, parameter: str) -> Tensor:
        """The tensor as it was before any merge; None for a bias that only the merge made."""
        return self.stored.get(parameter, host._parameters[parameter])  # type: ignore[return-value]

    def read(self, host: nn.Module, parameter: str) -> Tensor | None:
        """What reading the host's parameter gives: the frozen tensor changed by the active adapters."""
        state, raw = self.state, host._parameters[parameter]
        if self.stored and state.active == state.merged:
            return raw
        parts = self.parts(parameter)
        weight = self.frozen(host, parameter)
        if not parts:
            return weight
        self._record(adapter for _, rows in parts for _, adapter in rows)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return changed(weight, parts)
        return self._fold(weight, parameter, parts)

    def parts(self, parameter: str) -> list[tuple[float, list]]:
        """The active changes of a parameter in order: the strength of each, and its adapters with their rows."""
        here = self.on.get(parameter, {})
        return [(strength, here[name]) for name, strength in self.state.active if name in here]

    def _record(self, adapters) -> None:
        if not torch.compiler.is_compiling():
            self.ran.update(map(id, adapters))

    def _fold(self, weight: Tensor, parameter: str, parts) -> Tensor:
        """The changed tensor, computed once and kept until anything it depends on changes."""
        stamp = [_stamp(weight), self.state.active]
        for _, rows in parts:
            for _, adapter in rows:
                stamp += [_stamp(t) for t in (*adapter.parameters(), *adapter.buffers())]
                stamp.append(tuple(v for v in adapter.__dict__.values() if isinstance(v, (int, float, str))))
        kept = self.folded.get(parameter)
        if kept is None or not _same(kept[0], stamp):
            with torch.inference_mode(False), torch.no_grad():
                kept = self.folded[parameter] = (stamp, changed(weight, parts))
        return kept[1]

    def pieces(self, parameter: str) -> list[Piece] | None:
        """The active changes of a parameter as factors, or None where one has none; empty where none is active."""
        found: list[Piece] = []
        for strength, parts in self.parts(parameter):
            for rows, adapter in parts:
                factors = adapter.factors()
                if factors is None:
                    return None
                down, up, scale, dropout = factors
                found.append(Piece(rows, down, up, scale * strength, dropout))
                self._record((adapter,))
        return found

    def store(self, host: nn.Module, parameter: str, value: Tensor) -> None:
        """Put ``value`` in the stored parameter's place and keep a copy: with other adapters active, that is read."""
        raw = host._parameters[parameter]
        self.stored[parameter] = None if raw is None else raw.detach().clone()
        if raw is None:
            host._parameters[parameter] = nn.Parameter(value, requires_grad=False)
        else:
            raw.copy_(value)
        self.on.setdefault(parameter, {})
        _become_host(host, self)

    def restore(self, host: nn.Module) -> None:
        """Undo every ``store``, bit for bit."""
        for parameter, original in self.stored.items():
            if original is None:
                host._parameters[parameter] = None
            else:
                host._parameters[parameter].copy_(original)  # type: ignore[union-attr]
        self.stored.clear()
        self.on = {parameter: by_name for parameter, by_name in self.on.items() if by_name}
        _become_host(host, self)

    def call(self, host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's forward inside its active adapters; the first active is the innermost."""
        run: Callable[..., Any] = functools.partial(forward, host)
        if self.state.active == self.state.merged:
            return run(*args, **kwargs)
        for name, strength in self.state.active:
            for adapter in self.around.get(name, ()):
                if strength != 1.0 and not adapter.additive:
                    raise RequestError(f"adapter {name!r} acts on activations and takes no strength (got {strength:g})")
                self._record((adapter,))
                whole_or_part = adapter if strength == 1.0 else functools.partial(adapter.part, strength)
                run = functools.partial(whole_or_part, run)
        return run(*args, **kwargs)


def shown(module: nn.Module, output: Tensor) -> Tensor:
    """Let a host's active adapters, which only read (``Adapter.observes``), see what it gave before; it is not run."""
    port = module.__dict__.get("_port")
    return output if port is None else port.call(module, lambda host: output, (), {})


def _stamp(tensor: Tensor) -> tuple:
    # The tensor itself is kept, so its identity cannot be reused while the stamp lives.
    return tensor, tensor._version, tensor.data_ptr(), tensor.dtype


def _same(old: list, new: list) -> bool:
    if len(old) != len(new):
        return False
    for a, b in zip(old, new, strict=True):
        if a and b and isinstance(a[0], Tensor) and isinstance(b[0], Tensor):
            if a[0] is not b[0] or a[1:] != b[1:]:
                return False
        elif a != b:
            return False
    return True


def attach(site: Site, adapter: Adapter | WeightAdapter, name: str, state: State) -> None:
    """Put an adapter on a site's module, under ``name``; the module becomes a host if it is not one yet."""
    if isinstance(adapter, WeightAdapter):
        _check_weight_site(site, adapter)
    host = site.module
    port = host.__dict__.get("_port")
    if port is None:
        port = host.__dict__["_port"] = Port(state)
    elif port.state is not state:
        raise RequestError(
            f"site {site.key}: its module already belongs to another adapted model; detach that one first"
        )
    if isinstance(adapter, WeightAdapter):
        port.on.setdefault(str(site.parameter), {}).setdefault(name, []).append((site.rows, adapter))
    else:
        port.around.setdefault(name, []).append(adapter)
        if _stay_called not in host._forward_pre_hooks.values():
            host.register_forward_pre_hook(_stay_called)
    _become_host(host, port)


def _stay_called(host: nn.Module, args: tuple) -> None:
    """Does nothing: torch's fused encoder layer bypasses its children unless one of them has a hook."""


def _check_weight_site(site: Site, adapter: WeightAdapter) -> None:
    site.weight  # noqa: B018  raises where the site has none
    called = isinstance(site.module, (nn.Linear, *CONVOLUTIONS)) and not isinstance(
        site.module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    if adapter.dropout and not called:
        raise RequestError(
            f"site {site.key}: dropout {adapter.dropout:g} cannot act on {site.parameter} of "
            f"{type(site.module).__name__}, whose weight is read without a call; use dropout 0"
        )


def detach(host: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off a host; the last one gone, the module has its own class again."""
    port = host.__dict__["_port"]
    port.around.pop(name, None)
    for by_name in port.on.values():
        by_name.pop(name, None)
    port.on = {parameter: by_name for parameter, by_name in port.on.items() if by_name}
    port.folded.clear()
    if not port.around:
        for key in [key for key, hook in host._forward_pre_hooks.items() if hook is _stay_called]:
            del host._forward_pre_hooks[key]
    if port.around or port.on:
        _become_host(host, port)
    else:
        host.__class__ = type(host)._host_of  # type: ignore[attr-defined]
        del host.__dict__["_port"]


def _become_host(host: nn.Module, port: Port) -> None:
    original = getattr(type(host), "_host_of", type(host))
    host.__class__ = _host_class(original, tuple(sorted(port.on)))


@functools.cache
def _host_class(original: type, parameters: tuple[str, ...]) -> type:
    """A subclass of the same name: adapted parameters become properties, the call runs inside the adapters."""
    inner = original.forward
    if "weight" in parameters and inner is nn.Linear.forward:
        inner = _linear_forward
    elif "weight" in parameters and inner in {kind.forward for kind in CONVOLUTIONS}:
        inner = functools.partial(_convolution_forward, original.forward)

    def forward(self, *args, **kwargs):
        return self.__dict__["_port"].call(self, inner, args, kwargs)

    def new(kind, *args, **kwargs):
        return original(*args, **kwargs)  # code that builds another layer of a host's type gets one without adapters

    def reduce(self, protocol):
        return _restore, (original, parameters), self.__dict__.copy()

    members: dict[str, Any] = {name: _adapted_parameter(name) for name in parameters}
    members |= {"forward": forward, "__reduce_ex__": reduce, "_host_of": original, "__module__": original.__module__}
    members |= {"__qualname__": original.__qualname__, "__doc__": original.__doc__, "__new__": new}
    return type(original.__name__, (original,), members)


def _restore(original: type, parameters: tuple[str, ...]) -> nn.Module:
    return object.__new__(_host_class(original, parameters))  # type: ignore[return-value]


def _adapted_parameter(name: str) -> property:
    return property(lambda self: self.__dict__["_port"].read(self, name))


def _beside(port: Port, training: bool) -> list[Piece] | None:
    """The factors to apply beside or inside the product in this call; none where reading the weight does it all.

    None where a change has a dropout in this call and not all are factors: see ``dropped``.
    """
    pieces = port.pieces("weight")
    if port.stored and port.state.active == port.state.merged:
        return []
    adapters = [adapter for _, parts in port.parts("weight") for _, adapter in parts] if pieces is None else []
    if training and any(adapter.dropout for adapter in adapters):
        port._record(adapters)
        return None
    if not pieces:
        return []
    dropout = training and any(piece.dropout for piece in pieces)
    if port.state.form == "separate" or dropout:
        return pieces
    return pieces if torch.is_grad_enabled() and not torch.compiler.is_compiling() else []


def _linear_forward(host: nn.Linear, x: Tensor) -> Tensor:
    port, training = host.__dict__["_port"], _training(host)
    pieces = _beside(port, training)
    if pieces is None:
        return dropped(F.linear, x, port.frozen(host, "weight"), host.bias, port.parts("weight"))
    if not pieces:
        return F.linear(x, host.weight, host.bias)
    weight = port.frozen(host, "weight")
    fused = port.state.form == "auto" and not (training and any(p.dropout for p in pieces))
    if fused and not torch.is_autocast_enabled(x.device.type):
        return linear(x, weight, host.bias, pieces)
    return linear_beside(x, F.linear(x, weight, host.bias), pieces, training)


def _convolution_forward(original: Callable[..., Tensor], host: Any, x: Tensor) -> Tensor:
    port, training = host.__dict__["_port"], _training(host)
    pieces = _beside(port, training)
    if pieces is None:
        return dropped(host._conv_forward, x, port.frozen(host, "weight"), host.bias, port.parts("weight"))
    if not pieces:
        return original(host, x)
    y = host._conv_forward(x, port.frozen(host, "weight"), host.bias)
    return convolution_beside(host, x, y, pieces, training)


def _training(host: nn.Module) -> bool:
    """Whether the adapters of this host train: the host itself stays in eval mode."""
    port = host.__dict__["_port"]
    return any(adapter.training for rows in port.on["weight"].values() for _, adapter in rows)
