"""Small models with a frozen prefix, and what is asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalities.images.backbones import TimmViT
from modalities.images.heads import LinearHead
from shared.adapted import Adapted, adapt
from shared.backbone import Features
from shared.cache import Cache, FrozenPrefix
from shared.method import Method
from shared.methods import LoRA

BLOCKS = 4


def vit(depths: tuple[int, ...] = (0, 1, 3), name: str = "vit_tiny_patch16_224", seed: int = 0, **more: Any) -> TimmViT:
    """Four blocks of 24 channels; images of 16 x 16 pixels are 2 x 2 patches."""
    args = {"embed_dim": 24, "depth": BLOCKS, "num_heads": 2} | more
    return TimmViT(
        3, name=name, image_size=16, patch_size=8, weights="random", seed=seed, depths=depths, model_args=args
    )


def images(count: int = 5, seed: int = 3, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Maps(nn.Module):
    """A head that reads the maps and the summary."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Features, size: tuple[int, ...]) -> Tensor:
        return self.scale * torch.cat([m.mean((2, 3)) for m in features.maps] + [features.summary], 1)


def model(method: Method | None = None, *, maps: bool = False, backbone: TimmViT | None = None) -> Adapted:
    """The head is the same for every call."""
    backbone = backbone or vit()
    torch.manual_seed(7)
    head = Maps() if maps else LinearHead(backbone.width, 3)
    made = adapt(backbone, method or LoRA(rank=2, depth="last 2"), head=head)
    torch.manual_seed(8)
    for parameter in made.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape)  # off the identity at which adapters start
    return made.train()


def cached(made: Adapted, folder: Path | str, precision: Any = "exact", **more: Any) -> FrozenPrefix:
    """The model's cache from here on."""
    made.cache = FrozenPrefix(made, Cache(precision=precision, folder=str(folder), **more))
    return made.cache


class Count:
    """How often a module ran, and for how many samples."""

    def __init__(self, module: nn.Module):
        self.calls = self.samples = 0
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.calls += 1
        self.samples += len(args[0])


def outcome(made: Adapted, image: Tensor) -> list[Tensor]:
    """Output and gradients of a pass."""
    made.zero_grad()
    output = made(image)
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in made.trainable().values() if p.grad is not None)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
