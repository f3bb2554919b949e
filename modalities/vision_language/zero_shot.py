"""Zero-shot with CLIP: classifiers from class names and templates, similarity maps, weights between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.vision_language.backbones import OpenClip
from shared.adapted import Adapted
from shared.errors import RequestError

CHUNK = 256  # texts encoded at once where no gradient is asked


def class_texts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The texts of each class, its templates in order, class after class; "{}" is where the name goes.

    Raises RequestError where there is no name, an empty one or one twice, no template, or one without "{}".
    """
    if not names:
        raise RequestError("no class names: give at least one")
    if empty := [index for index, name in enumerate(names) if not name.strip()]:
        raise RequestError(f"the name of class {empty[0]} is empty")
    folded = [" ".join(name.lower().split()) for name in names]
    if twice := [name for name, other in zip(names, folded, strict=True) if folded.count(other) > 1]:
        raise RequestError(f"class name {twice[0]!r} is given twice: no text would tell these classes apart")
    if not templates:
        raise RequestError("no templates: give at least one, such as 'a photo of a {}.'")
    if bad := [template for template in templates if template.count("{}") != 1]:
        raise RequestError(f"template {bad[0]!r}: write {{}} once, where the class name goes")
    return [template.replace("{}", name) for name in names for template in templates]


def class_weights(text: Tensor, classes: int) -> Tensor:
    """Embeddings of texts (classes * templates, D) to one a class (classes, D): the mean over templates, of length 1
    (Radford et al., 2021)."""
    mean = text.unflatten(0, (classes, -1)).mean(1)
    return mean / mean.norm(dim=1, keepdim=True)


@torch.no_grad()
def embed_texts(model: Adapted, tokens: Tensor, class_of: Tensor | None = None) -> Tensor:
    """Tokens (N, context) to embeddings (N, D), a part of them at a time, by the adapters in force.

    class_of: the class of each text (N,), for prompts of each class.
    """
    parts = []
    for start in range(0, len(tokens), CHUNK):
        rows = slice(start, start + CHUNK)
        told = {} if class_of is None else {"class_of": class_of[rows]}
        parts.append(_without_head(model, None, tokens[rows], told=told).text)
    return torch.cat(parts)


def classifier(model: Adapted, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Tensor:
    """The weights (classes, D) of a zero-shot classifier, by the adapters in force.

    The logits of images are ``scale * image @ weights.T``. Raises RequestError as ``class_texts`` and ``tokens`` do.
    """
    tokens = clip_of(model).tokens(class_texts(names, templates))
    class_of = torch.arange(len(names), device=tokens.device).repeat_interleave(len(templates))
    return class_weights(embed_texts(model, tokens, class_of), len(names))


@torch.no_grad()
def similarity_maps(model: Adapted, image: Tensor, weights: Tensor) -> Tensor:
    """Images (B, bands, H, W) and class weights (classes, D) to cosines of each patch with each class.

    (B, classes, h, w), one number a patch. The patch tokens of the last block are normed and projected as the class
    token is; the towers were trained to match whole images, so these maps are coarser than those of MaskCLIP (Zhou et
    al., 2022), which takes the last attention's values.
    """
    patches = _without_head(model, image, dense=True).patches
    return torch.einsum("bdhw,kd->bkhw", patches, F.normalize(weights, dim=-1))


def _without_head(model: Adapted, *inputs: Tensor | None, told: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The embeddings, by the adapters in force."""
    try:
        vars(model.context).update(told or {})
        return clip_of(model)(*inputs, **options)
    finally:
        model.context.clear()


def ensembled(zero_shot: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights between a zero-shot and a tuned model, ``(1 - share) * zero_shot + share * tuned`` (WiSE-FT: Wortsman et
    al., 2022); 0 gives the first and 1 the second bit for bit.

    For adapters that change weights, that is their strength: ``model.activate(name, strength=share)``.
    Raises RequestError where names or shapes differ, or ``share`` is not from 0 to 1.
    """
    check_share(share)
    if zero_shot.keys() != tuned.keys():
        raise RequestError(f"weights of two models: {sorted(zero_shot.keys() ^ tuned.keys())[0]} is in one only")
    if bad := [name for name in tuned if zero_shot[name].shape != tuned[name].shape]:
        raise RequestError(f"weights of two models: {bad[0]} has two shapes")
    return {n: between(zero_shot[n], tuned[n], share) for n in tuned}


def between(first: Tensor, second: Tensor, share: float) -> Tensor:
    """What lies at ``share`` of the way; whole numbers (counts, indices) are the second's from one half on."""
    if first.is_floating_point():
        return torch.lerp(first, second, share)
    return second.clone() if share >= 0.5 else first.clone()


def check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise RequestError(f"ensemble {share}: use a share of the tuned model from 0 (zero-shot) to 1")


def clip_of(model: Adapted) -> OpenClip:
    """The model's backbone. Raises RequestError where it has no text tower."""
    backbone: Any = model.backbone
    if not isinstance(backbone, OpenClip):
        raise RequestError(f"{model.backbone_name} has no text tower: use the backbone OpenClip")
    return backbone
