"""CorDA: LoRA that starts from the weight decomposed along what sample data use of it (Yang et al., 2024)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from shared.adapter import WeightAdapter
from shared.blocks.decomposition import Split, linears
from shared.blocks.low_rank import Replacement
from shared.errors import RequestError, WorkError
from shared.method import Method
from shared.sites import Site, Sites
from shared.statistics import SecondMoment, collect
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted

_log = logging.getLogger("omniadapt")
Sides = Literal["both", "up", "down"]
Precision = Literal["float64", "float32"]


@dataclass(frozen=True, kw_only=True)
class CorDA(Method):
    """``W_res + B A`` where B A are r components of W, ordered by how much the calibration data use them.

    The second moment C of each layer's inputs is measured over calibration samples, then ``W C = U S V^T`` gives
    ``W = U S (V^T C^-1)``. The stored weight is not rewritten: see ``Split``.

    mode: "ipa" (instruction-previewed) trains the r largest components: calibrate on the task's own samples. "kpa"
    (knowledge-preserved) trains the r smallest: calibrate on samples of the knowledge to keep, such as questions.
    rank: components (official: 128).  samples: of calibration (official: 256), from the training batches unless
    ``prepare`` is called with others.
    divisor: C is the sum over tokens by this (official: 256 whatever the samples; None: their number, as in peft). It
    does not change B A, but how its size is shared between B and A.  balance: share it so that both have one norm.
    singular_values: to which side they go: "both" (square roots, official), "up" (B) or "down" (A).
    precision: of the decomposition, once C is damped: "float64", or "float32" as published, which is off by some 1e-4
    of the weight from a hundred inputs on (the start is the identity all the same).
    bias: train the biases of these layers too, as the official code does where there are any (it keeps them in the
    adapter); off by default.
    at_a_time: layers measured in one pass over the samples (None: all; 1 needs the least memory).
    roles: which layers (None: every linear layer of the blocks, as published).  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/LoRA improvement",), acts_on="weights", form="parallel", mergeable="yes",
        trains="rows if str(site.parameter).endswith('bias') else rank * (rows + columns)", needs="samples",
        spec="corda",
    )  # fmt: skip

    mode: Literal["ipa", "kpa"] = "ipa"
    rank: int = 128
    samples: int = 256
    divisor: int | None = 256
    balance: bool = False
    singular_values: Sides = "both"
    precision: Precision = "float64"
    bias: bool = False
    at_a_time: int | None = None
    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        closed = {"mode": ("ipa", "kpa"), "singular_values": get_args(Sides), "precision": get_args(Precision)}
        for name, known in closed.items():
            if (value := getattr(self, name)) not in known:
                raise RequestError(f"CorDA {name} {value!r}: use {' or '.join(known)}")
        for name in ("samples", "divisor", "at_a_time"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"CorDA {name} {value}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        weights = linears(sites, self.roles, self.depth)
        biases = [bias for site in weights if self.bias and (bias := site.bias) is not None]
        return Sites((*weights, *biases), sites.owner)

    def build(self, site: Site) -> WeightAdapter:
        if site.parameter and site.parameter.endswith("bias"):
            return Replacement(site.weight)
        return ContextSplit(site.weight.shape, self.rank, where=site.key)

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        bank: Any = model.bank[name]
        sites = [site for site in self.sites(model.sites()) if isinstance(bank[site.key], ContextSplit)]
        moments = collect(
            model, sites, batches, loss, lambda: SecondMoment(normalised=True), samples=self.samples,
            at_a_time=self.at_a_time,
        )  # fmt: skip
        with model.disabled(), torch.no_grad():
            for site, moment in moments:
                mean = moment.total / (self.divisor or moment.samples)
                found = decompose(site.weight, mean, self.precision, site.key)
                bank[site.key].start(*found.part(self.mode, self.rank, self.singular_values, self.balance))
                bank[site.key].damping.fill_(found.damping)
                _report(site, moment, found)


class ContextSplit(Split):
    """A part of the weight along its context. damping: what was added to C's diagonal, as a share of its mean."""

    damping: Tensor

    def __init__(self, shape: torch.Size | tuple[int, ...], rank: int, where: str = "weight"):
        super().__init__(shape, rank, where=where)
        self.register_buffer("damping", torch.zeros(()))


class Decomposition(NamedTuple):
    """``W = left @ diag(values) @ right``: left (rows, k), values (k,) descending, right (k, fan_in)."""

    left: Tensor
    values: Tensor
    right: Tensor
    damping: float

    def part(self, mode: str, rank: int, sides: Sides = "both", balance: bool = False) -> tuple[Tensor, Tensor]:
        """The r largest ("ipa") or smallest ("kpa") components as up (r, rows) and down (r, fan_in)."""
        kept = slice(0, rank) if mode == "ipa" else slice(len(self.values) - rank, None)
        left, values, right = self.left[:, kept].t(), self.values[kept, None], self.right[kept]
        share = {"both": 0.5, "up": 1.0, "down": 0.0}[sides]
        up, down = left * values**share, right * values ** (1 - share)
        if balance and up.norm() > 0 and down.norm() > 0:
            ratio = (down.norm() / up.norm()).sqrt()
            up, down = up * ratio, down / ratio
        return up, down


def decompose(
    weight: Tensor, moment: Tensor | None, precision: Precision = "float64", where: str = "weight"
) -> Decomposition:
    """The context-oriented SVD of a weight (rows, fan_in) given the second moment of its inputs; None: the plain SVD.

    Raises WorkError where the moment is zero or not finite.
    """
    device = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
    dtype = getattr(torch, precision)
    matrix = weight.detach().flatten(1).to(device, dtype)
    if moment is None:
        return Decomposition(*torch.linalg.svd(matrix, full_matrices=False), damping=0.0)
    damped, damping = damp(moment.to(device), where)
    left, values, right = torch.linalg.svd(matrix @ damped.to(dtype), full_matrices=False)
    return Decomposition(left, values, right @ torch.linalg.inv(damped.to(dtype)), damping)


def damp(moment: Tensor, where: str = "weight") -> tuple[Tensor, float]:
    """``C + damping * mean(diag C) * I`` (float32) with the first damping of 0.01, 0.02, 0.04, ... at which it inverts.

    Its inverse in float32 must be within 0.05 (Frobenius norm of ``C C^-1 - I``), as published.
    """
    moment = moment.float()
    level, one = moment.diagonal().mean(), torch.eye(len(moment), device=moment.device)
    if not moment.isfinite().all() or level <= 0:
        what = "not finite" if level != 0 else "zero"
        raise WorkError(f"calibration: the second moment of the inputs of {where} is {what}; look at the samples")
    damping = 0.01
    while True:
        damped = moment + one * level * damping
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, one) < 0.05:
            return damped, damping
        damping *= 2


def without_smallest(
    weight: Tensor, rank: int, moment: Tensor | None = None, precision: Precision = "float64"
) -> Tensor:
    """The weight less its ``rank`` smallest components, along its context or (no moment) of the plain SVD: the paper's
    measure of what a decomposition keeps."""
    left, values, right, _ = decompose(weight, moment, precision)
    kept = len(values) - rank
    return ((left[:, :kept] * values[:kept]) @ right[:kept]).to(weight).view_as(weight)


def _report(site: Site, moment: SecondMoment, found: Decomposition) -> None:
    _log.info("CorDA: %s: %d tokens of %d samples, damping %g", site.key, moment.tokens, moment.samples, found.damping)
    if moment.guarded:
        _log.warning(
            "CorDA: %s: %d of %d samples have a maximum next to zero and are divided by their largest magnitude",
            site.key, moment.guarded, moment.samples,
        )  # fmt: skip
