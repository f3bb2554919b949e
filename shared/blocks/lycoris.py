"""Changes of a weight as other libraries write them: LoCon, LoHa and LoKr, each with a core for kernels if wanted
(LyCORIS, Yeh et al., 2023).

Each is made from the shapes of its tensors, which keep the names they have in files, and is zero until they are filled.
A weight (rows, columns, *kernel) is seen as a matrix (rows, fan_in), fan_in being all but the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shared.adapter import WeightAdapter
from shared.blocks.low_rank import LowRank
from shared.errors import RequestError

Shapes = Mapping[str, Sequence[int]]


class AnyRank(LowRank):
    """``LowRank`` whose rank may exceed the matrix's sides, as it does in files with one rank for all layers."""

    def __init__(self, shape: Sequence[int], shapes: Shapes, scale: float, where: str = "weight"):
        WeightAdapter.__init__(self)
        self.scale, self.dropout = float(scale), 0.0
        down, up = shapes["down"], shapes["up"]
        _check(shape, (up[-1], down[-1]), down[0] == up[0] and len(down) == len(up) == 2, shapes, where)
        _fill(self, shapes)


class Tucker(WeightAdapter):
    """LoCon with a core: ``scale * sum over p, q of up[p] mid[p, q] down[q]``, for convolutions.

    down: (q, columns).  mid: (p, q, *kernel).  up: (p, rows).
    """

    def __init__(self, shape: Sequence[int], shapes: Shapes, scale: float, where: str = "weight"):
        super().__init__()
        self.scale = float(scale)
        down, mid, up = shapes["down"], shapes["mid"], shapes["up"]
        fits = list(mid[:2]) == [up[0], down[0]] and list(mid[2:]) == list(shape[2:])
        _check(shape, (up[-1], math.prod(mid[2:]) * down[-1]), fits, shapes, where)
        _fill(self, shapes)

    def delta(self, weight: Tensor) -> Tensor:
        return expanded(self.mid, self.up, self.down) * self.scale  # type: ignore[arg-type]


class Hadamard(WeightAdapter):
    """LoHa: ``scale`` times the elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al., 2022).

    w1_a, w2_a: (rows, r).  w1_b, w2_b: (r, fan_in).  With cores t1, t2 (r, r, *kernel): (r, rows) and (r, columns).
    """

    def __init__(self, shape: Sequence[int], shapes: Shapes, scale: float, where: str = "weight"):
        super().__init__()
        self.scale = float(scale)
        for a, b, core in ((shapes[f"w{i}_a"], shapes[f"w{i}_b"], shapes.get(f"t{i}")) for i in (1, 2)):
            if core is None:
                _check(shape, (a[0], b[1]), a[1] == b[0], shapes, where)
            else:
                fits = list(core[:2]) == [a[0], b[0]] and list(core[2:]) == list(shape[2:])
                _check(shape, (a[1], b[1] * math.prod(core[2:])), fits, shapes, where)
        _fill(self, shapes)

    def delta(self, weight: Tensor) -> Tensor:
        return (self._half(1) * self._half(2)).reshape(weight.shape) * self.scale

    def _half(self, which: int) -> Tensor:
        a, b, core = (self._parameters.get(name) for name in (f"w{which}_a", f"w{which}_b", f"t{which}"))
        return a @ b if core is None else expanded(core, a, b)  # type: ignore[operator,arg-type]


class Kronecker(WeightAdapter):
    """LoKr: ``scale * kron(w1, w2)``, where each may be a product of two, and w2 may have a kernel.

    w1: (p, s), or w1_a (p, r) and w1_b (r, s).  w2: (rows / p, fan_in / s), with a kernel or flat, or w2_a
    (rows / p, r) and w2_b (r, fan_in / s); with a core t2 (r, r, *kernel), w2_a (r, rows / p), w2_b (r, columns / s).
    """

    def __init__(self, shape: Sequence[int], shapes: Shapes, scale: float, where: str = "weight"):
        super().__init__()
        self.scale = float(scale)
        sides = []
        for which in (1, 2):
            whole, a, b, core = (shapes.get(name) for name in (f"w{which}", f"w{which}_a", f"w{which}_b", f"t{which}"))
            if whole is not None:
                sides.append((whole[0], math.prod(whole[1:])))
            elif a is None or b is None:
                raise RequestError(f"change of {where}: its Kronecker product lacks w{which}")
            elif core is not None:
                sides.append((a[1], b[1] * math.prod(core[2:])))
            else:
                sides.append((a[0], math.prod(b[1:])))
        (p, s), (rows, fan_in) = sides
        _check(shape, (p * rows, s * fan_in), True, shapes, where)
        _fill(self, shapes)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.kron(self._half(1), self._half(2)).reshape(weight.shape) * self.scale

    def _half(self, which: int) -> Tensor:
        names = (f"w{which}", f"w{which}_a", f"w{which}_b", f"t{which}")
        whole, a, b, core = (self._parameters.get(name) for name in names)
        if whole is not None:
            return whole.flatten(1)
        half = a @ b.flatten(1) if core is None else expanded(core, a, b)  # type: ignore[operator,arg-type,union-attr]
        return half.flatten(1)


def expanded(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """core (p, q, *kernel), left (p, rows) and right (q, columns) to (rows, columns, *kernel)."""
    return torch.einsum("pq...,pr,qc->rc...", core, left, right)


def _check(shape: Sequence[int], matrix: tuple[int, int], fits: bool, shapes: Shapes, where: str) -> None:
    rows, fan_in = shape[0], math.prod(shape[1:])
    if not fits or matrix != (rows, fan_in):
        named = ", ".join(f"{name} {tuple(size)}" for name, size in shapes.items())
        raise RequestError(f"change of {where}: {named} do not make its matrix of {rows} x {fan_in}")


def _fill(adapter: nn.Module, shapes: Shapes) -> None:
    for name, shape in shapes.items():
        adapter.register_parameter(name, nn.Parameter(torch.zeros(tuple(shape))))
