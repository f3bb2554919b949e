"""MV-Adapter: an untouched text-to-image UNet makes consistent views of one object (Huang et al., 2024).

Beside every self-attention stand copies of it: one attends along rows (and columns) of all views, one to what the same
UNet makes of a reference image. An encoder of camera or geometry maps adds its features to the down blocks.

Images of a batch are views: those of one prompt lie together, and with guidance the whole unconditional half comes
first, as a pipeline with ``num_images_per_prompt`` has them. What a call wants travels in the UNet's
``cross_attention_kwargs`` (or in the ``context`` of an adapted model); see ``mv_condition.WANTED``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.multi_view.attention import ViewAttention
from modalities.diffusion.multi_view.condition import Conditioning, condition_encoder
from shared import weights
from shared.adapted import Adapted
from shared.adapter import Adapter
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.store import write_atomically
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class MVAdapter(Method):
    """The published system; with no control maps given it is the identity at the start.

    views: "row", for cameras at one height; "row_column", for the six sides of ``cameras.geometry_guided``.
    reference: a branch that attends to a reference image (published image models).
    condition: the encoder of control maps.  vae_factor: pixels of a side for each of the UNet's (1: no autoencoder).
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="parallel", mergeable="no",
        trains="(4 * site.module.query_dim ** 2 + site.module.query_dim) * (1 + reference) if site.role == 'attention' "
        "else condition and 54 * (vae_factor * (2 if len(c := site.module.config.block_out_channels) == 3 else 1))"
        " ** 2 * c[0] + c[0] + c[0] * c[1] + c[1] + (c[1] * c[2] + c[2] if c[1] != c[2] else 0) + (10 * (c[0] ** 2"
        " + c[1] ** 2 + c[2] ** 2 + c[-1] ** 2) + 2 * (c[0] + c[1] + c[2] + c[-1]))"
        " * site.module.config.layers_per_block",
        modality="diffusion", spec="mv_adapter",
        why="copies of attentions beside the frozen ones; the encoder is counted at its four published levels",
    )  # fmt: skip

    views: Literal["row", "row_column"] = "row"
    reference: bool = False
    condition: bool = True
    vae_factor: int = 8

    def __post_init__(self) -> None:
        if self.vae_factor < 1:
            raise RequestError(f"vae_factor {self.vae_factor}: at least 1")

    def sites(self, sites: Sites) -> Sites:
        return sites.select("attention", tags="self") + sites.select("model")

    def build(self, site: Site) -> Adapter:
        if site.role == "attention":
            return ViewAttention(site.module, published(site), self.views, self.reference)
        encoder = condition_encoder(site.module, self.vae_factor) if self.condition else None
        return Conditioning(site.module, encoder, self.vae_factor, self.reference)

    def example(self) -> dict[str, Any]:
        told: dict[str, Any] = {"num_views": 1}
        if self.condition:
            told["control"] = torch.linspace(0.1, 0.9, 6, device="cpu").view(1, 6, 1, 1)
        if self.reference:
            told["ref_latents"] = torch.full((1, 1, 1, 1), 0.5, device="cpu")
        return told


# -- the released files -----------------------------------------------------------------------------------------------

TEXT_WIDTH = "cross_attention_dim"  # in the metadata of our files: what tells SD1.5 from SD2.1, which have equal shapes
_COPY = re.compile(r"((?:down_blocks|mid_block|up_blocks)\..*attn1\.processor)\.(to_(?:q|k|v|out)_(?:mv|ref)\..+)")
_ENCODER = re.compile(r"adapter\.(conv_in|body)\..+")


def published(site: Site) -> str:
    """The name the published code gives the adapter of a self-attention: that of its processor in the UNet."""
    path = site.path
    start = min(i for i in (path.find("down_blocks"), path.find("mid_block"), path.find("up_blocks")) if i >= 0)
    return f"{path[start:]}.processor"


def is_official(keys: Sequence[str]) -> bool:
    """Whether these are the keys of an MV-Adapter file."""
    return any(match and match[2].startswith("to_q_mv") for match in map(_COPY.fullmatch, keys))


def official_names(method: MVAdapter, sites: Sites) -> dict[str, tuple[Site, str]]:
    """The official key of every tensor of the adapter, with its site and its name there; the map of both ways."""
    names: dict[str, tuple[Site, str]] = {}
    for site in method.sites(sites):
        if site.role == "attention":
            parts = ("mv", "ref") if method.reference else ("mv",)
            inner = [f"to_{p}_{b}{'.0' * (p == 'out')}.weight" for b in parts for p in ("q", "k", "v", "out")]
            inner += [f"to_out_{b}.0.bias" for b in parts]
            names |= {f"{published(site)}.{name}": (site, name) for name in inner}
        elif method.condition:
            with torch.device("meta"):
                encoder = method.build(site).state_dict()
            names |= {name.removeprefix("encoder."): (site, name) for name in encoder}
    return names


def load_official(
    target: nn.Module,
    path: str | os.PathLike,
    *,
    views: str | None = None,
    name: str = "mv_adapter",
    example: Sequence[Any] | None = None,
) -> Adapted:
    """Attach a released file (``mvadapter_{t2mv,i2mv,tg2mv,ig2mv}_{sdxl,sd21}``, or a folder that holds just it).

    target: a diffusers UNet, a backbone around one, or a model adapted already, which gets one more adapter.
    views: "row" or "row_column"; None goes by the file's name, where geometry models have "tg2mv" or "ig2mv" in it.
    example: inputs for the proof of effect; a backbone brings its own.

    Raises RequestError where the file is no MV-Adapter, is damaged, is for another UNet, or has a key that is not used
    or lacks one. The target is unchanged then.
    """
    path = _file(Path(path))
    tensors, told = weights.read(path), _metadata(path)
    if not is_official(list(tensors)):
        raise RequestError(f"{path}: no MV-Adapter: none of its {len(tensors)} keys ends in attn1.processor.to_q_mv")
    views = views or told.get("views") or ("row_column" if re.search(r"[ti]g2mv", path.name) else "row")
    method = MVAdapter(
        views=views,  # type: ignore[arg-type]
        reference=any("_ref." in key for key in tensors),
        condition=any(map(_ENCODER.fullmatch, tensors)),
    )
    sites = target.sites() if isinstance(target, Adapted | Backbone) else unet_sites(target)
    _check_base(tensors, told, sites, path)
    names = official_names(method, sites)
    if problem := _misfit(tensors, names):
        raise RequestError(f"{path}: {problem}")
    model = target if isinstance(target, Adapted) else Adapted(target, sites=sites)
    model.add(method, name=name, example=example)
    found = {key: _tensor(model.bank[name][site.key], inner) for key, (site, inner) in names.items()}  # type: ignore[index]
    if wrong := [key for key, ours in found.items() if ours.shape != tensors[key].shape]:
        model.remove(name)
        shapes = f"{tuple(tensors[wrong[0]].shape)}, here {tuple(found[wrong[0]].shape)}"
        raise RequestError(f"{path}: {len(wrong)} tensors of another shape (first: {wrong[0]} {shapes})")
    with torch.no_grad():
        for key, ours in found.items():
            ours.copy_(tensors[key])
    return model


def save_official(model: Adapted, path: str | os.PathLike, *, name: str | None = None) -> None:
    """Write an MV-Adapter as the published code reads it. name: which adapter; None means the only one of the model."""
    from safetensors.torch import save

    names = [n for n, method in model.methods.items() if isinstance(method, MVAdapter)]
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise RequestError(f"no MV-Adapter {name!r} to save; loaded: {', '.join(names) or 'none'}")
    method: Any = model.methods[name]
    sites = model.sites()
    tensors = {
        key: _tensor(model.bank[name][site.key], inner).detach().cpu().contiguous()  # type: ignore[index]
        for key, (site, inner) in official_names(method, sites).items()
    }
    told = {"views": method.views, TEXT_WIDTH: str(_unet(sites).config.cross_attention_dim)}
    write_atomically(Path(path), save(tensors, metadata=told))


def _tensor(module: Any, inner: str) -> Tensor:
    return module.get_parameter(inner)


def _unet(sites: Sites) -> Any:
    return sites.select("model")[0].module


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise RequestError(f"{path}: {len(found)} .safetensors files in this folder; name the one to load")
    return found[0]


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _check_base(tensors: Mapping[str, Tensor], told: Mapping[str, str], sites: Sites, path: Path) -> None:
    """The file's base must be this UNet's kind, by where its self-attentions are, how wide, and the text's width."""
    theirs = {m[1]: t.shape[0] for k, t in tensors.items() if (m := _COPY.fullmatch(k)) and m[2] == "to_q_mv.weight"}
    ours = {published(site): site.module.query_dim for site in sites.select("attention", tags="self")}  # type: ignore[union-attr]
    if theirs.keys().isdisjoint(ours) or theirs != {n: ours.get(n) for n in theirs} or len(theirs) < len(ours):
        raise RequestError(
            f"{path}: made for {_kind(theirs)} ({len(theirs)} self-attentions, {min(theirs.values())} to "
            f"{max(theirs.values())} wide); this UNet is {_kind(ours)} ({len(ours)}, {min(ours.values())} to "  # type: ignore[type-var]
            f"{max(ours.values())} wide)"  # type: ignore[type-var]
        )
    have = str(_unet(sites).config.cross_attention_dim)
    published_width = "1024" if _kind(theirs) == "SD2.1" else have
    if (want := told.get(TEXT_WIDTH, published_width)) != have:
        raise RequestError(f"{path}: made for a UNet that reads text of width {want}; this one's text is {have} wide")


def _kind(attentions: Mapping[str, Any]) -> str:
    """What the places and widths of the self-attentions tell of a UNet."""
    shape = len(attentions), set(attentions.values())
    known = {(70, frozenset({640, 1280})): "SDXL", (16, frozenset({320, 640, 1280})): "SD2.1"}
    return known.get((shape[0], frozenset(shape[1])), "another UNet")


def _misfit(given: Mapping[str, Tensor], names: Mapping[str, tuple[Site, str]]) -> str:
    """What is left over or missing among the keys, in words; empty where all fit."""
    extra, lacking = [key for key in given if key not in names], [key for key in names if key not in given]
    found = [f"{len(extra)} of its {len(given)} keys not used (first: {extra[0]})"] if extra else []
    found += [f"{len(lacking)} missing (first: {lacking[0]})"] if lacking else []
    return ", ".join(found)
