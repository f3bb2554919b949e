"""Sums of Kronecker products: the nearest to a matrix (Van Loan and Pitsianis, 1993), and a change made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.adapter import WeightAdapter
from shared.blocks.decomposition import leading
from shared.errors import RequestError, WorkError

EXACT = 1024  # up to this side of the rearranged matrix the whole SVD is taken, above it a randomised one


def largest_divisor(number: int) -> int:
    """The largest divisor not above the square root: 64 of 4096, 86 of 11008, 1 of a prime."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)


class Shape(NamedTuple):
    """Of the products in a matrix (p1 * p2, q1 * q2): A is (p1, q1), B is (p2, q2)."""

    p1: int
    p2: int
    q1: int
    q2: int

    @classmethod
    def of(cls, rows: int, columns: int, first: Sequence[int] | None = None, where: str = "weight") -> Shape:
        """For a matrix, given A's shape; None: the divisors nearest below the square roots.

        Raises RequestError where the given ones do not divide the matrix.
        """
        p1, q1 = (largest_divisor(rows), largest_divisor(columns)) if first is None else first
        if min(p1, q1) < 1 or rows % p1 or columns % q1:
            raise RequestError(f"factors of {p1} x {q1} at {where}: they do not divide its matrix {rows} x {columns}")
        return cls(p1, rows // p1, q1, columns // q1)

    @property
    def parameters(self) -> int:
        """Of one product."""
        return self.p1 * self.q1 + self.p2 * self.q2

    @property
    def most(self) -> int:
        """Products that give any matrix."""
        return min(self.p1 * self.q1, self.p2 * self.q2)

    def rearrange(self, matrix: Tensor) -> Tensor:
        """(p1 p2, q1 q2) to (p1 q1, p2 q2), an isometry that takes ``A kron B`` to ``vec(A) vec(B)^T``."""
        p1, p2, q1, q2 = self
        return matrix.reshape(p1, p2, q1, q2).transpose(1, 2).reshape(p1 * q1, p2 * q2)

    def restore(self, rearranged: Tensor) -> Tensor:
        """The inverse of ``rearrange``."""
        p1, p2, q1, q2 = self
        return rearranged.reshape(p1, q1, p2, q2).transpose(1, 2).reshape(p1 * p2, q1 * q2)


class Spectrum(NamedTuple):
    """The leading k Kronecker components of a matrix: ``sum of a[i] kron b[i]``, with singular values ``values``.

    a: (k, p1, q1).  b: (k, p2, q2).  values: (k,), descending.  energy: the sum of all squared singular values.
    """

    a: Tensor
    b: Tensor
    values: Tensor
    energy: float


def decompose(matrix: Tensor, shape: Shape, count: int, where: str = "weight") -> Spectrum:
    """The first ``count`` components (fewer where the matrix has fewer), in float32 or wider.

    Exact up to a side of ``EXACT``; above it randomised (see ``leading``).
    """
    matrix = matrix.detach()
    rearranged = shape.rearrange(matrix if matrix.dtype == torch.float64 else matrix.float())
    if not rearranged.isfinite().all():
        raise RequestError(f"what is decomposed at {where} holds numbers that are not finite")
    count = min(count, shape.most)
    if shape.most <= EXACT:
        left, values, right = torch.linalg.svd(rearranged, full_matrices=False)
        right = right.mT
    else:
        left, values, right = leading(rearranged, count)
    left, values, right = left[:, :count], values[:count], right[:, :count]
    a, b = ((side * values.sqrt()).t() for side in (left, right))
    energy = float(rearranged.double().square().sum())
    return Spectrum(a.reshape(-1, shape.p1, shape.q1), b.reshape(-1, shape.p2, shape.q2), values, energy)


def recompose(a: Tensor, b: Tensor, where: str = "weight") -> Spectrum:
    """The components of ``sum of a[i] kron b[i]`` without forming it: as many as there are products, at most ``most``.

    a: (r, p1, q1).  b: (r, p2, q2). By QR of their rows and the SVD of a matrix r x r, in float64.
    """
    sides = [factor.detach().flatten(1).double().t() for factor in (a, b)]
    if not all(side.isfinite().all() for side in sides):
        raise WorkError(f"the products at {where} hold numbers that are not finite")
    (left, first), (right, second) = (torch.linalg.qr(side) for side in sides)
    u, values, v = torch.linalg.svd(first @ second.t(), full_matrices=False)
    a_new, b_new = ((side * values.sqrt()).t() for side in (left @ u, right @ v.t()))
    energy = float(values.square().sum())
    return Spectrum(a_new.reshape(-1, *a.shape[1:]), b_new.reshape(-1, *b.shape[1:]), values, energy)


def rank_by_energy(values: Tensor, energy: float, threshold: float) -> int:
    """The fewest components with ``threshold`` of the energy; all the given ones where they have less."""
    kept = values.double().square().cumsum(0)
    enough = kept >= threshold * energy * (1 - 1e-9)
    return int(enough.double().argmax()) + 1 if enough.any() else len(values)


def rank_by_elbow(values: Tensor) -> int:
    """The components before the point farthest below the chord from first to last value; all where it is flat."""
    count, values = len(values), values.double()
    fall = values[0] - values[-1]
    if count < 2 or fall <= 1e-9 * values[0]:
        return count
    x = torch.arange(count, dtype=torch.float64, device=values.device) / (count - 1)
    below = 1 - x - (values - values[-1]) / fall
    farthest = int((below >= below.max() - 1e-12).double().argmax())  # the first, where two are as far
    return max(1, farthest)


class KroneckerSum(WeightAdapter):
    """``W + sum of a[i] kron b[i]``, less the sum it started from where ``taken`` says it was a part of W.

    a: (r, p1, q1).  b: (r, p2, q2). Zero at first.
    spectrum: the leading values of what was decomposed, as many as were looked at.  energy: the sum of all squares.

    With ``reselects`` products can be dropped in training, and no tensor changes its shape. live: (r,), which rows of a
    and b count, the first ones. A dropped product goes to the same row of ``a_folded`` and ``b_folded`` and stays there
    as it is; a row is dropped once at most, so r rows are enough.  reselected: the number of the step that last looked.
    """

    a_start: Tensor
    b_start: Tensor
    spectrum: Tensor
    energy: Tensor
    a_folded: Tensor
    b_folded: Tensor
    live: Tensor
    reselected: Tensor

    def __init__(
        self, shape: Shape, rank: int, looked_at: int, *, taken: bool, reselects: bool = False, where: str = "weight"
    ):
        super().__init__()
        if not 1 <= rank <= shape.most:
            raise RequestError(f"rank {rank} at {where}: factors {shape} have 1 to {shape.most} products")
        self.shape, self.taken, self.reselects = shape, taken, reselects
        self.a = nn.Parameter(torch.zeros(rank, shape.p1, shape.q1))
        self.b = nn.Parameter(torch.zeros(rank, shape.p2, shape.q2))
        self.register_buffer("spectrum", torch.zeros(looked_at))
        self.register_buffer("energy", torch.zeros(()))
        self.began = ("a", "b", "a_start", "b_start") if taken else ("a", "b")
        self.ranked = (*self.began, "a_folded", "b_folded", "live") if reselects else self.began
        if taken:
            self.register_buffer("a_start", torch.zeros_like(self.a))
            self.register_buffer("b_start", torch.zeros_like(self.b))
        if reselects:
            self.register_buffer("a_folded", torch.zeros_like(self.a))
            self.register_buffer("b_folded", torch.zeros_like(self.b))
            self.register_buffer("live", torch.ones(rank, dtype=torch.bool))
            self.register_buffer("reselected", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def start(self, found: Spectrum, rank: int) -> None:
        """Begin at the leading products; the identity where they are taken from W."""
        self.resize(rank)
        for name in self.began:
            getattr(self, name).copy_((found.a if name.startswith("a") else found.b)[:rank])
        self.spectrum.copy_(found.values)
        self.energy.fill_(found.energy)
        if self.reselects:
            self.live.fill_(True)

    def current(self, where: str) -> Spectrum:
        """The components of the sum of the products that count."""
        return recompose(self.a[self.live], self.b[self.live], where)

    @torch.no_grad()
    def keep(self, found: Spectrum, rank: int) -> None:
        """Go on with the first ``rank`` components of ``current`` and fix the others: the change stays what it was."""
        dropped = slice(rank, len(found.values))
        for factor, folded, new in ((self.a, self.a_folded, found.a), (self.b, self.b_folded, found.b)):
            folded[dropped] = new[dropped].to(folded.dtype)
            factor.zero_()[:rank] = new[:rank].to(factor.dtype)
        self.live[rank:] = False

    @property
    def kept(self) -> float:
        """The share of the energy that the products had at the start."""
        return float(self.spectrum[: len(self.a)].square().sum() / self.energy) if self.energy else 1.0

    def delta(self, weight: Tensor) -> Tensor:
        # An optimiser's momentum still moves the rows of dropped products, so they are masked, not only zero.
        a = self.a * self.live[:, None, None] if self.reselects else self.a
        change = a.flatten(1).t() @ self.b.flatten(1)
        if self.reselects:
            change = change + self.a_folded.flatten(1).t() @ self.b_folded.flatten(1)
        if self.taken:
            change = change - self.a_start.flatten(1).t() @ self.b_start.flatten(1)
        return self.shape.restore(change).reshape(weight.shape)
