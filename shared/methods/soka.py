"""SoKA: the leading Kronecker products of a weight, or of its update, are what trains (SoKA, 2025).

The abstract alone is public. What it leaves open is filled in from the standard literature: the rearrangement and its
SVD (Van Loan and Pitsianis, 1993), and the start from the weight, as PiSSA has it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from shared.blocks.decomposition import projections
from shared.blocks.kronecker import KroneckerSum, Shape, Spectrum, decompose, rank_by_elbow, rank_by_energy
from shared.errors import RequestError, WorkError
from shared.method import Method
from shared.sites import Site, Sites
from shared.statistics import evaluating
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted

_log = logging.getLogger("omniadapt")
COMBINE = ("min", "max", "energy", "elbow")


@dataclass(frozen=True, kw_only=True)
class SoKA(Method):
    """``W_res + sum of A_k kron B_k`` with as many products in each layer as its spectrum justifies.

    source: "weight" splits the products off W, which is the identity at the start; "update" and "gradient" leave W
    whole and begin at the nearest products to a full update of it, which is not the identity: the update in the file
    ``update`` (an adapter file of ``Full`` on this backbone), or minus the mean gradient of the loss over ``batches``
    training batches, whose length a line search over them finds. All defaults are ours.
    threshold: share of the energy that the products keep (0 to 1).  combine: the rank is the "min" of that by energy
    and that before the elbow of the spectrum, their "max", or either; then from ``rank_min`` to ``rank_max``.
    budget: parameters in all layers together at most; the threshold is lowered until they fit.
    factors: rows and columns of A (None: the divisors nearest below the square roots: 64 x 64 of 4096 x 4096).
    roles: which layers (None: every linear layer of the blocks).  depth: which blocks.
    reselect_every: optimiser steps after which the same rule looks at the sum of products as it then is, whose whole
    spectrum is known: zeros after its products (so in a large layer the elbow seldom comes before them). What it drops
    is fixed as it is; the function does not change at that moment. Products only ever become fewer. None: never.
    Where one is dropped, the others become the leading components of the sum, while the optimiser keeps its moments of
    the rows as they were, which fade by its decay rates; where none is, nothing is touched. Dropped products stay among
    the counted parameters, without effect or gradient. Not in sharded training.

    Without weights (counting) and before a gradient is known, every layer has ``rank_max`` products. A file brings the
    ranks it was trained with.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank", "reparameterised/dynamic rank"), acts_on="weights", form="parallel",
        mergeable="yes", spec="soka",
        trains="rank_max * ((factors[0] * factors[1] + rows * columns // (factors[0] * factors[1])) if factors else"
        " (largest_divisor(rows) * largest_divisor(columns)"
        " + rows * columns // (largest_divisor(rows) * largest_divisor(columns))))",
        why="the rank is chosen from the spectrum; trains is the most there can be",
    )  # fmt: skip

    source: Literal["weight", "update", "gradient"] = "weight"
    threshold: float = 0.9
    combine: Literal["min", "max", "energy", "elbow"] = "min"
    rank_min: int = 1
    rank_max: int = 8
    budget: int | None = None
    factors: Sequence[int] | None = None
    update: str | None = None
    batches: int = 16
    reselect_every: int | None = None
    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.source not in ("weight", "update", "gradient") or (self.source == "update") != bool(self.update):
            raise RequestError(
                f"SoKA source {self.source!r}, update {self.update!r}: use weight, gradient, or update with a file"
            )
        if not 0 < self.threshold <= 1:
            raise RequestError(f"SoKA threshold {self.threshold}: use a share of the energy above 0, at most 1")
        if self.combine not in COMBINE:
            raise RequestError(f"SoKA combine {self.combine!r}: use one of {', '.join(COMBINE)}")
        if not 1 <= self.rank_min <= self.rank_max:
            raise RequestError(f"SoKA ranks {self.rank_min} to {self.rank_max}: use 1 <= rank_min <= rank_max")
        if self.batches < 1 or (self.factors is not None and len(self.factors) != 2):
            raise RequestError(f"SoKA batches {self.batches}, factors {self.factors}: at least 1, and two numbers")
        if self.reselect_every is not None and self.reselect_every < 1:
            raise RequestError(f"SoKA reselect_every {self.reselect_every}: use at least 1 step, or None")

    def sites(self, sites: Sites) -> Sites:
        return projections(sites, self.roles, self.depth)

    def starts_from_data(self) -> bool:
        return self.source == "gradient"

    def build(self, site: Site) -> KroneckerSum:
        return self.build_all(Sites([site]))[site.key]

    def build_all(self, sites: Sites) -> dict[str, KroneckerSum]:
        built = {}
        for site in sites:
            shape = self._shape(site)
            rank = max(self.rank_min, min(self.rank_max, shape.most))  # refused where not even the least fits
            looked_at = min(self.rank_max + 1, shape.most)
            built[site.key] = KroneckerSum(
                shape, rank, looked_at, taken=self.source == "weight", reselects=bool(self.reselect_every),
                where=site.key,
            )  # fmt: skip
        if self.source == "gradient" or any(site.weight.is_meta for site in sites):
            return built
        matrices = {site.key: site.weight for site in sites} if self.source == "weight" else self._updates(sites)
        self._start(built, matrices)
        return built

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        if self.source != "gradient":
            return
        bank: Any = model.bank[name]
        chosen = list(itertools.islice(batches, self.batches))
        if not chosen:
            raise RequestError("calibration: there is no batch")
        gradients = _gradients(model, self.sites(model.sites()), chosen, loss)
        self._start(bank, {key: -gradient for key, gradient in gradients.items()})
        with evaluating(model):
            length = _search(bank, chosen, loss)
        _log.info("SoKA: starts %g times the gradient down", length)

    def step(self, adapters: Mapping[str, Any], number: int, generator: torch.Generator) -> None:
        if self.reselect_every is None or number % self.reselect_every:
            return
        from torch.distributed.tensor import DTensor

        for key, adapter in adapters.items():
            if isinstance(adapter.a, DTensor):
                raise RequestError("SoKA's reselect_every needs whole factors: train without sharding, or without it")
            if adapter.reselected == number:  # each batch of an accumulated step asks
                continue
            adapter.reselected.fill_(number)
            if number:
                self._reselect(key, adapter)

    def _reselect(self, key: str, adapter: KroneckerSum) -> None:
        found = adapter.current(key)
        live = len(found.values)
        # With the zeros after them: of the products alone, the elbow would drop at least the last one each time.
        values = torch.cat([found.values, found.values.new_zeros(adapter.shape.most - live)])
        rank = min(live, self._rank(found._replace(values=values), self.threshold))
        if rank < live:
            adapter.keep(found, rank)
            _log.info("SoKA: %s: %d of %d products go on", key, rank, live)

    def _shape(self, site: Site) -> Shape:
        matrix = site.weight.flatten(1)
        shape = Shape.of(len(matrix), matrix[0].numel(), self.factors, site.key)
        if min(shape) == 1 and self.factors is None:
            _log.warning("SoKA: %s: %d x %d has a prime side: factors %s", site.key, *matrix.shape, tuple(shape))
        return shape

    def _updates(self, sites: Sites) -> dict[str, Tensor]:
        """The given full update of each site, from a file of the whole trained weights."""
        from shared.store import read

        tensors, header = read(str(self.update))
        found = {}
        for site in sites:
            trained = tensors.get(f"backbone.{site.path}.{site.parameter}".replace("..", "."))
            frozen = site.module._parameters[str(site.parameter)]
            if trained is None or frozen is None or trained.shape != frozen.shape:
                raise RequestError(
                    f"{self.update}: an adapter of {header['method']['type']} without a whole trained weight for "
                    f"{site.key}; train one with method Full on this backbone"
                )
            change = trained.to(frozen.device, torch.float32) - frozen.float()
            found[site.key] = change if site.rows is None else change[slice(*site.rows)]
        return found

    def _start(self, adapters: Mapping[str, KroneckerSum], matrices: Mapping[str, Tensor]) -> None:
        """Ranks from the spectra of all matrices, and the products of each layer."""
        spectra = {}
        for key, matrix in matrices.items():
            spectra[key] = decompose(matrix.flatten(1), adapters[key].shape, self.rank_max + 1, key)
        ranks = self._ranks(spectra, {key: adapters[key].shape.parameters for key in spectra})
        for key, found in spectra.items():
            adapters[key].start(found, ranks[key])
            _log.info("SoKA: %s: %d products, %.3f of the energy", key, ranks[key], adapters[key].kept)

    def _ranks(self, spectra: Mapping[str, Spectrum], sizes: Mapping[str, int]) -> dict[str, int]:
        """The products of each layer by the rule, within the budget. sizes: parameters of one product in each."""

        def at(threshold: float) -> dict[str, int]:
            return {key: self._rank(spectrum, threshold) for key, spectrum in spectra.items()}

        def cost(ranks: dict[str, int]) -> int:
            return sum(rank * sizes[key] for key, rank in ranks.items())

        ranks = at(self.threshold)
        if self.budget is None or cost(ranks) <= self.budget:
            return ranks
        low, high = 0.0, self.threshold
        if (least := cost(at(low))) > self.budget:
            raise RequestError(
                f"SoKA budget {self.budget}: combine {self.combine!r} with rank_min {self.rank_min} needs {least}"
            )
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(at(middle)) <= self.budget else (low, middle)
        return at(low)

    def _rank(self, spectrum: Spectrum, threshold: float) -> int:
        energy = rank_by_energy(spectrum.values, spectrum.energy, threshold)
        elbow = rank_by_elbow(spectrum.values)
        rank = {"min": min(energy, elbow), "max": max(energy, elbow), "energy": energy, "elbow": elbow}[self.combine]
        return min(max(rank, self.rank_min), self.rank_max, len(spectrum.values))


def _gradients(
    model: Adapted, sites: Sites, batches: Sequence[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """The mean gradient of the bare model's loss with respect to each site's weight, in eval mode."""
    whole: dict[int, Tensor] = {}
    for site in sites:
        weight = site.module._parameters[str(site.parameter)]
        assert weight is not None  # build read it
        whole[id(weight)] = weight
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in whole.values()]
    try:
        for weight in whole.values():
            weight.requires_grad_(True)
        with model.disabled(), evaluating(model), torch.enable_grad():
            for batch in batches:
                for total, gradient in zip(sums, torch.autograd.grad(loss(batch), list(whole.values())), strict=True):
                    total += gradient / len(batches)
    finally:
        for weight in whole.values():
            weight.requires_grad_(False)
    by_weight = dict(zip(whole, sums, strict=True))
    found = {}
    for site in sites:
        gradient = by_weight[id(site.module._parameters[str(site.parameter)])]
        found[site.key] = gradient if site.rows is None else gradient[slice(*site.rows)]
        if not found[site.key].isfinite().all():
            raise WorkError(f"calibration: the gradient of {site.key} is not finite; look at the samples")
    return found


@torch.no_grad()
def _search(adapters: Mapping[str, KroneckerSum], batches: Sequence[Any], loss: Callable[[Any], Tensor]) -> float:
    """Scale the start of all adapters by one length, that with the lowest mean loss over the batches, and return it."""
    start = {key: adapter.a.clone() for key, adapter in adapters.items()}

    def at(length: float) -> float:
        for key, adapter in adapters.items():
            adapter.a.copy_(start[key] * length)
        return sum(float(loss(batch)) for batch in batches) / len(batches)

    bare, step = at(0.0), 1.0
    value = at(step)
    while not value < bare and step > 1e-12:
        step /= 4
        value = at(step)
    if not value < bare:
        raise WorkError("SoKA: the loss does not fall along minus its gradient; look at the batches and the precision")
    while (further := at(2 * step)) < value and step < 1e12:
        step, value = 2 * step, further
    best = _vertex((0.0, bare), (step, value), (2 * step, further))
    if not at(best) <= value:
        best = step
        at(best)
    return best


def _vertex(*points: tuple[float, float]) -> float:
    """Where the parabola through three points, of which the second is the lowest, is lowest."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    return x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right) if left != right else x1
