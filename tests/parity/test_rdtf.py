"""The RDTF replay works for other sizes, masks, tasks and seeds than the golden case's, and can fail."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from shared.errors import RequestError
from tests.parity.rdtf import replay

TASKS = ["t2v", "post_frame_prediction", "i2v", "interpolation"]


def case(seed: int, dim: int = 12, heads: int = 3, width: int = 4, groups: int = 3, end: int = 60) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    timeless: dict[str, Any] = {"temb_channels": None}
    parts = {
        "transformer_blocks": Attention(dim, heads=heads, dim_head=width),
        "conv_layers": torch.nn.ModuleList(ResnetBlock2D(in_channels=8, groups=1, **timeless) for _ in range(2)),
        "norm": torch.nn.GroupNorm(groups, dim, eps=1e-6),
    }  # fmt: skip
    state = {f"{p}.{n}": t for p, module in parts.items() for n, t in module.state_dict().items()}
    state |= {"w1": torch.tensor([0.7]), "w2": torch.tensor([0.4])}
    x, losses = torch.randn(24, dim, 6, 8), [0.5, 0.1, 0.3]
    real, given = torch.tensor([[1.0] * 6 + [0.0] * 2]), torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0])
    pred, target, latents = (torch.randn(1, 2, 8, 3, 3) for _ in range(3))
    with torch.no_grad():
        found = {
            "in.sti.hidden_states": x, "out.sti": sti(parts, x, 0.7, 0.4), "out.sti.init_w": torch.tensor([0.0, 1.0]),
            "in.mask.latents": latents, "in.mask.frame_mask": real, "in.mask.task_mask": given,
            "out.mask.condition": latents * torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0])[:, None, None],
            "in.loss.pred": pred, "in.loss.target": target,
            "out.loss": 6 / 8 * (pred - target)[:, :, :6].square().mean(), "out.conditions": conditions(seed),
            "in.curriculum.steps": torch.tensor([15.0]),
            "out.curriculum.static": torch.tensor([[0.3, 0.6, 0.3, 0.7]]), "in.pid.losses": torch.tensor(losses),
            "out.pid.P_a": torch.tensor([0.5 + 0.9 - 0.52, 1.5 + 0.9 + 0.26]),
        }  # fmt: skip
    arrays = {n: t.detach().numpy() for n, t in (found | {f"sd.sti.{n}": t for n, t in state.items()}).items()}
    config = {"dim": dim, "heads": heads, "dim_head": width, "norm_num_groups": groups, "num_frames": 8,
              "tasks": TASKS, "curriculum_end": end}  # fmt: skip
    return arrays, {"seed": seed, "config": config}


def sti(parts: dict[str, Any], x: Tensor, w1: float, w2: float) -> Tensor:
    """The layer clip by clip and channel by channel."""
    clips = []
    for clip in x.split(8):
        pooled = F.avg_pool2d(clip, 2)
        tokens = parts["transformer_blocks"](pooled.permute(0, 2, 3, 1).reshape(1, -1, x.shape[1]))
        back = tokens.reshape(8, 3, 4, -1).permute(0, 3, 1, 2)
        semantic = clip + back.repeat_interleave(2, 2).repeat_interleave(2, 3)
        planes = [parts["conv_layers"][1](parts["conv_layers"][0](c[None], None), None)[0] for c in clip.unbind(1)]
        clips.append(parts["norm"](w1 * semantic + w2 * torch.stack(planes, 1)))
    return torch.cat(clips)


def conditions(seed: int) -> Tensor:
    draws, rows = random.Random(seed), []
    rows.append([0, 5, 0, *[0] * 8])
    end = draws.randint(3, 5)
    rows.append([1, 6, 0, *[1] * end, *[0] * (8 - end)])
    place = draws.randint(0, 3)
    rows.append([2, 4, 1, *(int(i == place) for i in range(8))])
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("seed", [1, 5])
def test_other_cases(seed):
    stored, meta = case(seed)
    pairs = replay(stored, meta)
    assert set(pairs) == {name for name in stored if name.startswith("out.")}
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)


def test_a_wrong_number_shows_and_what_is_unknown_is_said():
    stored, meta = case(3)
    stored["sd.sti.w1"] = np.array([0.8], np.float32)
    ours, theirs = replay(stored, meta)["out.sti"]
    assert (ours - theirs).abs().max() > 1e-3
    with pytest.raises(RequestError, match="out.vae: known are out.sti"):
        replay({**stored, "out.vae": np.zeros(1)}, meta)
    meta["config"]["tasks"] = ["v2v"]
    with pytest.raises(RequestError, match="tasks v2v: known are i2v"):
        replay(stored, meta)
