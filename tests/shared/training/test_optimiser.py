"""The schedule against its formulas, the groups against what they should hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import Full, LoRA, Probe
from shared.sites import describe
from shared.training import Optimiser
from tests.shared.training.problem import model


class Embedded(nn.Module):
    """One parameter of each kind."""

    def __init__(self):
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(3, 4))
        self.position, self.linear, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x, size=()):
        return self.norm(self.linear(x + self.level_embed.sum(0) + self.position.weight.sum(0)))


def rates(optimiser: Optimiser, steps: int) -> list[float]:
    torch_optimiser, schedule = optimiser.build(model(), steps)
    found = []
    for _ in range(steps):
        found.append(torch_optimiser.param_groups[0]["lr"])
        torch_optimiser.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("poly", lambda t: (1 - t) ** 0.9),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("constant", lambda t: 1.0),
    ],
)
def test_schedules(schedule, formula) -> None:
    expected = [1e-3 * (n + 1) / 5 for n in range(4)] + [1e-3 * formula(n / 16) for n in range(16)]
    assert rates(Optimiser(learning_rate=1e-3, schedule=schedule, warmup=4), 20) == pytest.approx(expected, rel=1e-12)
    expected = [1e-3 * formula(n / 8) for n in range(8)]
    assert rates(Optimiser(learning_rate=1e-3, schedule=schedule), 8) == pytest.approx(expected, rel=1e-12)


def test_a_floor_holds_at_the_start_and_in_the_end() -> None:
    """The schedule of PeftCD: linear warm-up, then (1 - t)^3, never below a tenth."""
    optimiser = Optimiser(learning_rate=3e-4, schedule="poly", power=3, warmup=3000, floor=0.1)
    found = [optimiser.factor(step, 15000) for step in (0, 1500, 3000, 9000, 15000)]
    assert found == pytest.approx([0.1, 0.5, 1.0, 0.125, 0.1], rel=1e-3)
    assert Optimiser(schedule="constant").factor(7, 10) == 1.0


def test_norms_biases_and_embeddings_do_not_decay_and_the_head_has_its_rate() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    adapted = adapt(backbone, LoRA(rank=2, roles=("linear",)), head=Embedded(), sites=describe(backbone))
    optimiser, _ = Optimiser(learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1).build(adapted, 10)
    names = {id(p): n for n, p in adapted.trainable().items()}
    found = {
        names[id(p)].removeprefix("adapter.default."): (g["lr"], g["weight_decay"])
        for g in optimiser.param_groups
        for p in g["params"]
    }
    assert {n: v for n, v in found.items() if n.startswith("head.")} == {
        "head.level_embed": (1e-2, 0.0),
        "head.position.weight": (1e-2, 0.0),
        "head.linear.weight": (1e-2, 0.1),
        "head.linear.bias": (1e-2, 0.0),
        "head.norm.weight": (1e-2, 0.0),
        "head.norm.bias": (1e-2, 0.0),
    }
    assert sorted(v for n, v in found.items() if not n.startswith("head.")) == [(1e-3, 0.1)] * 2
    assert len(found) == len(adapted.trainable())


def test_full_fine_tuning_groups_the_backbone() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimiser, _ = Optimiser(name="sgd", weight_decay=0.1).build(adapt(backbone, Full()), 10)
    assert isinstance(optimiser, torch.optim.SGD)
    shapes = [(g["role"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in optimiser.param_groups]
    assert shapes == [("backbone", 0.1, [(4, 4)]), ("backbone", 0.0, [(4,), (4,), (4,)])]
    assert optimiser.param_groups[0]["momentum"] == 0.9


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(RequestError, match=r"optimiser.learning_rate 0"):
        Optimiser(learning_rate=0)
    with pytest.raises(RequestError, match=r"optimiser.betas"):
        Optimiser(betas=(0.9, 1.0))
    with pytest.raises(RequestError, match=r"optimiser.floor 2: a part of the peak rate"):
        Optimiser(floor=2)
    with pytest.raises(RequestError, match="warmup 10: the whole training has 10 steps"):
        Optimiser(warmup=10).build(model(), 10)
    with pytest.raises(RequestError, match="no trainable parameter"):
        Optimiser().build(adapt(nn.Linear(2, 2), Probe()), 10)
