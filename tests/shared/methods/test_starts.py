"""CorDA and SoKA in the engine: prepared on the training batches, resumed exactly, tested by what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.adapted import adapt
from shared.methods import CorDA, SoKA
from shared.sites import describe
from shared.training import Engine, Optimiser, fit
from tests.shared.training.problem import Data, Head, Line
from tests.shared.training.test_fit import Interrupted, interrupt

METHODS = {
    "corda": CorDA(rank=2, samples=8),
    "soka": SoKA(rank_max=4),
    "gradient": SoKA(source="gradient", rank_max=4, batches=3),
}


def task(method: Any) -> Line:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return Line(adapt(backbone, method, head=Head(64, 1), sites=describe(backbone)), Optimiser(learning_rate=1e-2))


def train(line: Line, output: Path, seed: int = 11, **more: Any) -> None:
    torch.manual_seed(seed)
    fit(line, Data(), Engine(epochs=3), output, **more)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    whole = task(METHODS[name])
    before = {n: t.clone() for n, t in whole.model.backbone.state_dict().items()}
    train(whole, tmp_path / "whole")
    assert all(torch.equal(before[n], t) for n, t in whole.model.backbone.state_dict().items())
    with pytest.raises(Interrupted):
        train(interrupt(task(METHODS[name]), epoch=2), tmp_path / "cut")
    resumed = task(METHODS[name])
    train(resumed, tmp_path / "cut", seed=99, resume=True)
    ours, theirs = resumed.model.trained_state(), whole.model.trained_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    if name == "gradient":
        ranks = [len(adapter.a) for adapter in whole.model.bank["default"].values()]  # type: ignore[operator]
        assert min(ranks) < 4  # others than it was built with


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss(name, tmp_path):
    line = task(METHODS[name])
    train(line, tmp_path)
    start = task(METHODS[name])
    start.model.prepared.add("default")
    x, y = Data().checking.x, Data().checking.y
    with torch.no_grad():
        found = [nn.functional.mse_loss(each.model.eval()(x), y) for each in (line, start)]
    assert found[0] < 0.8 * found[1]
