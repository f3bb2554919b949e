"""Parameters that sites share, and frozen members, train in two processes, divided or not, and resume as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from shared.adapted import Adapted
from shared.methods import AdapterFusion, Compacter, Pfeiffer
from shared.sites import Site, Sites
from shared.training import Engine, Optimiser, fit, launch
from tests.shared.training.in_processes import ALONE, DDP, FSDP, Encoder
from tests.shared.training.problem import Data, Head, Line
from tests.shared.training.test_fit import Interrupted, interrupt

METHODS = {
    "compacter": Compacter(n=2, reduction=2, sublayers=("mlp",)),
    "fusion": AdapterFusion(members={"a": None, "b": None}, dropout=0.0),
}
MODES = {"ddp": DDP, "fsdp": FSDP}


def line(name: str) -> Line:
    torch.manual_seed(3)
    backbone = Encoder()
    found = []
    for i, layer in enumerate(backbone.layers):
        found.append(Site("block", i, f"layers.{i}", layer, parameter=None, width=4))
        found.append(Site("mlp.down", i, f"layers.{i}.linear2", layer.linear2, width=4))
    model = Adapted(backbone, head=Head(4, 1), sites=Sites(found, "encoder"))
    if name == "fusion":
        for member in ("a", "b"):
            model.add(Pfeiffer(reduction=2), name=member)
            with torch.no_grad():
                for parameter in model.bank[member].parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.add(METHODS[name])
    return Line(model, Optimiser(learning_rate=1e-2))


def train(name: str, output: Path, where: dict[str, Any], *, stop: bool = False, resume: bool = False) -> None:
    data, task = Data(count=21, checks=9), line(name)
    data.validation = data.test = lambda: DataLoader(data.checking, 2)  # type: ignore[method-assign]
    members = {n: t.clone() for n, t in task.model.bank.state_dict().items() if not n.startswith("default.")}
    torch.manual_seed(11)
    engine = Engine(epochs=1, save_every=2, device="cpu", **where)
    if stop:
        with pytest.raises(Interrupted):
            fit(interrupt(task, epoch=0, batch=3), data, engine, output)
        return
    fit(task, data, engine, output, resume=resume)
    if where is not FSDP:  # which leaves them divided
        assert all(torch.equal(task.model.bank.state_dict()[n], t) for n, t in members.items())


def everywhere(folder: Path) -> None:
    for name in METHODS:
        for mode, where in MODES.items():
            train(name, folder / f"{name} {mode}", where)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("shared")
    launch(2, everywhere, found)
    for name in METHODS:
        train(name, found / name, ALONE)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_does(folder, name, mode):
    ours, theirs = weights(folder / f"{name} {mode}"), weights(folder / name)
    assert ours.keys() == theirs.keys()
    start = line(name).model.trained_state()
    for key, tensor in theirs.items():
        if key.endswith("key.bias"):  # it moves all scores alike: its gradient is rounding alone
            continue
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=5e-6, msg=lambda said, key=key: f"{key}: {said}")
    assert sum(not torch.equal(start[key], tensor) for key, tensor in theirs.items()) >= len(theirs) - 4


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_exactly(folder, name):
    output = folder / f"{name} again"
    train(name, output, ALONE, stop=True)
    train(name, output, ALONE, resume=True)
    ours, theirs = weights(output), weights(folder / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
