"""Small models of every kind an adapter must act on, built in code: name to (backbone, example inputs, sites)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared.sites import Sites, describe

Host = tuple[nn.Module, tuple[Tensor, ...], Sites]


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` on one input: its weights are read, its output projection is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Convolutions(nn.Module):
    """A strided, a grouped, a depthwise and a reflect-padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 12, 3, padding=1, groups=4),
            nn.SiLU(),
            nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False),
            nn.Conv2d(12, 6, 3, padding=1, dilation=1, padding_mode="reflect"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def attention() -> Host:
    return _described(SelfAttention(), torch.randn(3, 5, 16))


def encoder() -> Host:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return _described(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(3, 5, 16))


def convolutions() -> Host:
    return _described(Convolutions(), torch.randn(3, 3, 12, 10))


def vit() -> Host:
    from modalities.images.backbones import TimmViT

    backbone = TimmViT(
        3,
        name="vit_tiny_patch16_224",
        image_size=32,
        patch_size=8,
        weights="random",
        model_args={"embed_dim": 24, "depth": 4, "num_heads": 2},
    )
    return backbone, (torch.randn(3, 3, 32, 40),), backbone.sites()


def clip() -> Host:
    from modalities.images.backbones import OpenClipTower

    small = {"layers": 3, "width": 24, "head_width": 12, "patch_size": 8, "embed_dim": 16}
    backbone = OpenClipTower(3, name="ViT-B-32", image_size=32, pretrained="random", model_args=small)
    return backbone, (torch.randn(3, 3, 32, 32),), backbone.sites()


def sam() -> Host:
    """Windows, relative positions, tokens (B, h, w, C)."""
    from modalities.images.backbones import SAMEncoder

    backbone = SAMEncoder(3, size="tiny", weights="random")
    return backbone, (torch.randn(3, 3, 40, 64),), backbone.sites()


def resnet() -> Host:
    """Four stages of maps, (B, C, H, W)."""
    from modalities.images.backbones import TimmResNet

    small = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}
    backbone = TimmResNet(3, name="resnet18", weights="random", model_args=small)
    return backbone, (torch.rand(3, 3, 64, 64),), backbone.sites()


def open_clip() -> Host:
    """Both towers: three images, and three texts that end in different words.

    Frozen from the start: torch multiplies a frozen and an unfrozen matrix in different orders.
    """
    from modalities.vision_language.backbones import OpenClip

    image = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "embed_dim": 16}
    text = {"layers": 2, "width": 16, "heads": 2, "context_length": 8}
    backbone = OpenClip(3, name="ViT-B-32", pretrained="random", image_size=32, model_args=image, text_args=text)
    tokens = backbone.example()[1][[0, 1, 0]]
    tokens[2, -2] += 2
    backbone.requires_grad_(False)
    return backbone, (torch.randn(3, 3, 32, 32), tokens), backbone.sites()


SMALL_TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> Host:
    """Separate projections, two query heads for one key and value head, causal."""
    return _text("llama", intermediate_size=24, num_key_value_heads=1)


def bert() -> Host:
    """Norms after the residuals, tokens see both ways."""
    return _text("bert", intermediate_size=24, max_position_embeddings=16)


def bloom() -> Host:
    """One fused projection whose query, key and value rows lie interleaved; no fused attention kernel."""
    return _text("bloom")


def _text(family: str, **config: int) -> Host:
    """Three texts of six tokens, the second padded by two."""
    from modalities.language.backbones import TransformersText

    backbone = TransformersText(name=family, weights="random", config={**SMALL_TEXT, **config})
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return backbone, (torch.randint(0, 50, (3, 6)), mask), backbone.sites()


def _described(model: nn.Module, *example: Tensor) -> Host:
    return model.eval(), example, describe(model)


HOSTS: dict[str, Callable[[], Host]] = {
    "vit": vit,
    "clip": clip,
    "sam": sam,
    "resnet": resnet,
    "open_clip": open_clip,
    "attention": attention,
    "encoder": encoder,
    "convolutions": convolutions,
    "llama": llama,
    "bert": bert,
    "bloom": bloom,
}
