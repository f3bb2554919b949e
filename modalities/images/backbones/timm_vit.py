"""timm vision transformers (ViT, DeiT, DINOv2; EVA, DINOv3) at any image and patch size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from modalities.images.backbones.inputs import (
    byte_statistics,
    check_bands,
    check_image,
    check_multiple,
    evenly_spaced,
    example_images,
    fit_bands,
    library,
    nearest,
    pair,
)
from modalities.images.backbones.sites import timm_sites
from modalities.images.backbones.timm_hub import HUB_FILES, repository
from shared import weights as w
from shared.backbone import Embedded, TokenBackbone
from shared.errors import RequestError
from shared.sites import Sites

FAMILIES = ("vision_transformer", "deit", "eva")
OURS = ("img_size", "patch_size", "in_chans", "num_classes", "dynamic_img_size", "pretrained")


class TimmViT(TokenBackbone):
    """A timm ``VisionTransformer`` or ``Eva`` (Dosovitskiy et al., 2021; Oquab et al., 2023; Siméoni et al., 2025).

    Tokens, blocks and norms are the library's own modules, at ``self.model``, so maps equal its
    ``forward_intermediates`` bit for bit. Images of any height and width that are multiples of the patch are taken,
    whatever ``image_size``: positions are resampled as timm does. The summary is the class token after the final norm,
    the mean of the grid where there is none, and timm's pooled vector where its norm or attention acts on the pool.

    bands: channels of the image.
    """

    model: Any  # timm's class, known only where timm is installed

    def __init__(
        self,
        bands: int,
        *,
        name: str,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        depths: Sequence[int] | None = None,
        normed: bool = True,
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: timm's model name, with a weights tag where wanted ("vit_large_patch14_dinov2.lvd142m").
            image_size: pixels, one side or (height, width), of the stored position grid; None means the model's own.
            patch_size: pixels of a patch's side; None means the model's own. Pretrained kernels are resampled.
            depths: blocks (0-based) whose output becomes a map; None means four evenly spaced, the last included.
            normed: apply the final norm to the maps, where the model has one before its pooling.
            weights: "pretrained" (``checkpoint``, else timm's hub) or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file, named as timm or the original authors do.
            seed: of the random weights.
            model_args: further arguments of timm's model class, such as embed_dim, depth, num_heads.

        Raises RequestError where the name, a size, an argument or the weights do not fit.
        """
        check_bands(name, bands)
        if patch_size is not None and patch_size < 1:
            raise RequestError(f"{name}: patch_size {patch_size}: at least 1 is needed")
        w.check_choice(name, weights, checkpoint)
        sizes = {"img_size": None if image_size is None else pair(image_size), "patch_size": patch_size}
        given = {key: value for key, value in sizes.items() if value is not None} | {"in_chans": bands}
        model = w.build(lambda: _create(name, given, model_args or {}), seed)
        super().__init__(
            name,
            depths=evenly_spaced(len(model.blocks)) if depths is None else depths,
            total=len(model.blocks),
            width=model.embed_dim,
            prefix=model.num_prefix_tokens,
            normed=normed,
        )
        self.model, self.bands = model, bands
        self.image_size, self.patch_size = model.patch_embed.img_size, model.patch_embed.patch_size
        self.statistics = byte_statistics(model.pretrained_cfg, bands)
        check_multiple(name, self.image_size, self.patch_size)
        self.source = _load(model, name, bands, checkpoint) if weights == "pretrained" else f"random (seed {seed})"

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:  # type: ignore[override]
        return self.model.blocks

    def embed(self, image: Tensor) -> Embedded:
        check_image(self.name, image, self.bands)
        check_multiple(self.name, (image.shape[2], image.shape[3]), self.patch_size)
        patches = self.model.patch_embed(image)
        grid = (patches.shape[1], patches.shape[2])
        if hasattr(self.model, "rope"):  # Eva
            tokens, rope = self.model._pos_embed(patches)
            return Embedded(self.model.norm_pre(tokens), grid, {"rope": rope})
        tokens = self.model.patch_drop(self.model._pos_embed(patches))
        return Embedded(self.model.norm_pre(tokens), grid, {})

    def final(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def summarise(self, tokens: Tensor) -> Tensor:
        tokens = self.final(tokens)
        if self.model.attn_pool is not None or not isinstance(self.model.fc_norm, nn.Identity):
            return self.model.forward_head(tokens, pre_logits=True)
        return tokens[:, 0] if self.model.cls_token is not None else tokens[:, self.prefix :].mean(1)

    def sites(self) -> Sites:
        return timm_sites(self)

    def example(self) -> tuple[Tensor]:
        """Two images (batch norms need more than one value) of 2 x 3 patches, of about unit variance."""
        return (example_images(self.model, self.bands, 2 * self.patch_size[0], 3 * self.patch_size[1]),)

    def __repr__(self) -> str:
        size, patch = (" x ".join(map(str, pixels)) for pixels in (self.image_size, self.patch_size))
        what = f"{self.name}, {self.bands} bands, image {size}, patch {patch}, maps after blocks {self.depths}"
        return f"{type(self).__name__}({what}, weights: {self.source})"


def _create(name: str, given: dict[str, Any], model_args: dict[str, Any]) -> Any:
    """timm's model without a classifier, for any image size; RequestError where it is none we can take apart."""
    timm = library("timm")
    _check_name(timm, name)
    if taken := [key for key in model_args if key in OURS]:
        raise RequestError(f"{name}: model_args {taken}: use the arguments bands, image_size, patch_size, weights")
    try:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **given, **model_args)
    except (TypeError, AssertionError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise RequestError(f"{name}: timm refuses {given | model_args}: {error}") from error
    if not isinstance(model, (timm.models.VisionTransformer, timm.models.Eva)):
        raise RequestError(f"{name}: timm made a {type(model).__name__}; a VisionTransformer or Eva is needed")
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in model.blocks):
        raise RequestError(f"{name}: blocks without one attn and one mlp ({type(model.blocks[0]).__name__}) do not fit")
    if getattr(model, "rope_mixed", False):
        raise RequestError(f"{name}: rotary positions that differ from block to block do not fit")
    return model


def _check_name(timm: Any, name: str) -> None:
    architecture, _, tag = name.partition(".")
    known = [model for family in FAMILIES for model in timm.list_models(module=family)]
    if architecture not in known:
        what = "a timm model but no ViT or Eva" if timm.is_model(architecture) else "no model of timm"
        raise RequestError(f"{name}: {what}{nearest(architecture, known)}")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        raise RequestError(f"{name}: no such weights; {architecture} has {', '.join(tagged) or 'none'}")


def _load(model: Any, name: str, bands: int, checkpoint: str | None) -> str:
    """Fill the model from a file or the hub and say which; on the meta device nothing is read."""
    source = f"file: {checkpoint}" if checkpoint is not None else f"timm hub: {repository(name)}"
    if w.is_meta(model):
        return f"{source} (not loaded: meta device)"
    file = checkpoint if checkpoint is not None else w.fetch(name, repository(name), HUB_FILES)
    state = w.read(file)
    try:
        state = _convert(model, name, state)
    except (RuntimeError, KeyError, AttributeError, ValueError, AssertionError) as error:
        raise RequestError(f"{source}: timm cannot bring it into the form of {name} ({error})") from error
    if "patch_embed.proj.weight" in state:
        state["patch_embed.proj.weight"] = fit_bands(state["patch_embed.proj.weight"], bands, source)
    w.fill(model, state, name, source)
    return source


def _convert(model: Any, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's own renaming and resampling (patch kernel, position grid), with the options it gives each family."""
    eva = hasattr(model, "rope")
    convert = library("timm.models.eva" if eva else "timm.models.vision_transformer").checkpoint_filter_fn
    options: dict[str, Any] = {}
    if name.startswith("deit"):
        options = {"adapt_layer_scale": True}
    elif "flexi" in name or "radio" in name:
        options = {"interpolation": "bilinear", "antialias": False}
        if "base_patch16_radio_v3" in name or "huge_patch16_radio_v3" in name:
            options["align_corners"] = True
    with contextlib.redirect_stdout(io.StringIO()):  # timm prints an exception for every bias it drops
        return convert(state, model, **options)
