"""LowFormer (Nottebaum et al., WACV 2025): timm's convolutional transformer as a frozen backbone of four maps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modalities.images.backbones.inputs import byte_statistics, check_image, library, nearest
from modalities.images.backbones.timm_hub import load
from shared import weights as w
from shared.backbone import Backbone, Features
from shared.errors import RequestError
from shared.sites import Site, Sites, norm_sites

ENTRY = "stem.0.conv.weight"
CLASSIFIER = ("in_conv.", "pre_classifier.", "classifier.")


class LowFormer(Backbone):
    """timm's ``LowFormer`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, as the blocks give
    them (no norm follows), and their last one's mean as the summary.

    Any image from 32 pixels a side is taken: sizes that the strides do not divide are rounded up by the convolutions.
    Query, key and value lie interleaved by head in one 1 x 1 convolution (``attention.qkv``), so none of them is a site
    of its own. The E variants have no attention, E1 and E2 no MLP either.

    bands: channels of the image.
    """

    model: Any

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
        if bands < 1:
            raise RequestError(f"{name}: bands {bands}: at least 1 is needed")
        if weights == "random" and checkpoint is not None:
            raise RequestError(f"{name}: weights 'random' and checkpoint {checkpoint!r} exclude each other")
        super().__init__(name)
        self.model = w.build(lambda: _create(name, bands, model_args or {}), seed)
        self.bands = bands
        self.channels = tuple(stage["num_chs"] for stage in self.model.feature_info)
        self.statistics = byte_statistics(self.model.pretrained_cfg, bands)
        self.source = f"random (seed {seed})"
        if weights == "pretrained":
            renamed = partial(_renamed, self.model)
            self.source = load(self.model, name, bands, checkpoint, entry=ENTRY, renamed=renamed)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to maps (B, channels[s], H / 2^(s+2), W / 2^(s+2)), sizes rounded up."""
        check_image(self.name, image, self.bands)
        x, maps = self.model.stem(image), []
        for stage in self.model.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of 64 x 96 pixels, of about unit variance."""
        image = torch.randn(2, self.bands, 64, 96, generator=torch.Generator().manual_seed(0), device="cpu")
        return (image.to(next(self.model.parameters())),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.bands} bands, weights: {self.source})"


def _create(name: str, bands: int, model_args: dict[str, Any]) -> Any:
    timm = library("timm")
    known = timm.list_models(module="lowformer")
    if name.partition(".")[0] not in known:
        raise RequestError(f"{name}: no LowFormer of timm{nearest(name, known)}")
    if taken := [key for key in model_args if key in ("in_chans", "num_classes", "pretrained", "features_only")]:
        raise RequestError(f"{name}: model_args {taken}: use the arguments bands and weights")
    try:
        model = timm.create_model(name, in_chans=bands, **model_args)
    except (TypeError, AssertionError, ValueError, IndexError, RuntimeError) as error:
        raise RequestError(f"{name}: timm refuses {model_args}: {error}") from error
    model.reset_classifier(0, reset_other=True)
    return model


def _renamed(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's or the authors' tensors without the classifier."""
    if any(key.startswith("input_stem.") for key in state):  # the authors' names where their classifier is gone
        state = {f"backbone.{key}": tensor for key, tensor in state.items()}
    state = library("timm.models.lowformer").checkpoint_filter_fn(state, model)
    return {key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIER)}


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
