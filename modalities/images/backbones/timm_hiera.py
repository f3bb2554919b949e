"""Hiera (Ryali et al., ICML 2023), the image encoder of SAM 2 (Ravi et al., 2024): timm's, with maps of four stages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from modalities.images.backbones.inputs import (
    byte_statistics,
    check_image,
    check_multiple,
    library,
    nearest,
)
from modalities.images.backbones.sites import QKV
from modalities.images.backbones.timm_hub import load
from shared import weights as w
from shared.backbone import Backbone, Features
from shared.errors import RequestError
from shared.sites import Site, Sites, norm_sites

ENTRY = "patch_embed.proj.weight"
OFFICIAL = "image_encoder.trunk."  # in a whole checkpoint of SAM 2


class TimmHiera(Backbone):
    """timm's ``HieraDet`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, as the blocks give
    them (SAM 2 has no norm there), and the last one's mean as the summary.

    Images of any height and width that are multiples of ``step`` (32 pixels in SAM 2) are taken: the stored positions
    repeat every 8 of the finest grid. Inside, channels come last (B, h, w, C); the first block of a stage takes fewer
    than it gives. Most attentions see windows, which are filled up with zeros beyond an image's edge.

    bands: channels of the image.
    """

    model: Any

    def __init__(
        self,
        bands: int,
        *,
        name: str = "sam2_hiera_large",
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: timm's model name (sam2_hiera_tiny, small, base_plus, large), with a weights tag where wanted.
            weights: "pretrained" (``checkpoint``, else timm's hub) or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file, named as timm does, or a whole one of SAM 2.
            seed: of the random weights.
            model_args: further arguments of timm's class, such as embed_dim, num_heads, stages, global_att_blocks.

        Raises RequestError where the name, an argument or the weights do not fit.
        """
        if bands < 1:
            raise RequestError(f"{name}: bands {bands}: at least 1 is needed")
        if weights == "random" and checkpoint is not None:
            raise RequestError(f"{name}: weights 'random' and checkpoint {checkpoint!r} exclude each other")
        super().__init__(name)
        self.model = w.build(lambda: _create(name, bands, model_args or {}), seed)
        self.bands = bands
        self.channels = tuple(stage["num_chs"] for stage in self.model.feature_info)
        self.step = max(4 * self.model.window_spec[0], 4 * 2 ** len(self.model.q_pool_blocks))
        self.statistics = byte_statistics(self.model.pretrained_cfg, bands)
        self.source = f"random (seed {seed})"
        if weights == "pretrained":
            renamed = partial(_renamed, self.model)
            self.source = load(self.model, name, bands, checkpoint, entry=ENTRY, renamed=renamed)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to maps (B, channels[s], H / 2^(s+2), W / 2^(s+2))."""
        check_image(self.name, image, self.bands)
        check_multiple(self.name, (image.shape[2], image.shape[3]), (self.step, self.step))
        x, maps = self.model._pos_embed(self.model.patch_embed(image)), []
        for depth, block in enumerate(self.model.blocks):
            x = block(x)
            if depth in self.model.stage_ends:
                maps.append(x.permute(0, 3, 1, 2))
        return Features(tuple(maps), x.mean((1, 2)))

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of 2 x 3 steps, of about unit variance."""
        shape = (2, self.bands, 2 * self.step, 3 * self.step)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return (image.to(next(self.model.parameters())),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.bands} bands, weights: {self.source})"


def _create(name: str, bands: int, model_args: dict[str, Any]) -> Any:
    timm = library("timm")
    known = timm.list_models(module="hieradet_sam2")
    if name.partition(".")[0] not in known:
        raise RequestError(f"{name}: no Hiera of timm's SAM 2{nearest(name, known)}")
    if taken := [key for key in model_args if key in ("in_chans", "num_classes", "pretrained", "features_only")]:
        raise RequestError(f"{name}: model_args {taken}: use the arguments bands and weights")
    try:
        model = timm.create_model(name, in_chans=bands, **model_args)
    except (TypeError, AssertionError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise RequestError(f"{name}: timm refuses {model_args}: {error}") from error
    model.reset_classifier(0, reset_other=True)
    return model


def _renamed(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors, or the encoder's of a whole SAM 2 file, without a head."""
    if any(key.startswith(OFFICIAL) for key in state):
        state = {key.removeprefix(OFFICIAL): tensor for key, tensor in state.items() if key.startswith(OFFICIAL)}
    state = library("timm.models.hieradet_sam2").checkpoint_filter_fn(state, model)
    return {key: tensor for key, tensor in state.items() if not key.startswith("head.")}


def _sites(backbone: TimmHiera) -> Iterator[Site]:
    model = backbone.model
    conv, entry = model.patch_embed.proj, ("patch_embed",)
    yield Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands)
    yield Site("conv", -1, "model.patch_embed.proj", conv, layout="BCHW", width=conv.out_channels, tags=entry)
    stage = 0
    for depth, block in enumerate(model.blocks):
        stage += depth - 1 in model.stage_ends
        yield from _block(f"model.blocks.{depth}", block, depth, (f"stage{stage}",))


def _block(path: str, block: Any, depth: int, tags: tuple[str, ...]) -> Iterator[Site]:
    """A block; where it changes the channels, ``proj`` is its shortcut."""
    width, mlp = block.dim_out, block.mlp
    inner = mlp.fc1.out_features
    yield Site("block", depth, path, block, None, layout="BHWC", width=width, inputs=block.dim, tags=tags)
    yield from _attention(f"{path}.attn", block.attn, depth, block.dim, width)
    yield Site("mlp", depth, f"{path}.mlp", mlp, None, layout="BHWC", width=width)
    yield Site("mlp.up", depth, f"{path}.mlp.fc1", mlp.fc1, layout="BHWC", width=inner, inputs=width)
    yield Site("mlp.down", depth, f"{path}.mlp.fc2", mlp.fc2, layout="BHWC", width=width, inputs=inner)
    if block.dim != width:
        more: dict[str, Any] = {"inputs": block.dim, "tags": ("shortcut",)}
        yield Site("linear", depth, f"{path}.proj", block.proj, layout="BHWC", width=width, **more)
    for name in ("norm1", "norm2"):
        yield from norm_sites(f"{path}.{name}", getattr(block, name), depth, layout="BHWC")


def _attention(path: str, attention: Any, depth: int, inputs: int, width: int) -> Iterator[Site]:
    """It and its projections see the windows (B * windows, h, w, C) where the block has any."""
    qkv, proj = attention.qkv, attention.proj
    more: dict[str, Any] = {"layout": "BHWC", "inputs": inputs}
    yield Site("attention", depth, path, attention, None, width=width, **more)
    yield Site("attention.qkv", depth, f"{path}.qkv", qkv, width=3 * width, **more)
    for i, role in enumerate(QKV):
        yield Site(role, depth, f"{path}.qkv", qkv, rows=(i * width, (i + 1) * width), width=width, **more)
    yield Site("attention.output", depth, f"{path}.proj", proj, layout="BHWC", width=width)
