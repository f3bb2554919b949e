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
from shared.convolution import CONVOLUTIONS, convolution, convolution_beside, fits
from shared.errors import RequestError
from shared.folds import Fold
from shared.half import changed_exactly, convolution_in_half, in_full, in_half, linear_in_half
from shared.linear import Piece, by_hand, changed, dropped, linear, linear_beside
from shared.state import State

FOLD = 2  # making a fold costs what running beside I*O/(I+O) tokens costs, times this (measured: 1.5 to 3.5)


class Port:
    """The adapters of one host: around its call by adapter name, and on its tensors by parameter and adapter name.

    depth: index of the block it belongs to, -1 where it belongs to none.
    """

    def __init__(self, state: State, depth: int = -1):
        self.state, self.depth = state, depth
        self.around: dict[str, list[Adapter]] = {}
        self.on: dict[str, dict[str, list[tuple[tuple[int, int] | None, WeightAdapter]]]] = {}
        self.stored: dict[str, Tensor | None] = {}  # originals, while merged; None for a bias that had not been
        self.ran: set[int] = set()  # ids of the adapters used since last cleared: the proof of effect reads it

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ran": set()}

    def frozen(self, host: nn.Module, parameter: str) -> Tensor:
        """The tensor as it was before any merge; None for a bias that only the merge made."""
        return self.stored.get(parameter, host._parameters[parameter])  # type: ignore[return-value]

    def read(self, host: nn.Module, parameter: str) -> Tensor | None:
        """What reading the host's parameter gives: the frozen tensor changed by the active adapters."""
        state, raw = self.state, host._parameters[parameter]
        if state.rows is not None:
            state.rows.read(self, parameter)
        if self.stored and state.active == state.merged:
            return raw
        parts = self.parts(parameter)
        weight = self.frozen(host, parameter)
        if not parts or (weight.is_meta and not _on_meta(parts)):  # offloaded until its turn: nothing to change
            return weight
        self._record(adapter for _, rows in parts for _, adapter in rows)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._changed(weight, parts)
        return self._fold(weight, parameter, parts)

    def parts(self, parameter: str) -> list[tuple[float, list]]:
        """The active changes of a parameter in order: the strength of each, and its adapters with their rows."""
        here = self.on.get(parameter, {})
        active = [(name, strength) for name, strength in self.state.active if name in here]
        return [(strength, here[name]) for name, strength in active if not self.rests(here[name][0][1])]

    def rests(self, adapter: nn.Module) -> bool:
        """Whether an adapter of this host is left out for now, as of a block that is too low."""
        drawn = self.state.drawn if adapter.training else 0
        return 0 <= self.depth < max(self.state.lowest, drawn)

    def _record(self, adapters) -> None:
        if not torch.compiler.is_compiling():
            self.ran.update(map(id, adapters))

    def _changed(self, weight: Tensor, parts) -> Tensor:
        return changed_exactly(weight, parts) if self.state.half else changed(weight, parts)

    def _fold(self, weight: Tensor, parameter: str, parts) -> Tensor:
        """The changed tensor, computed once and kept until anything it depends on changes."""
        kept = self.state.folds.now
        fold = None if kept is None else kept.get((self, parameter))
        if fold is not None and fold.holds(weight):
            return fold.value
        with torch.inference_mode(False), torch.no_grad():
            value = self._changed(weight, parts)
        if (fold := Fold.of(value, weight, [adapter for _, rows in parts for _, adapter in rows])) is not None:
            self.state.folds.keep((self, parameter), fold)
        return value

    def _infer(self, host: nn.Linear, x: Tensor) -> Tensor | None:
        """The output of a linear host without gradients: folded, or beside it while a fold has not paid.

        None where ``_linear_forward`` must see to it.
        """
        folds, weight = self.state.folds, self.frozen(host, "weight")
        if folds.now is not None:
            fold = folds.now.get((self, "weight"))
            if fold is None or not fold.holds(weight):
                return None
            return F.linear(x, fold.value, host.bias if "bias" in self.on else host._parameters["bias"])
        if _training(host) or not (pieces := self.pieces("weight")):
            return None
        outputs, inputs = weight.shape
        folds.owe(x.numel() / inputs * (inputs + outputs) / (FOLD * inputs * outputs), self.state.hosts)
        return linear_beside(x, F.linear(x, weight, host.bias), pieces, False)

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
        become_host(host, self)

    def restore(self, host: nn.Module) -> None:
        """Undo every ``store``, bit for bit."""
        for parameter, original in self.stored.items():
            if original is None:
                host._parameters[parameter] = None
            else:
                host._parameters[parameter].copy_(original)  # type: ignore[union-attr]
        self.stored.clear()
        self.on = {parameter: by_name for parameter, by_name in self.on.items() if by_name}
        become_host(host, self)

    def call(self, host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The host's forward inside its active adapters; the first active is the innermost."""
        state = self.state
        if state.rows is not None:
            return state.rows.call(self, host, forward, args, kwargs)
        if state.active == state.merged:
            return forward(host, *args, **kwargs)
        if forward is _linear_forward and not self.around and len(args) == 1 and _infers(state):
            y = self._infer(host, args[0])  # type: ignore[arg-type]
            if y is not None:
                return y
        run: Callable[..., Any] = functools.partial(forward, host)
        for name, strength in state.active:
            for adapter in self.around.get(name, ()):
                if self.rests(adapter):
                    continue
                if strength != 1.0 and not adapter.additive:
                    raise RequestError(f"adapter {name!r} acts on activations and takes no strength (got {strength:g})")
                self._record((adapter,))
                whole_or_part = adapter if strength == 1.0 else functools.partial(adapter.part, strength)
                half = self.state.half
                run = (
                    functools.partial(in_full, whole_or_part, run, half)
                    if half
                    else functools.partial(whole_or_part, run)
                )
        return run(*args, **kwargs)


def shown(module: nn.Module, output: Tensor) -> Tensor:
    """Let a host's active adapters, which only read (``Adapter.observes``), see what it gave before; it is not run."""
    port = module.__dict__.get("_port")
    return output if port is None else port.call(module, lambda host: output, (), {})


def _on_meta(parts) -> bool:
    return all(tensor.is_meta for _, rows in parts for _, adapter in rows for tensor in adapter.parameters())


def _infers(state: State) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return state.form == "auto" and state.half is None


def calls_linear(host: nn.Module) -> bool:
    """Whether the host is a linear layer that is called: torch's attention reads its output projection without."""
    original = getattr(type(host), "_host_of", type(host))
    return original.forward is nn.Linear.forward and not issubclass(
        original, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


def become_host(host: nn.Module, port: Port) -> None:
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


def _beside(port: Port, training: bool, half: bool) -> list[Piece] | None:
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
    if port.state.form == "separate" or half or (training and any(piece.dropout for piece in pieces)):
        return pieces
    return pieces if torch.is_grad_enabled() and not torch.compiler.is_compiling() else []


def _linear_forward(host: nn.Linear, x: Tensor) -> Tensor:
    port, training, half = host.__dict__["_port"], _training(host), in_half(host)
    pieces, weight = _beside(port, training, half), port.frozen(host, "weight")
    if pieces is None:
        return dropped(F.linear, x, weight, host.bias, port.parts("weight"))
    if not pieces:
        return F.linear(x, host.weight, host.bias)
    if half:
        return linear_in_half(x, weight, host.bias, pieces, training)
    if by_hand(x, pieces, port.state.form, training):
        return linear(x, weight, host.bias, pieces)
    return linear_beside(x, F.linear(x, weight, host.bias), pieces, training)


def _convolution_forward(original: Callable[..., Tensor], host: Any, x: Tensor) -> Tensor:
    port, training, half = host.__dict__["_port"], _training(host), in_half(host)
    pieces, weight = _beside(port, training, half), port.frozen(host, "weight")
    if pieces is None:
        return dropped(host._conv_forward, x, weight, host.bias, port.parts("weight"))
    if not pieces:
        return original(host, x)
    if half:
        return convolution_in_half(host, x, host._conv_forward(x, weight, host.bias), pieces, training)
    if by_hand(x, pieces, port.state.form, training) and fits(host, x, pieces):
        return convolution(host, x, weight, pieces)
    return convolution_beside(host, x, host._conv_forward(x, weight, host.bias), pieces, training)


def _training(host: nn.Module) -> bool:
    """Whether the adapters of this host train: the host itself stays in eval mode."""
    port = host.__dict__["_port"]
    return any(adapter.training for rows in port.on["weight"].values() for _, adapter in rows)
