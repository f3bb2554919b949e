"""Small UNets of the two published kinds, with weights far from their initial values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modalities.diffusion.backbones.unet import DiffusersUNet


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def backbone(request: pytest.FixtureRequest) -> DiffusersUNet:
    return tiny(request.param)


def tiny(config: str, seed: int = 0) -> DiffusersUNet:
    """A small backbone whose norms are not the identity."""
    backbone = DiffusersUNet(config=config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone.eval()


def inputs(backbone: DiffusersUNet, height: int = 8, width: int = 8, batch: int = 1) -> dict[str, Any]:
    """Seeded keyword arguments of a call at latent size (height, width)."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    given = backbone.blank(batch)
    tokens = torch.randn(batch, 5, given["encoder_hidden_states"].shape[-1], generator=generator)
    given["encoder_hidden_states"] = tokens
    sample = torch.randn(batch, 4, height, width, generator=generator)
    return {"sample": sample, "timestep": torch.tensor([321]), **given}


def shake(model: Any, name: str, scale: float = 0.2) -> None:
    """Move every tensor of an adapter away from the identity."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.bank[name].parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
