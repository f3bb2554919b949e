"""The two ends of the scale: nothing of the backbone trains, and all of it."""

from __future__ import annotations

import torch
from torch import nn

from shared import adapt, trainable
from shared.methods import Full, Probe


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


class Head(nn.Linear):
    """A linear head."""

    def forward(self, x, size):
        return super().forward(x)


X = torch.randn(6, 4)


def test_a_probe_trains_the_head_alone() -> None:
    model = adapt(host(), Probe(), head=Head(4, 2)).train()
    assert set(trainable(model)) == {"head.weight", "head.bias"}
    assert model.count() == {"trainable": 10, "adapter": 0, "head": 10, "frozen": 28}
    statistics = model.backbone[1].running_mean.clone()
    assert torch.equal(model(X), model(X))  # dropout off, norms fixed
    model(X).sum().backward()
    assert torch.equal(model.backbone[1].running_mean, statistics)
    assert all(p.grad is None for p in model.backbone.parameters())


def test_full_fine_tuning_trains_everything_in_training_mode() -> None:
    model = adapt(host(), Full(), head=Head(4, 2)).train()
    assert len(trainable(model)) == 6
    assert model.count()["frozen"] == 0
    assert model.backbone[1].training
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {g["role"]: len(g["params"]) for g in model.groups()} == {"head": 2, "backbone": 4}
    model.eval()
    assert not model.backbone[1].training


def test_removing_puts_the_gradient_flags_back() -> None:
    backbone = host()
    backbone[0].bias.requires_grad_(False)
    model = adapt(backbone, Probe())
    assert not any(p.requires_grad for p in backbone.parameters())
    model.remove()
    assert [p.requires_grad for p in backbone.parameters()] == [True, False, True, True]
