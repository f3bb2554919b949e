"""CorDA: LoRA that starts from the weight decomposed along what sample data use of it (Yang et al., 2024)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from shared import store, weights
from shared.adapter import WeightAdapter
from shared.blocks.decomposition import Decomposition, Precision, Sides, Split, decompose, leading, projections
from shared.blocks.low_rank import Replacement
from shared.errors import RequestError
from shared.method import Method
from shared.methods.lora import LoRA
from shared.sites import Site, Sites
from shared.statistics import SecondMoment, collect
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted

_log = logging.getLogger("omniadapt")


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
    start: an adapter file of CorDA, prepared on other samples (``prepare``, then ``save``), to start from: so "kpa"
    keeps what the training data do not show.
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
    singular_values: Literal["both", "up", "down"] = "both"
    precision: Literal["float64", "float32"] = "float64"
    bias: bool = False
    start: str | None = None
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
        layers = projections(sites, self.roles, self.depth)
        biases = [bias for site in layers if self.bias and (bias := site.bias) is not None]
        return Sites((*layers, *biases), sites.owner)

    def build(self, site: Site) -> WeightAdapter:
        if site.parameter and site.parameter.endswith("bias"):
            return Replacement(site.weight)
        return ContextSplit(site.weight.shape, self.rank, where=site.key)

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        if self.start is not None:
            _start_from(model, name, self.start)
            return
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


def _report(site: Site, moment: SecondMoment, found: Decomposition) -> None:
    _log.info("CorDA: %s: %d tokens of %d samples, damping %g", site.key, moment.tokens, moment.samples, found.damping)
    if moment.guarded:
        _log.warning(
            "CorDA: %s: %d of %d samples have a maximum next to zero and are divided by their largest magnitude",
            site.key, moment.guarded, moment.samples,
        )  # fmt: skip


def _start_from(model: Adapted, name: str, path: str) -> None:
    """Fill adapter ``name`` from a file of another run on this backbone."""
    tensors, header = store.read(path)
    if header["method"]["type"] != "CorDA" or header["backbone"]["fingerprint"] != model.fingerprint:
        theirs = f"{header['method']['type']} on {header['backbone']['name']} {header['backbone']['fingerprint']}"
        raise RequestError(f"{path}: {theirs}; start from CorDA on {model.backbone_name} {model.fingerprint}")
    prefix = f"adapter.{name}."
    given = {prefix + n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")}
    _fill(model, prefix, given, path)


def _fill(model: Adapted, prefix: str, given: dict[str, Tensor], source: str) -> None:
    """Load tensors that belong to one adapter, strictly; whatever else trains stays."""
    others = {n: t for n, t in model.trained_state().items() if not n.startswith(prefix)}
    model.load_trained_state(others | given, source)


# -- plain LoRA and the official files ---------------------------------------------------------------------------------


def to_lora(model: Adapted, name: str = "default", to: str = "lora") -> None:
    """Add, and activate, the LoRA of rank 2r that changes the original weights as the CorDA ``name`` does.

    Raises RequestError where there is no such CorDA, where it trains biases, or where 2r is above a layer's size.
    """
    method = model.methods.get(name)
    if not isinstance(method, CorDA) or method.bias:
        raise RequestError(
            f"adapter {name!r}: only a CorDA without bias is a plain LoRA; loaded: {', '.join(model.methods)}"
        )
    bank: Any = model.bank[name]
    roles = tuple(dict.fromkeys(site.role for site in method.sites(model.sites())))
    model.add(LoRA(rank=2 * method.rank, roles=roles, depth=method.depth), name=to)
    with torch.no_grad():
        for key, adapter in model.bank[to].items():  # type: ignore[operator]
            down, up, _, _ = bank[key].factors()
            adapter.down.copy_(down)
            adapter.up.copy_(up)


def load_official(model: Adapted, path: str | os.PathLike) -> list[str]:
    """Fill the active CorDA, on the original weights, from a model as the official code saves it.

    path: a weights file, or a folder of .safetensors files. Each layer is there as ``weight_residual`` (rows, fan_in),
    ``ALinear.weight`` (rows, r), LoRA's B, and ``BLinear.weight`` (r, fan_in), its A; what the layer started from is
    the weight here less that residual. Returns the names left aside, which are the frozen model's.

    Raises RequestError where a layer is missing or too many, of another shape or rank, or made from other weights.
    """
    (name,) = model.active
    method: Any = model.methods[name]
    state, used, given = _read_official(Path(path)), set(), {}
    for site in method.sites(model.sites()):
        layer = site.path.removeprefix("model.")
        if str(site.parameter).endswith("bias"):
            used.add(f"{layer}.ALinear.bias")
            given[f"adapter.{name}.{site.key}.value"] = _official(
                state, f"{layer}.ALinear.bias", site.weight.shape, path
            )
            continue
        rows, columns = site.weight.shape
        shapes = {"weight_residual": (rows, columns), "ALinear.weight": (rows, method.rank),
                  "BLinear.weight": (method.rank, columns)}  # fmt: skip
        residual, up, down = (_official(state, f"{layer}.{n}", shape, path) for n, shape in shapes.items())
        used |= {f"{layer}.{n}" for n in shapes}
        up_start, down_start = _taken_out(site, residual, method.rank, path)
        tensors = {
            "up": up.t(),
            "down": down,
            "up_start": up_start,
            "down_start": down_start,
            "damping": torch.zeros(()),
        }
        given |= {f"adapter.{name}.{site.key}.{n}": t for n, t in tensors.items()}
        if site.bias is not None and not method.bias:
            bias = _official(state, f"{layer}.ALinear.bias", site.bias.weight.shape, path)
            if not torch.equal(bias, site.bias.weight.to(bias)):
                raise RequestError(f"{path}: {layer} has a trained bias; attach CorDA(bias=True)")
            used.add(f"{layer}.ALinear.bias")
    adapted = ("weight_residual", "ALinear.weight", "BLinear.weight", "ALinear.bias")
    if extra := sorted(n for n in state.keys() - used if n.endswith(adapted)):
        raise RequestError(f"{path}: {len(extra)} tensors of layers that are not adapted here (first: {extra[0]})")
    _fill(model, f"adapter.{name}.", given, str(path))
    return sorted(state.keys() - used)


def _read_official(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise RequestError(f"{path}: a folder without .safetensors files")
    return {n.removeprefix("model."): t for file in files for n, t in weights.read(file).items()}


def _official(state: dict[str, Tensor], name: str, shape: Sequence[int], path: str | os.PathLike) -> Tensor:
    if name not in state or state[name].shape != tuple(shape):
        what = "is missing" if name not in state else f"is {tuple(state[name].shape)}"
        raise RequestError(f"{path}: {name} {what}; this CorDA needs {tuple(shape)}")
    return state[name]


def _taken_out(site: Site, residual: Tensor, rank: int, path: str | os.PathLike) -> tuple[Tensor, Tensor]:
    """The part (r, rows), (r, fan_in) of the weight here that a file's residual lacks."""
    weight = site.weight.detach().cpu().float()
    missing = weight - residual.float()
    left, values, right = leading(missing, rank)
    up, down = (left * values.sqrt()).t(), (right * values.sqrt()).t()
    rounding = max(1e-5, 2 * torch.finfo(residual.dtype).eps, 2 * torch.finfo(site.weight.dtype).eps)
    if (off := float((missing - up.t() @ down).norm() / weight.norm())) > rounding:
        raise RequestError(
            f"{path}: the residual of {site.path} differs from the weight here by more than rank {rank} (by {off:.1e} "
            "of its norm): made from another model"
        )
    return up, down
