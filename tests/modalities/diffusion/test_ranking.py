"""A UNet that knows patterns at 32 pixels learns other sizes through ResAdapter, and hardly through its attention.

At the size it knows, the UNet gives up a little more with ResAdapter than with that LoRA, which changes less anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.res_adapter import ResAdapter
from shared import LoRA, adapt

CONFIG = {
    "sample_size": 32,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")


def gratings(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Four waves across the image, upright or lying, at any phase: (count, 1, side, side)."""
    x = 4 * (torch.arange(side) + 0.5) / side
    wave = torch.sin(2 * torch.pi * (x + torch.rand(count, 1, 1, generator=generator))).expand(count, side, side)
    lying = torch.rand(count, generator=generator) < 0.5
    return torch.where(lying[:, None, None], wave.transpose(1, 2), wave)[:, None].contiguous()


def loss(model: Any, images: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise = torch.randn(images.shape, generator=generator)
    noisy = schedule.add_noise(images, noise, steps)  # type: ignore[arg-type]
    said = model(noisy, steps, encoder_hidden_states=torch.zeros(len(images), 1, 8)).sample
    return F.mse_loss(said, noise)


def train(model: Any, sides: tuple[int, ...], steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    model.train()
    for _ in range(steps):
        side = sides[int(torch.randint(len(sides), (), generator=generator))]
        images = gratings(2 if side > 32 else 8, side, generator)
        loss(model, images, torch.randint(1000, (len(images),), generator=generator), generator).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def losses(model: Any) -> dict[int, float]:
    """By side, on images and noise of their own, at steps spread over the schedule."""
    found = {}
    for side in (16, 32, 64):
        generator = torch.Generator().manual_seed(99)
        steps = ((torch.arange(32) + 0.5) * 1000 / 32).long()
        found[side] = float(loss(model, gratings(32, side, generator), steps, generator))
    return found


def test_res_adapter_learns_other_sizes_where_attention_does_not():
    base = DiffusersUNet(1, config=CONFIG)
    train(base, (32,), 100, 8e-3)
    frozen = losses(base)
    assert frozen[32] < 0.08 < 0.15 < frozen[64] < frozen[16]  # it knows 32 pixels and fails at the others

    def learned(method):
        model = adapt(base, method)
        train(model, (16, 32, 64), 50, 1.5e-2)
        found, count = losses(model), model.count()["adapter"]
        model.remove()
        return found, count

    ours, size = learned(ResAdapter(rank=4, alpha=4.0))
    attention, other = learned(LoRA(rank=3, roles=ATTENTION))
    assert (size, other) == (2992, 2880)
    assert ours[64] < 0.7 * frozen[64]
    assert ours[16] < 0.97 * frozen[16]
    assert ours[64] < 0.8 * attention[64]
    assert ours[16] < 0.95 * attention[16]
