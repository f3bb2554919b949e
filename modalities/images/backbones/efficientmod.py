"""EfficientMod (Ma et al., ICLR 2024), built here as timm lacks it: modulation blocks in four stages, channels last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones.inputs import check_bands, check_image, example_images, fit_bands, nearest
from shared import weights as w
from shared.backbone import Backbone, Features
from shared.errors import RequestError
from shared.sites import Site, Sites, norm_sites

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # of values from 0 to 255
CONTEXT = 7  # pixels of the context's kernel


class Shape(NamedTuple):
    """Of each stage: channels, modulation blocks, attention blocks behind them, their MLP's ratio; the ratios that
    the modulation blocks take in turn."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    attentions: tuple[int, ...]
    attention_ratios: tuple[int, ...]
    ratios: tuple[int, ...]


SHAPES = {
    "efficientmod_xxs": Shape((32, 64, 128, 256), (2, 2, 6, 2), (0, 0, 1, 2), (0, 0, 4, 4), (1, 6)),
    "efficientmod_xs": Shape((32, 64, 144, 288), (3, 3, 4, 2), (0, 0, 3, 3), (0, 0, 4, 4), (1, 4)),
    "efficientmod_s": Shape((32, 64, 144, 312), (4, 4, 8, 4), (0, 0, 4, 4), (0, 0, 4, 5), (1, 6)),
    "efficientmod_s_conv": Shape((40, 80, 160, 344), (4, 4, 12, 8), (0, 0, 0, 0), (0, 0, 0, 0), (1, 6)),
}


class EfficientMod(Backbone):
    """The network at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, each before the stage's
    downsampling and without a norm, and the mean of the last one's norm as the summary.

    Frozen it has neither batch norms nor random depth, so training and evaluation give the same. Weights are those of
    the authors' files, or random: there is no hub that has them.

    bands: channels of the image.
    """

    def __init__(
        self,
        bands: int,
        *,
        name: str = "efficientmod_s",
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | Path | None = None,
        seed: int = 0,
        shape: dict[str, list[int]] | None = None,
    ):
        """
        Args:
            name: efficientmod_xxs, efficientmod_xs, efficientmod_s or efficientmod_s_conv.
            weights: "pretrained" (of ``checkpoint``) or "random" (seeded).
            checkpoint: the authors' file, or one with the same names of tensors.
            seed: of the random weights.
            shape: fields of ``Shape`` that differ from the named one's, for smaller networks.

        Raises RequestError where the name, the shape or the weights do not fit.
        """
        check_bands(name, bands)
        if name not in SHAPES:
            raise RequestError(f"{name}: no such network{nearest(name, SHAPES)}")
        if (weights == "random") != (checkpoint is None):
            hint = "weights 'random' and a checkpoint exclude each other" if checkpoint else "give checkpoint=FILE"
            raise RequestError(f"{name}: {hint} (the authors' README links the released files)")
        super().__init__(name)
        self.shape = _shape(name, shape or {})
        self.model: Any = w.build(lambda: Network(bands, self.shape), seed)
        self.bands, self.channels = bands, self.shape.widths
        self.statistics = IMAGENET if bands == 3 else None
        self.source = f"random (seed {seed})" if checkpoint is None else f"file: {checkpoint}"
        if checkpoint is not None and not w.is_meta(self.model):
            state = w.read(checkpoint)
            if ENTRY in state:
                state[ENTRY] = fit_bands(state[ENTRY], bands, self.source)
            w.fill(self.model, state, name, self.source)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to maps (B, channels[s], H / 2^(s+2), W / 2^(s+2)), sizes rounded up."""
        check_image(self.name, image, self.bands)
        maps = self.model(image)
        return Features(tuple(x.permute(0, 3, 1, 2) for x in maps), self.model.norm(maps[-1]).mean((1, 2)))

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of 32 x 64 pixels, of about unit variance."""
        return (example_images(self.model, self.bands, 32, 64),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.bands} bands, weights: {self.source})"


def _shape(name: str, given: dict[str, list[int]]) -> Shape:
    if unknown := [key for key in given if key not in Shape._fields]:
        raise RequestError(f"{name}: shape.{unknown[0]}: there is none{nearest(unknown[0], Shape._fields)}")
    shape = SHAPES[name]._replace(**{key: tuple(value) for key, value in given.items()})
    for key, values in shape._asdict().items():
        if key != "ratios" and len(values) != 4:
            raise RequestError(f"{name}: shape.{key} {list(values)}: a number for each of the 4 stages is needed")
    if not shape.ratios or min(*shape.widths, *shape.ratios, *shape.depths) < 1:
        raise RequestError(f"{name}: shape {shape._asdict()}: widths, depths and ratios must be at least 1")
    return shape


ENTRY = "patch_embed.proj.weight"


class Network(nn.Module):
    """The stages; tensors have the authors' names."""

    def __init__(self, bands: int, shape: Shape):
        super().__init__()
        self.patch_embed = Reduction(bands, shape.widths[0], 7, 4)
        self.layers = nn.ModuleList(Stage(shape, s) for s in range(4))
        self.norm = nn.LayerNorm(shape.widths[-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, bands, H, W) to the stages' maps (B, h, w, C)."""
        x, maps = self.patch_embed(image.permute(0, 2, 3, 1)), []
        stages: Any = self.layers
        for stage in stages:
            for block in stage.blocks:
                x = block(x)
            maps.append(x)
            x = stage.downsample(x) if stage.downsample is not None else x
        return maps


class Stage(nn.Module):
    """Modulation blocks, then attention blocks; a downsampling to the next stage's channels but in the last."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        width, ratios = shape.widths[index], shape.ratios
        blocks = [ModulationBlock(width, ratios[i % len(ratios)]) for i in range(shape.depths[index])]
        more = [AttentionBlock(width, shape.attention_ratios[index]) for _ in range(shape.attentions[index])]
        self.blocks = nn.ModuleList([*blocks, *more])
        self.downsample = Reduction(width, shape.widths[index + 1], 3, 2) if index < 3 else None


class Reduction(nn.Module):
    """A strided convolution and a norm: (B, H, W, C) to (B, H / stride, W / stride, outputs)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ModulationBlock(nn.Module):
    """x + gamma * mlp(norm(x)) over (B, H, W, C)."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = Modulation(width, ratio)
        self.gamma_1 = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma_1 * self.mlp(self.norm(x))


class Modulation(nn.Module):
    """An MLP whose hidden channels are multiplied by a context of each pixel's surroundings; hidden channel j by the
    context's channel j mod C. With ratio 1 the hidden layer has no activation."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.context_layer = Surroundings(width)

    def forward(self, x: Tensor) -> Tensor:
        value = self.fc1(x)
        value = F.gelu(value) if self.ratio > 1 else value
        return self.fc2(value * self.context_layer(x).repeat(1, 1, 1, self.ratio))


class Surroundings(nn.Module):
    """Linear, depth-wise convolution, GELU, linear: (B, H, W, C) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, width)
        self.context_list = nn.ModuleList([nn.Conv2d(width, width, CONTEXT, padding=CONTEXT // 2, groups=width)])

    def forward(self, x: Tensor) -> Tensor:
        wide = self.context_list[0](self.f(x).permute(0, 3, 1, 2))
        return self.g(F.gelu(wide).permute(0, 2, 3, 1))


class AttentionBlock(nn.Module):
    """A pre-norm transformer block without positions over the pixels of a map (B, H, W, C)."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, ratio * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Eight heads of at least 32 channels each, so that the inside may be wider than the map."""

    heads = 8

    def __init__(self, width: int):
        super().__init__()
        inside = self.heads * max(width // self.heads, 32)
        self.qkv, self.proj = nn.Linear(width, 3 * inside, bias=False), nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(mixed).view(x.shape)


def _sites(backbone: EfficientMod) -> Iterator[Site]:
    model, depth = backbone.model, -1
    yield Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands)
    yield from _reduction("model.patch_embed", model.patch_embed, -1, "patch_embed")
    for s, stage in enumerate(model.layers):
        width = backbone.channels[s]
        for i, block in enumerate(stage.blocks):
            depth += 1
            path = f"model.layers.{s}.blocks.{i}"
            yield Site("block", depth, path, block, parameter=None, layout="BHWC", width=width, tags=(f"stage{s}",))
            yield from _block(path, block, depth, width)
        if stage.downsample is not None:
            yield from _reduction(f"model.layers.{s}.downsample", stage.downsample, depth, "downsample")
    yield from norm_sites("model.norm", model.norm, depth, 0, "final", layout="BHWC")


def _block(path: str, block: Any, depth: int, width: int) -> Iterator[Site]:
    def linear(role: str, name: str, layer: nn.Linear, **more: Any) -> Site:
        return Site(role, depth, f"{path}.{name}", layer, layout="BHWC", width=layer.out_features, **more)

    yield Site("mlp", depth, f"{path}.mlp", block.mlp, parameter=None, layout="BHWC", width=width)
    yield linear("mlp.up", "mlp.fc1", block.mlp.fc1)
    yield linear("mlp.down", "mlp.fc2", block.mlp.fc2)
    for name in ("norm", "norm1", "norm2"):
        if hasattr(block, name):
            yield from norm_sites(f"{path}.{name}", getattr(block, name), depth, layout="BHWC")
    if isinstance(block, AttentionBlock):
        yield from _attention(path, block.attn, depth, width)
        return
    context = block.mlp.context_layer
    yield linear("linear", "mlp.context_layer.f", context.f, tags=("context",))
    yield linear("linear", "mlp.context_layer.g", context.g, tags=("context",))
    where = f"{path}.mlp.context_layer.context_list.0"
    tags = ("context", "depthwise")
    yield Site("conv", depth, where, context.context_list[0], layout="BCHW", width=width, tags=tags)


def _attention(path: str, attention: Attention, depth: int, width: int) -> Iterator[Site]:
    yield Site("attention", depth, f"{path}.attn", attention, parameter=None, layout="BHWC", width=width)
    whole, third = attention.qkv.out_features, attention.qkv.out_features // 3
    yield Site("attention.qkv", depth, f"{path}.attn.qkv", attention.qkv, layout="BHWC", width=whole)
    for i, role in enumerate(("attention.query", "attention.key", "attention.value")):
        rows = (i * third, (i + 1) * third)
        yield Site(role, depth, f"{path}.attn.qkv", attention.qkv, rows=rows, layout="BHWC", width=third)
    yield Site("attention.output", depth, f"{path}.attn.proj", attention.proj, layout="BHWC", width=width)


def _reduction(path: str, part: Reduction, depth: int, tag: str) -> Iterator[Site]:
    yield Site("conv", depth, f"{path}.proj", part.proj, layout="BCHW", width=part.proj.out_channels, tags=(tag,))
    yield from norm_sites(f"{path}.norm", part.norm, depth, 0, tag, layout="BHWC")
