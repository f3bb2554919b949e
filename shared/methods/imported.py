"""Adapters read from another library's file: a change of each weight with a kind, a rank and a scale of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from shared.adapter import WeightAdapter
from shared.blocks.low_rank import Replacement
from shared.blocks.lycoris import AnyRank, Hadamard, Kronecker, Tucker
from shared.blocks.magnitude import Decomposed
from shared.convolution import CONVOLUTIONS
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

KINDS = {"low_rank": AnyRank, "tucker": Tucker, "hadamard": Hadamard, "kronecker": Kronecker}
LAYERS = (nn.Linear, nn.Embedding, nn.MultiheadAttention, *CONVOLUTIONS)  # weights of which files hold changes


@dataclass(frozen=True, kw_only=True)
class Imported(Method):
    """Changes of single weights as another library's file holds them, the identity until it fills them.

    ``shared.interop.import_adapter`` makes this method from a file and fills its adapters.

    changes: by site key (the path of the module with "/" for ".", and ":<parameter>" where that is no weight) a
    mapping of ``kind`` ("low_rank", "tucker", "hadamard", "kronecker": see ``shared.blocks.lycoris``; "replaced": the
    tensor itself), ``scale``, ``shapes`` of its tensors by name, and ``trains``, the number of their values. With a
    "magnitude" among the shapes, (rows,) or (1, columns), the change is of the direction (DoRA), and the norm takes no
    gradient.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank",), acts_on="weights", form="parallel", mergeable="yes",
        trains="changes[site.key]['trains']",
        why="the kinds it reads are LoRA and its relatives; which of them, the file says",
    )  # fmt: skip

    changes: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        for key, change in self.changes.items():
            if change.get("kind") not in (*KINDS, "replaced") or not isinstance(change.get("shapes"), Mapping):
                raise RequestError(f"Imported: change of {key}: wants a kind of {', '.join(KINDS)} and shapes")
            size = sum(math.prod(shape) for shape in change["shapes"].values())
            if change.get("trains") != size:
                raise RequestError(f"Imported: change of {key}: trains {change.get('trains')}, its shapes {size}")

    def sites(self, sites: Sites) -> Sites:
        known = {site.key: site for site in sites}
        return Sites([known.get(key) or site_of(sites, key) for key in self.changes], sites.owner)

    def build(self, site: Site) -> WeightAdapter:
        change = self.changes[site.key]
        if change["kind"] == "replaced":
            shape = tuple(change["shapes"].get("value", ()))
            if shape != tuple(site.weight.shape):
                raise RequestError(f"value of {site.key}: {shape} in place of {tuple(site.weight.shape)}")
            return Replacement(site.weight)
        if not isinstance(site.module, LAYERS):
            names = ", ".join(layer.__name__ for layer in LAYERS)
            raise RequestError(f"change of {site.key}: a {type(site.module).__name__}; can be of {names}")
        try:
            shapes = dict(change["shapes"])
            magnitude = shapes.pop("magnitude", None)
            adapter = KINDS[change["kind"]](tuple(site.weight.shape), shapes, change["scale"], site.key)
            return adapter if magnitude is None else _decomposed(site, adapter, tuple(magnitude))
        except (LookupError, TypeError) as error:
            named = ", ".join(f"{name} {size}" for name, size in change["shapes"].items())
            raise RequestError(f"change of {site.key}: {named} is no {change['kind']} change with a scale") from error


def _decomposed(site: Site, change: WeightAdapter, magnitude: tuple[int, ...]) -> Decomposed:
    adapter = Decomposed(site.weight, change, columns=len(magnitude) == 2)
    if magnitude != (wanted := tuple(adapter.magnitude.shape)):
        raise RequestError(f"change of {site.key}: its magnitude is {magnitude}, wanted {wanted}")
    return adapter


def site_of(sites: Sites, key: str) -> Site:
    """The site of any parameter of the backbone by its key, whether described or not."""
    root = next(site for site in sites if site.role == "model")
    path, _, parameter = key.partition(":")
    try:
        path = path.replace("/", ".")
        module = root.module.get_submodule(path.removeprefix(root.path).lstrip("."))
    except AttributeError as error:
        raise RequestError(f"change of {key}: {sites.owner} has no such module") from error
    if module._parameters.get(parameter or "weight") is None:
        raise RequestError(f"change of {key}: {type(module).__name__} has no parameter {parameter or 'weight'!r}")
    convolution = isinstance(module, tuple(CONVOLUTIONS))
    role = "conv" if convolution else "embedding" if isinstance(module, nn.Embedding) else "linear"
    width = next((len(p) for p in module._parameters.values() if p is not None and p.ndim), 0)
    layout = "BCHW" if convolution else "BNC"
    return Site(role, 0, path, module, parameter or "weight", layout=layout, width=width)
