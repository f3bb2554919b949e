"""Hiera (Ryali et al., ICML 2023), the image encoder of SAM 2 (Ravi et al., 2024): timm's, with maps of four stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from modalities.images.backbones.inputs import check_image, check_multiple, example_images, library
from modalities.images.backbones.sites import QKV
from modalities.images.backbones.timm_stages import _TimmStages
from shared.backbone import Features
from shared.sites import Site, Sites, norm_sites

OFFICIAL = "image_encoder.trunk."  # in a whole checkpoint of SAM 2


class TimmHiera(_TimmStages):
    """timm's ``HieraDet`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, as the blocks give
    them (SAM 2 has no norm there), and the last one's mean as the summary.

    Images of any height and width that are multiples of ``step`` (32 pixels in SAM 2) are taken: the stored positions
    repeat every 8 of the finest grid. Inside, channels come last (B, h, w, C); the first block of a stage takes fewer
    than it gives. Most attentions see windows, which are filled up with zeros beyond an image's edge.

    bands: channels of the image.
    """

    kind, family, entry = "Hiera of timm's SAM 2", "hieradet_sam2", "patch_embed.proj.weight"

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
        super().__init__(bands, name, weights, checkpoint, seed, model_args)
        self.step = max(4 * self.model.window_spec[0], 4 * 2 ** len(self.model.q_pool_blocks))

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

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's tensors, or the encoder's of a whole SAM 2 file, without a head."""
        if any(key.startswith(OFFICIAL) for key in state):
            state = {key.removeprefix(OFFICIAL): tensor for key, tensor in state.items() if key.startswith(OFFICIAL)}
        state = library("timm.models.hieradet_sam2").checkpoint_filter_fn(state, self.model)
        return {key: tensor for key, tensor in state.items() if not key.startswith("head.")}

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of 2 x 3 steps, of about unit variance."""
        return (example_images(self.model, self.bands, 2 * self.step, 3 * self.step),)


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
