"""Adapters: a function around a frozen module, or a change of a frozen tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from shared.context import Context


class Branch(NamedTuple):
    """A small computation at a host, ``scale * (act(x @ down.T + down_bias) @ up + up_bias)``, and where it goes.

    place: "before" (added to the host's input), "after" (to its output, from that) or "beside" (to its output, from its
    input).  rows: the range of the output's last axis that an "after" or "beside" is about, None: all of it.
    down: (width, inputs).  up: (width, outputs).  activation: a name of ``shared.blocks.bottleneck.ACTIVATIONS``.
    dropout: probability on its input, in training.
    """

    place: str
    rows: tuple[int, int] | None
    down: Tensor
    down_bias: Tensor | None
    activation: str
    up: Tensor
    up_bias: Tensor | None
    scale: float | Tensor
    dropout: float


class Adapter(nn.Module):
    """A function around a frozen module: parallel, sequential, replacing, whatever its ``forward`` says.

    ``base`` is the frozen computation (with the adapters attached earlier already around it); calling it is optional.
    ``self.context`` holds what this call tells its adapters.

    additive: whether it adds to what ``base`` gives for the very arguments of the call, one tensor; only then is a
    strength other than 1 defined, as that part of what it adds.
    observes: whether it gives what ``base`` gives, for the very arguments of the call, and only reads that: what is
    frozen around it can then be kept (``shared.cache``).
    """

    additive: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.context = Context()

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def part(self, strength: float, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``base`` plus ``strength`` times what an additive adapter adds to it."""
        bare = base(*args, **kwargs)
        return bare + strength * (self(lambda *_, **__: bare, *args, **kwargs) - bare)

    def as_branch(self) -> Branch | None:
        """What it does as one branch of two linear layers, where that is all it does: many of them run as one."""
        return None

    def merged(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor] | None:
        """What the host's own parameters become where it alone shall compute what ``forward`` does around it.

        tensors: the host's parameters by name, None for a bias it could have and has not. Only those that change are
        returned; None where it cannot be done, as around anything that is not linear. Called in eval mode.
        """
        return None


class Factors(NamedTuple):
    """A change of rank r as a product: ``scale * up.T @ down``, both with one row a rank (rows contiguous).

    down: (r, fan_in).  up: (r, rows).  dropout: probability on the input of the branch, in training.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


class WeightAdapter(nn.Module):
    """A change of a frozen tensor. The core decides how it is applied: folded, beside the product, or merged.

    Subclasses give ``delta``; those whose value is not a sum override ``forward``.
    dropout: probability on the input of what the change adds to a layer's product, in training.
    ranked: names of the tensors whose first axis is a rank that weights or data decide; a file brings its own.
    """

    ranked: tuple[str, ...] = ()
    dropout: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.context = Context()

    def delta(self, weight: Tensor) -> Tensor:
        """The change of ``weight`` (the rows of this site), of its shape."""
        raise NotImplementedError(f"{type(self).__name__} has no delta")

    def resize(self, rank: int) -> None:
        """Zeros in the ``ranked`` tensors where they are of another rank; they stay the same parameters and buffers."""
        for name in self.ranked:
            tensor = getattr(self, name)
            if len(tensor) != rank:
                tensor.data = tensor.data.new_zeros(rank, *tensor.shape[1:])

    def factors(self) -> Factors | None:
        """The change as a product of two small matrices, where it is one."""
        return None

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The tensor to use in place of ``weight``; summed in the wider of the two precisions, then cast back."""
        return (weight + strength * self.delta(weight)).to(weight.dtype)
