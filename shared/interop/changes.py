"""What files of LoRA-like adapters have in common: tensors grouped by module, their kind, rank and scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared import weights
from shared.adapter import WeightAdapter
from shared.blocks.low_rank import Replacement
from shared.blocks.magnitude import Decomposed
from shared.errors import RequestError
from shared.merge import evaluating
from shared.methods.imported import KINDS, Imported

# How names end, with the kind of change and our name of the tensor. A name that ends otherwise is left over.
DOWN = (
    ".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)  # fmt: skip
ENDINGS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(DOWN, ("low_rank", "down")),
    **dict.fromkeys((e.replace("_A", "_B").replace("down", "up") for e in DOWN), ("low_rank", "up")),
    ".lora_mid.weight": ("low_rank", "mid"),
    ".lora_embedding_A": ("table", "up"),
    ".lora_embedding_B": ("table", "down"),
    **{f".hada_{name}": ("hadamard", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": ("kronecker", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".alpha": ("", "alpha"),
    ".dora_scale": ("dora_scale", "magnitude"),
    **dict.fromkeys(
        (f".lora_magnitude_vector{end}" for end in ("", ".weight", ".default.weight")), ("vector", "magnitude")
    ),
}
LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)
NEEDED = {
    "low_rank": ("down", "up"), "tucker": ("down", "mid", "up"), "table": ("down", "up"),
    "hadamard": ("w1_a", "w1_b", "w2_a", "w2_b"), "kronecker": (),
}  # fmt: skip


@dataclass
class Change:
    """A change of one tensor. tensors: by the names and in the layouts of ``shared.blocks.lycoris``.

    With "magnitude", (rows,) or (1, columns), among them it is one of the direction (``shared.blocks.magnitude``).
    """

    kind: str
    tensors: dict[str, Tensor]
    scale: float = 1.0
    parameter: str = "weight"

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by; 1 where both factors of a Kronecker product are whole."""
        for name in {"hadamard": ("w1_b",), "kronecker": ("w2_b", "w1_b")}.get(self.kind, ("down",)):
            if name in self.tensors:
                return len(self.tensors[name])
        return 1


Parts = dict[str, tuple[str, Tensor]]  # of one module: our name to kind and tensor


def read_tensors(path: Path, skip: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a file without those whose names hold a word of ``skip`` between dots, or begin with it."""
    state = weights.read(path)
    kept = {n: t for n, t in state.items() if not any(n.startswith(w) or f".{w}." in f".{n}." for w in skip)}
    if not kept:
        raise RequestError(f"{path}: it holds nothing but what is skipped")
    return kept


def read_adapter(path: Path, skip: Sequence[str]) -> dict[str, Parts]:
    """The tensors of a file by module. Raises RequestError where one is of no kind read here."""
    state = read_tensors(path, skip)
    found, left = grouped(state)
    if left:
        first = next(iter(left))
        raise RequestError(f"{path}: {len(left)} of its {len(state)} tensors are of no kind read here: {first}")
    return found


def grouped(state: Mapping[str, Tensor]) -> tuple[dict[str, Parts], dict[str, Tensor]]:
    """The tensors by module; and those that are none of an adapter's."""
    found: dict[str, Parts] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ending = next((e for e in LONGEST_FIRST if name.endswith(e)), "")
        kind, ours = ENDINGS.get(ending, ("", ""))
        module = found.setdefault(name[: -len(ending)], {}) if ours else {}
        if not ours or ours in module:
            left[name] = tensor
        else:
            module[ours] = (kind, tensor)
    return found, left


def read_change(name: str, parts: Parts, source: str) -> Change:
    """One module's change; its scale is alpha over rank, 1 where the file holds no alpha or zero.

    Raises RequestError where a tensor is lacking or of no shape that can be told.
    """
    kinds = {kind for ours, (kind, _) in parts.items() if ours not in ("alpha", "magnitude")}
    if len(kinds) != 1:
        what = " and ".join(sorted(kinds)) or ("an alpha alone" if "alpha" in parts else "a magnitude alone")
        raise RequestError(f"{source}: {name} holds {what}: no change of one kind")
    kind = "tucker" if "mid" in parts else kinds.pop()
    tensors = {ours: tensor.float() for ours, (_, tensor) in parts.items() if ours not in ("alpha", "magnitude")}
    if missing := [ours for ours in NEEDED[kind] if ours not in tensors]:
        raise RequestError(f"{source}: {name} lacks {missing[0]} of its {kind.replace('_', '-')} change")
    alpha = 0.0
    if "alpha" in parts:
        tensor = parts["alpha"][1]
        if tensor.numel() != 1:
            raise RequestError(f"{source}: {name}.alpha is no number but {tuple(tensor.shape)}")
        alpha = float(tensor)
    change = _laid_out(kind, tensors, f"{source}: {name}")
    whole = kind == "kronecker" and not any(ours.endswith("_b") for ours in tensors)
    change.scale = 1.0 if whole or not alpha else alpha / change.rank
    if "magnitude" in parts:
        change.tensors["magnitude"] = _magnitude(*parts["magnitude"], kind == "table", f"{source}: {name}")
    return change


def _magnitude(form: str, tensor: Tensor, of_table: bool, where: str) -> Tensor:
    """(rows,), or (1, columns) where it is that of the columns.

    peft's is of a layer's outputs: the rows of a weight, the columns of a table. lycoris's ``dora_scale`` has the shape
    of the weight, 1 on all axes but one: the second, (1, columns, ...), with its ``wd_on_output`` off.
    """
    if tensor.ndim == 0 or tensor.numel() != max(tensor.shape):
        raise RequestError(f"{where}: its magnitude (DoRA) is {tuple(tensor.shape)}: no vector")
    columns = of_table or (form == "dora_scale" and len(tensor) == 1 and tensor.numel() > 1)
    return tensor.float().reshape((1, -1) if columns else (-1,))


def _laid_out(kind: str, tensors: dict[str, Tensor], where: str) -> Change:
    """A file's tensors as ours: factors with one row a rank."""
    if any(t.ndim == 0 or 0 in t.shape for t in tensors.values()):
        raise RequestError(f"{where} holds an empty tensor")
    if kind == "table":  # of an embedding: its weight is (words, width), and the file's change the transpose of it
        return Change("low_rank", {"down": tensors["down"].t().contiguous(), "up": tensors["up"].contiguous()})
    if kind in ("low_rank", "tucker"):
        down, up = tensors["down"].flatten(1), tensors["up"].flatten(1)
        middle = {"mid": tensors["mid"].contiguous()} if kind == "tucker" else {}
        return Change(kind, {"down": down.contiguous(), "up": up.t().contiguous(), **middle})
    return Change(kind, {ours: tensor.contiguous() for ours, tensor in tensors.items()})


def method_of(changes: Mapping[str, Change]) -> tuple[Imported, dict[str, Tensor]]:
    """The method for changes by site key, and the tensors of its adapters by ``<key>.<name>``."""
    described: dict[str, dict[str, Any]] = {}
    for key, change in changes.items():
        shapes = {name: list(tensor.shape) for name, tensor in change.tensors.items()}
        trains = sum(math.prod(shape) for shape in shapes.values())
        described[key] = {"kind": change.kind, "scale": change.scale, "shapes": shapes, "trains": trains}
    state: dict[str, Tensor] = {}
    for key, change in changes.items():
        inside = "change." if "magnitude" in change.tensors else ""
        state |= {f"{key}.{'' if name == 'magnitude' else inside}{name}": t for name, t in change.tensors.items()}
    return Imported(changes=described), state


def site_key(path: str, parameter: str = "weight") -> str:
    """As ``Site.key`` of a whole tensor."""
    return path.replace(".", "/") + ("" if parameter == "weight" else f":{parameter}")


def collected(model: Any, what: str) -> dict[tuple[str, str], Change]:
    """The active adapters' changes by path and parameter; several of one tensor, or of rows, as one of added rank.

    Raises RequestError where one acts on activations or is no such change, and where there is none.
    """
    found: dict[tuple[str, str], Change] = {}
    for path, port in model.hosts().items():
        if stuck := [name for name in model.active if name in port.around]:
            raise RequestError(f"adapter {stuck[0]!r} acts on activations at {path}: {what} holds changes of weights")
        for parameter in port.on:
            with evaluating(model.bank):  # a method may train another change than the one it leaves
                parts = [(s, r, adapter) for s, rows in port.parts(parameter) for r, adapter in rows]
                if parts:
                    tensor = port.frozen(model.backbone.get_submodule(path), parameter)
                    found[path, parameter] = _one(parts, tensor, f"{path}.{parameter}", what)
                    found[path, parameter].parameter = parameter
    if not found:
        raise RequestError(f"nothing to export: no adapter of {model.backbone_name} that is active changes a weight")
    return found


def _one(parts: list[tuple[float, Any, Any]], tensor: Tensor, where: str, what: str) -> Change:
    strength, rows, adapter = parts[0]
    kind = next((kind for kind, block in KINDS.items() if type(adapter) is block), "")
    if len(parts) == 1 and rows is None:
        if type(adapter) is Decomposed and strength == 1:
            change = _one([(1.0, None, adapter.change)], tensor, where, what)
            return replace(change, tensors=change.tensors | {"magnitude": adapter.magnitude.detach()})
        if type(adapter) is Replacement and strength == 1:
            return Change("replaced", {"value": adapter.value.detach()})
        if kind not in ("", "low_rank"):
            tensors = {name: p.detach() for name, p in adapter.named_parameters()}
            return Change(kind, tensors, float(adapter.scale) * strength)  # type: ignore[arg-type]
    pieces = [(strength, rows, adapter.factors()) for strength, rows, adapter in parts]
    for (_, _, factors), (_, _, adapter) in zip(pieces, parts, strict=True):
        if factors is None or type(adapter).forward is not WeightAdapter.forward:
            raise RequestError(f"{type(adapter).__name__} at {where} is no low-rank change, which {what} wants")
    scales = {factors.scale * strength for strength, _, factors in pieces}
    common = next(iter(scales)) if len(scales) == 1 else None  # else each scale goes into its own factor
    ups = [_padded(f.up.detach(), rows, len(tensor)) * (f.scale * s if common is None else 1) for s, rows, f in pieces]
    downs = [factors.down.detach() for _, _, factors in pieces]
    return Change("low_rank", {"down": torch.cat(downs), "up": torch.cat(ups)}, 1.0 if common is None else common)


def _padded(up: Tensor, rows: tuple[int, int] | None, total: int) -> Tensor:
    """up (r, rows) as (r, total), zero outside its rows."""
    if rows is None:
        return up
    whole = up.new_zeros(len(up), total)
    whole[:, rows[0] : rows[1]] = up
    return whole


def alpha_of(change: Change) -> float:
    """The alpha that gives the scale again when divided by the rank; a whole number where one does."""
    alpha = change.scale * change.rank
    near = (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / change.rank == change.scale), alpha)


def written(
    change: Change, module: nn.Module, names: Mapping[str, str], spell: Callable[[str], str], what: str
) -> dict[str, Tensor]:
    """The tensors of a change as files hold them, factors in the layouts of linear or convolution layers.

    names: our names to the file's, which ``spell`` puts behind the module's.  Raises RequestError for another kind.
    """
    if unknown := [name for name in change.tensors if name not in names]:
        raise RequestError(f"{spell('')} is a {change.kind} change with {unknown[0]}, which {what} does not hold")
    tensors = dict(change.tensors)
    if change.kind in ("low_rank", "tucker"):
        tensors["up"] = tensors["up"].t()
        weight = module._parameters.get("weight")  # as stored: reading it through a host would change it
        if weight is not None and (kernel := weight.shape[2:]):
            ones = (1,) * len(kernel)
            inner = ones if change.kind == "tucker" else kernel
            tensors["down"] = tensors["down"].reshape(change.rank, -1, *inner)
            tensors["up"] = tensors["up"].reshape(*tensors["up"].shape, *ones)
    return {spell(names[name]): tensor.contiguous() for name, tensor in tensors.items()}
