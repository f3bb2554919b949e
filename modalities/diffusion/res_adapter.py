"""ResAdapter: one small adapter lets a text-to-image UNet work at sizes it never saw (Cheng et al., 2024).

Low-rank convolutions on the resampling layers carry sizes below the training size; the affine part of the resnets'
GroupNorms, replaced, carries those above it. Neither touches the layers that hold a model's style.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.res_adapter_files import LORA_FILES, NORM_FILES, other_base, read_folder
from shared.adapted import Adapted
from shared.backbone import Backbone
from shared.blocks.low_rank import LowRank, Replacement
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.store import write_atomically
from shared.taxonomy import Record


@dataclass(frozen=True, kw_only=True)
class ResAdapter(Method):
    """Low-rank resampling convolutions (ResCLoRA) and replaced resnet norms (ResENorm), the identity at the start.

    rank: inner width of the convolutions (released files: 16, one has 32).  alpha: numerator of their scale, over rank
    (released files: 8).  convolutions, norms: the two parts; sizes below the base's need the first, above it both.
    norm_strength: 0 (the frozen norms) to 1 (the trained ones). The strength of an activation is the convolutions'
    alone, as in the official loader.
    """

    record: ClassVar[Record] = Record(
        categories=("reparameterised/low-rank", "additive/adapter"), acts_on="weights", form="parallel",
        mergeable="yes", trains="size if site.role == 'norm' else rank * (rows + columns)",
        modality="diffusion", spec="res_adapter",
    )  # fmt: skip

    rank: int = 16
    alpha: float = 8.0
    convolutions: bool = True
    norms: bool = True
    norm_strength: float = 1.0

    def __post_init__(self) -> None:
        if not (self.convolutions or self.norms):
            raise RequestError("ResAdapter with neither convolutions nor norms: switch one of them on")
        _check_strength(self.norm_strength)

    def sites(self, sites: Sites) -> Sites:
        chosen: list[Site] = []
        if self.convolutions:
            chosen += sites.select("conv", tags="resample")
        if self.norms:
            chosen += sites.select("norm", tags="resnet")
        return Sites(chosen, sites.owner)

    def build(self, site: Site) -> LowRank | ResolutionNorm:
        if site.role == "norm":
            return ResolutionNorm(site.weight, self.norm_strength)
        return LowRank(site.weight.shape, self.rank, self.alpha / max(self.rank, 1), where=site.key)


class ResolutionNorm(Replacement):
    """The weight or bias (C,) of a GroupNorm, trained in place of the frozen one. Its strength is its own."""

    def __init__(self, weight: Tensor, strength: float):
        super().__init__(weight)
        self.strength = float(strength)

    def forward(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return super().forward(weight, self.strength)


def set_norm_strength(model: Adapted, strength: float, *, name: str | None = None) -> None:
    """Blend the norms of a ResAdapter: ``(1 - strength) * frozen + strength * trained``, from the next call on.

    name: which adapter; None means the only ResAdapter of the model.
    """
    name = _only(model, name)
    _check_strength(strength)
    if model.state.merged:
        raise RequestError("adapters are merged into the weights; unmerge() before changing the norm strength")
    for module in model.bank[name].values():  # type: ignore[operator]
        if isinstance(module, ResolutionNorm):
            module.strength = float(strength)
    model.methods[name] = dataclasses.replace(model.methods[name], norm_strength=float(strength))  # type: ignore[type-var]


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise RequestError(f"norm_strength {strength:g}: use 0 (the frozen norms) to 1 (the trained ones)")


def _only(model: Adapted, name: str | None) -> str:
    names = [n for n, method in model.methods.items() if isinstance(method, ResAdapter)]
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        asked = "there are several ResAdapters, name one" if name is None and names else f"no ResAdapter {name!r}"
        raise RequestError(f"{asked}; loaded: {', '.join(names) or 'none'}")
    return name


# -- the official files ------------------------------------------------------------------------------------------------


def official_names(sites: Sites) -> dict[str, tuple[Site, str]]:
    """The official key of every tensor of these sites, with the site and the tensor's name there.

    Convolutions have kohya names ("lora_unet_down_blocks_0_downsamplers_0_conv" with ``.lora_down.weight``,
    ``.lora_up.weight``, ``.alpha``), norms those of the UNet. This is the one map that loading and saving use.
    """
    names: dict[str, tuple[Site, str]] = {}
    for site in sites:
        path = site.path[re.search(r"down_blocks|mid_block|up_blocks", site.path).start() :]  # type: ignore[union-attr]
        if site.role == "norm":
            names[f"{path}.{site.parameter}"] = (site, "value")
            continue
        stem = "lora_unet_" + path.replace(".", "_")
        names[f"{stem}.lora_down.weight"] = (site, "down")
        names[f"{stem}.lora_up.weight"] = (site, "up")
        names[f"{stem}.alpha"] = (site, "alpha")
    return names


def load_official(
    target: nn.Module,
    folder: str | os.PathLike,
    *,
    name: str = "res_adapter",
    norm_strength: float = 1.0,
    example: Sequence[Any] | None = None,
) -> Adapted:
    """Attach a released ResAdapter folder, with its convolution file, its normalisation file, or both; or one file.

    target: a diffusers UNet, a backbone around one, or a model adapted already, which gets one more adapter.
    example: inputs for the proof of effect; a backbone brings its own.

    Raises RequestError where the folder has neither part, or a file is cut short, holds a value that is not finite,
    has a key that is not used, lacks one, or is for another UNet. The target is unchanged then.
    """
    lora, norms = read_folder(Path(folder))
    return attach_official(
        target, lora, norms, name=name, norm_strength=norm_strength, example=example, source=str(folder)
    )


def attach_official(
    target: nn.Module,
    lora: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    *,
    name: str = "res_adapter",
    norm_strength: float = 1.0,
    example: Sequence[Any] | None = None,
    source: str = "state",
) -> Adapted:
    """``load_official`` for tensors in memory; one of the two may be empty. Rank and alpha are read from ``lora``."""
    rank, alpha = _rank_and_alpha(lora, source)
    _check_strength(norm_strength)
    method = ResAdapter(rank=rank, alpha=alpha, convolutions=bool(lora), norms=bool(norms))
    sites = _sites(target)
    names = official_names(method.sites(sites))
    _check_fit({**lora, **norms}, names, rank, f"{source}: made for another UNet than this {sites.owner}")
    model = target if isinstance(target, Adapted) else Adapted(target, sites=sites)
    model.add(method, name=name, example=example)
    with torch.no_grad():
        for key, tensor in {**lora, **norms}.items():
            site, part = names[key]
            if part != "alpha":
                getattr(model.bank[name][site.key], part).copy_(_ours(part, tensor))  # type: ignore[index]
    if norm_strength != 1.0:  # only now: norms without strength would not pass the proof of effect
        set_norm_strength(model, norm_strength, name=name)
    return model


def save_official(model: Adapted, folder: str | os.PathLike, *, name: str | None = None) -> None:
    """Write a ResAdapter as the official loader reads it: float16 convolutions, float32 norms, the official names.

    name: which adapter; None means the only ResAdapter of the model. A part the adapter does not have gets no file.

    Raises RequestError where a value does not fit its precision, or the folder holds a file of the part not written.
    """
    from safetensors.torch import save

    name, folder = _only(model, name), Path(folder)
    method: Any = model.methods[name]
    parts: dict[str, dict[str, Tensor]] = {LORA_FILES[0]: {}, NORM_FILES[0]: {}}
    for key, (site, part) in official_names(method.sites(model.sites())).items():
        module = model.bank[name][site.key]  # type: ignore[index]
        value = torch.tensor(method.alpha) if part == "alpha" else getattr(module, part).detach().cpu()
        file, dtype = (NORM_FILES[0], torch.float32) if part == "value" else (LORA_FILES[0], torch.float16)
        tensor = _official(part, value, site.weight.shape).to(dtype).contiguous()
        if not tensor.isfinite().all():
            raise RequestError(f"{folder / file}: {key} holds a value that {dtype} cannot: nothing written")
        parts[file][key] = tensor
    for kind, tensors in zip((LORA_FILES, NORM_FILES), parts.values(), strict=True):
        if stale := [file for file in kind if (folder / file).exists() and not (tensors and file == kind[0])]:
            raise RequestError(f"{folder / stale[0]}: belongs to another adapter; save to an empty folder")
    for file, tensors in parts.items():
        if tensors:
            write_atomically(folder / file, save(tensors))


def _ours(part: str, tensor: Tensor) -> Tensor:
    """A tensor as a module holds it: down (r, C_in * k * k), up (r, C_out), value (C,)."""
    if part == "value":
        return tensor
    return tensor.flatten(1) if part == "down" else tensor.flatten(1).t()


def _official(part: str, tensor: Tensor, weight: torch.Size) -> Tensor:
    """A tensor as the files hold it: down (r, C_in, k, k), up (C_out, r, 1, 1), value (C,), alpha ()."""
    if part in ("value", "alpha"):
        return tensor
    return tensor.reshape(-1, *weight[1:]) if part == "down" else tensor.t()[..., None, None]


def _sites(target: nn.Module) -> Sites:
    return target.sites() if isinstance(target, Adapted | Backbone) else unet_sites(target)


def _rank_and_alpha(lora: Mapping[str, Tensor], source: str) -> tuple[int, float]:
    """Of the convolutions, which must agree; a missing alpha means the rank, as in kohya's format."""
    ranks = {key.rpartition(".lora_")[0]: t.shape[0] for key, t in lora.items() if key.endswith(".lora_down.weight")}
    alphas = {stem: float(lora[f"{stem}.alpha"]) if f"{stem}.alpha" in lora else float(r) for stem, r in ranks.items()}
    for what, values in (("rank", set(ranks.values())), ("alpha", set(alphas.values()))):
        if len(values) > 1:
            raise RequestError(f"{source}: its convolutions differ in {what}: {', '.join(map(str, sorted(values)))}")
    if lora and not ranks:
        raise RequestError(f"{source}: a convolution file without any .lora_down.weight")
    return (ranks.popitem()[1], alphas.popitem()[1]) if ranks else (ResAdapter.rank, ResAdapter.alpha)


def _check_fit(given: Mapping[str, Tensor], names: Mapping[str, tuple[Site, str]], rank: int, problem: str) -> None:
    """Every key used, every tensor there, every shape right."""

    def shape(site: Site, part: str) -> tuple[int, ...]:
        weight = tuple(site.weight.shape)
        return {"value": weight, "alpha": (), "down": (rank, *weight[1:]), "up": (weight[0], rank, 1, 1)}[part]

    extra = [key for key in given if key not in names]
    lacking = [key for key, (_, part) in names.items() if key not in given and part != "alpha"]
    wrong = [key for key in given if key in names and tuple(given[key].shape) != shape(*names[key])]
    base = other_base(given, names)
    found = [base] if base else []
    found += [f"{len(extra)} of its {len(given)} keys not used (first: {extra[0]})"] if extra else []
    found += [f"{len(lacking)} missing (first: {lacking[0]})"] if lacking else []
    if wrong:
        sizes = f"{tuple(given[wrong[0]].shape)}, here {shape(*names[wrong[0]])}"
        found += [f"{len(wrong)} of another shape (first: {wrong[0]} {sizes})"]
    if found:
        raise RequestError(f"{problem}: {', '.join(found)}")
