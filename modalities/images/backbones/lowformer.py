"""LowFormer (Nottebaum et al., WACV 2025): timm's convolutional transformer as a frozen backbone of four maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from modalities.images.backbones.inputs import check_image, library
from modalities.images.backbones.timm_stages import _TimmStages
from shared.backbone import Features
from shared.sites import Site, Sites, norm_sites

CLASSIFIER = ("in_conv.", "pre_classifier.", "classifier.")


class LowFormer(_TimmStages):
    """timm's ``LowFormer`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, as the blocks give
    them (no norm follows), and their last one's mean as the summary.

    Any image from 32 pixels a side is taken: sizes that the strides do not divide are rounded up by the convolutions.
    Query, key and value lie interleaved by head in one 1 x 1 convolution (``attention.qkv``), so none of them is a site
    of its own. The E variants have no attention, E1 and E2 no MLP either.

    bands: channels of the image.
    """

    kind, family, entry = "LowFormer of timm", "lowformer", "stem.0.conv.weight"

    def __init__(
        self,
        bands: int,
        *,
        name: str = "lowformer_b1",
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: timm's model name (lowformer_b0, b1, b15, b2, b3, e1, e2, e3), with a weights tag where wanted.
            weights: "pretrained" (``checkpoint``, else timm's hub) or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file, named as timm or the original authors do.
            seed: of the random weights.
            model_args: further arguments of timm's class, such as width_list, depth_list, head_widths.

        Raises RequestError where the name, an argument or the weights do not fit.
        """
        super().__init__(bands, name, weights, checkpoint, seed, model_args)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to maps (B, channels[s], H / 2^(s+2), W / 2^(s+2)), sizes rounded up."""
        check_image(self.name, image, self.bands)
        x, maps = self.model.stem(image), []
        for stage in self.model.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's or the authors' tensors without the classifier."""
        if any(key.startswith("input_stem.") for key in state):  # the authors' names where their classifier is gone
            state = {f"backbone.{key}": tensor for key, tensor in state.items()}
        state = library("timm.models.lowformer").checkpoint_filter_fn(state, self.model)
        return {key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIER)}

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)


def _sites(backbone: LowFormer) -> Iterator[Site]:
    """One block each: a stage's downsampling and what follows it; the stem belongs before the first."""
    model, depth = backbone.model, -1
    yield Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands)
    for i, part in enumerate(model.stem):
        yield from _convolutions(f"model.stem.{i}", part, depth, ("patch_embed",) if i == 0 else ())
    for s, stage in enumerate(model.stages):
        for i, block in enumerate(stage):
            depth += 1
            path, width = f"model.stages.{s}.{i}", backbone.channels[s]
            more: dict[str, Any] = {"inputs": _inputs(block), "tags": (f"stage{s}",)}
            yield Site("block", depth, path, block, parameter=None, layout="BCHW", width=width, **more)
            if hasattr(block, "local"):
                yield from _attention(path, block, depth, width)
                yield from _mlp(path, block, depth, width)
                yield from _convolutions(f"{path}.local", block.local, depth)
            else:
                yield from _convolutions(path, block, depth, ("downsample",) if s > 1 or i == 0 else ())


def _inputs(block: nn.Module) -> int:
    """The channels that a block takes."""
    return next(module.in_channels for module in block.modules() if isinstance(module, nn.Conv2d))


def _attention(path: str, block: Any, depth: int, width: int) -> Iterator[Site]:
    if isinstance(block.attn, nn.Identity):
        return
    parts: dict[str, Any] = dict(block.attn.main.named_children()) if isinstance(block.attn.main, nn.Sequential) else {}
    where = f"{path}.attn.main" + (".1" if parts else "")
    attention: Any = parts.get("1", block.attn.main)
    if parts:
        yield from norm_sites(f"{path}.attn.main.0", parts["0"], depth, 0, "attention", layout="BCHW")
    yield Site("attention", depth, where, attention, parameter=None, layout="BCHW", width=width)
    yield from _convolutions(f"{where}.conv_proj", attention.conv_proj, depth)
    inside = attention.pwise.out_channels
    yield Site("attention.qkv", depth, f"{where}.pwise", attention.pwise, layout="BCHW", width=inside)


def _mlp(path: str, block: Any, depth: int, width: int) -> Iterator[Site]:
    if isinstance(block.mlp, nn.Identity):
        return
    norm, up, _, down, _ = block.mlp.main
    where = f"{path}.mlp.main"
    yield from norm_sites(f"{where}.0", norm, depth, 0, "mlp", layout="BCHW")
    yield Site("mlp", depth, where, block.mlp.main, parameter=None, layout="BCHW", width=width)
    yield Site("mlp.up", depth, f"{where}.1", up, layout="BCHW", width=up.out_channels)
    yield Site("mlp.down", depth, f"{where}.3", down, layout="BCHW", width=width)


def _convolutions(path: str, part: nn.Module, depth: int, tags: tuple[str, ...] = ()) -> Iterator[Site]:
    """The convolutions and batch norms below a part; those of one channel a group are tagged "depthwise"."""
    for name, module in part.named_modules():
        where = f"{path}.{name}".rstrip(".")
        if isinstance(module, nn.Conv2d):
            own = ("depthwise",) if module.groups == module.in_channels > 1 else ()
            yield Site("conv", depth, where, module, layout="BCHW", width=module.out_channels, tags=(*tags, *own))
        elif isinstance(module, nn.BatchNorm2d):
            yield from norm_sites(where, module, depth, layout="BCHW")
