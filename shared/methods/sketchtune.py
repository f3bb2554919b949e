"""SketchTune: weights compressed to codes and small tables of values, which train (Zhang et al., 2025)."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from shared.blocks.placement import called, linears
from shared.blocks.sketch import Sketched
from shared.blocks.sketch_learning import learn
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.statistics import SecondMoment, collect
from shared.store import check_readable
from shared.taxonomy import Record

if TYPE_CHECKING:
    from shared.adapted import Adapted


@dataclass(frozen=True, kw_only=True)
class SketchTune(Method):
    """Every entry of a linear layer's weight is one of 2^bits values of its row and group of columns, which train.

    Not the identity: the model is the compressed one. ``prepare`` learns codes and tables from data, block by block,
    each fed by the compressed blocks before it; until then they round to evenly spaced values.

    bits: of a code (published: 4); codes take 4 bits in any case.  groups: of columns a row (published: 4; 1 to 8).
    exponent: how much more the columns count whose error the output feels (LeanQuant: 3 or 4).
    damping: of the statistics, as a share (LeanQuant: 0.01, its commands 0.1).  samples: of calibration (128).
    dtype: of the tables: "bfloat16" as published loses updates below its precision.
    roles: which linear layers, whole; None means all of the blocks, as published.  depth: which blocks.
    """

    record: ClassVar[Record] = Record(
        categories=("efficient/quantisation",), acts_on="weights", form="in place", mergeable="no",
        trains="rows * groups * 2**bits", needs="samples", spec="sketchtune",
        why="the tables are the weight; ``dequantise`` turns them into a dense one for good",
    )  # fmt: skip

    bits: int = 4
    groups: int = 4
    exponent: float = 4.0
    damping: float = 0.1
    samples: int = 128
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    roles: Sequence[str] | None = None
    depth: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise RequestError(f"SketchTune bits {self.bits}: use 1 to 4")
        if not 0 <= self.exponent < float("inf") or not 0 < self.damping < float("inf"):
            raise RequestError(f"SketchTune exponent {self.exponent} and damping {self.damping}: from 0 and above 0")
        if self.samples < 1:
            raise RequestError(f"SketchTune samples {self.samples}: use at least 1")

    def sites(self, sites: Sites) -> Sites:
        return linears(sites, self.depth) if self.roles is None else sites.select(self.roles, self.depth)

    def build(self, site: Site) -> Sketched:
        host = site.module
        whole = site.parameter == "weight" and site.rows is None
        if not (whole and isinstance(host, torch.nn.Linear) and called(site)):
            raise RequestError(
                f"site {site.key} ({site.role}): SketchTune compresses whole linear layers that are called"
            )
        return Sketched(host, self.bits, self.groups, getattr(torch, self.dtype), site.key)

    def prepare(self, model: Adapted, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        adapters: Any = model.bank[name]
        sites = [site for site in self.sites(model.sites()) if site.key in adapters]
        for depth in sorted({site.depth for site in sites}):
            block = [site for site in sites if site.depth == depth]
            try:
                for site in block:
                    adapters[site.key].bare = True
                for site, moment in collect(model, block, batches, loss, SecondMoment, samples=self.samples):
                    self._learn(adapters[site.key], site, moment)
            finally:
                for site in block:
                    adapters[site.key].bare = False

    def _learn(self, adapter: Sketched, site: Site, moment: SecondMoment) -> None:
        assert moment.total is not None
        weight = site.weight.detach().to(moment.total.device)
        shape = {"exponent": self.exponent, "damping": self.damping, "where": site.key}
        adapter.set(*learn(weight, moment.total, self.bits, self.groups, **shape))


def dequantise(model: Adapted, name: str = "default") -> None:
    """Remove the adapter ``name`` and leave its weights: the dense weights its tables give take the place of the
    frozen ones for good. (``model.remove`` brings the frozen ones back.)"""
    model.unmerge()
    adapters: Any = model.bank[name]
    for adapter in adapters.values():
        weight = adapter.host[0]._parameters["weight"]
        weight.data = adapter.dense().to(weight.dtype)
    model.remove(name)
    model._fingerprint = None


# -- the official files ------------------------------------------------------------------------------------------------


def load_official(model: Adapted, path: str | Path, *, name: str = "default") -> None:
    """Fill the adapter ``name`` from a file of the official code.

    That is ``{layer: (table, codes)}``, a compressed base, or ``{layer: table}``, what was trained on one that is
    loaded already; tables (R, V) are of one group a row. Only tensors are unpickled. Layers of other parts are refused.

    Raises RequestError where the file holds anything else, or its layers and shapes are not those of the adapter.
    """
    adapters: Any = model.bank[name]
    content, state = read_official(path), model.trained_state()
    for layer, value in content.items():
        key = next((k for k in adapters if f".{layer}".endswith("." + _layer(k))), None)
        if key is None:
            raise RequestError(f"{path}: {layer} is no layer that this SketchTune compresses")
        pair = (value,) if isinstance(value, Tensor) else value
        if len(pair) == 1 and name not in model.prepared:
            raise RequestError(f"{path}: it holds trained tables without codes; load its compressed base first")
        for part, tensor in zip(("table", "codes"), pair, strict=False):
            tensor = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
            place = f"adapter.{name}.{key}.{part}"
            if tensor.shape != state[place].shape:
                mine = tuple(state[place].shape)
                raise RequestError(f"{path}: {part} of {layer} is {tuple(tensor.shape)}; the adapter's is {mine}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise RequestError(f"{path}: the table of {layer} holds numbers that are not finite")
            state[place] = tensor
    if len(content) != len(adapters):
        raise RequestError(f"{path}: it has {len(content)} of the {len(adapters)} layers of this SketchTune")
    model.load_trained_state(state, str(path))


def _layer(key: str) -> str:
    return key.replace("/", ".").removeprefix("model.")


def read_official(path: str | Path) -> Mapping[str, Any]:
    """The content of an official file: pairs or tensors by layer, from a plain pickle or one of ``torch.save``."""
    path = Path(path)
    check_readable(path)
    try:
        content = _read(path)
    except Exception as error:  # as many kinds as there are ways in which a file can be broken
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise RequestError(f"{path}: not a file of tensors ({reason})") from error
    valid = isinstance(content, Mapping) and content and all(map(_valid, content.values()))
    if not valid or len({isinstance(value, Tensor) for value in content.values()}) > 1:
        raise RequestError(f"{path}: not a mapping of layers to tables, or to tables and codes")
    return content


def _valid(value: Any) -> bool:
    pair = (value,) if isinstance(value, Tensor) else value
    if not isinstance(pair, (tuple, list)) or len(pair) not in (1, 2) or not all(isinstance(t, Tensor) for t in pair):
        return False
    return pair[0].is_floating_point() and all(t.dtype == torch.uint8 for t in pair[1:])


def _read(path: Path) -> Any:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        return torch.load(file, "cpu", weights_only=True) if zipped else _Tensors(file).load()


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), "cpu", weights_only=True)


class _Tensors(pickle.Unpickler):
    """Unpickles tensors in plain containers; whatever else a pickle would call is refused."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _storage,  # torch's own would unpickle anything
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is no tensor")
        return self.KNOWN[module, name]
