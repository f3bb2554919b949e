"""What the tests of distributed training do in each of two processes, in one start for all; the tests look at it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from shared import recipe, run
from shared.adapted import adapt
from shared.errors import RequestError, WorkError
from shared.methods import LoRA
from shared.sites import Site, Sites, describe
from shared.training import Engine, Optimiser, fit, processes
from tests.shared.cache.training import in_two
from tests.shared.training.everything import everything
from tests.shared.training.problem import Data, Head, Line
from tests.shared.training.test_fit import Interrupted, interrupt

ALONE: dict[str, Any] = {}
DDP: dict[str, Any] = {"devices": 2}
FSDP: dict[str, Any] = {"devices": 2, "strategy": "fsdp"}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},  # 21 samples by 4: the last batch of an epoch has one sample; 5 batches of checks for two processes
    "accumulated": {"accumulate": 2, "clip": 0.5},
    "workers": {"workers": 2},
    "one sample": {"count": 1},
    "recomputed": {"recompute": True},
    "halved": {"frozen": "bfloat16"},
}


class Encoder(nn.TransformerEncoder):
    """Two blocks over one token a sample, and a buffer that never changes."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        super().__init__(layer, 2, enable_nested_tensor=False)
        self.register_buffer("frozen", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x[:, None]).flatten(1)


def line() -> Line:
    torch.manual_seed(3)
    backbone = Encoder()
    blocks = [Site("block", i, f"layers.{i}", layer, parameter=None) for i, layer in enumerate(backbone.layers)]
    sites = Sites([*describe(backbone), *blocks], "encoder")
    model = adapt(backbone, LoRA(rank=2, roles=("linear", "attention.query")), head=Head(4, 1), sites=sites)
    return Line(model, Optimiser(learning_rate=1e-2, schedule="cosine"))


def train(
    output: Path, where: dict[str, Any], *, stop: bool = False, resume: bool = False, **case: Any
) -> dict[str, Any]:
    """Four epochs; with ``stop``, to the fourth batch of the third alone, of which two are in the checkpoint."""
    data = Data(count=case.pop("count", 21), checks=9, workers=case.pop("workers", 0), noisy=True)
    data.validation = data.test = lambda: DataLoader(data.checking, 2)  # type: ignore[method-assign]
    task = line()
    torch.manual_seed(11 + 10 * processes.rank())  # the first process's seed counts
    engine = Engine(epochs=4, save_every=2, device="cpu", **where, **case)
    if stop:
        with contextlib.suppress(Interrupted):
            fit(interrupt(task, epoch=2, batch=3), data, engine, output)
        return {}
    found = fit(task, data, engine, output, resume=resume)
    return {key: found[key] for key in ("test", "best", "epochs", "steps")}


def everywhere(folder: Path, small: Path) -> dict[str, Any]:
    """All that two processes do; by name."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[f"ddp {name}"] = train(folder / f"ddp {name}", DDP, **case)
    found["fsdp plain"] = train(folder / "fsdp plain", FSDP)
    found["fsdp accumulated"] = train(folder / "fsdp accumulated", FSDP, **CASES["accumulated"])
    for name, where in (("ddp", DDP), ("fsdp", FSDP)):
        train(folder / f"{name} then alone", where, stop=True)
        found[f"alone then {name}"] = train(folder / f"alone then {name}", where, resume=True)
    found["drawn"] = _drawn(folder / "drawn")
    found["refused"] = _refused(folder)
    run.run(recipe.load(str(small)), folder / "run")
    in_two(folder / "cached")
    return found


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * processes.world()
    torch.distributed.all_gather_object(values, value)
    return values


def _drawn(output: Path) -> list[dict[str, Any]]:
    """What each process drew for the method and for the loss, and its buffers and weights at the end."""
    task = everything()
    torch.manual_seed(11)
    adapter, steps = task.model.bank["default"]["3"], []  # type: ignore[index]
    plain = task.model.step

    def step(number: int, seed: int) -> None:
        plain(number, seed)
        steps.append(adapter.drawn.tolist())

    task.model.step = step  # type: ignore[method-assign]
    fit(task, Data(count=16), Engine(epochs=2, device="cpu", **DDP), output)
    state = {name: tensor.tolist() for name, tensor in task.state_dict().items()}
    return _gathered({"method": steps, "loss": task.drawn, "state": state})


class Forgetful(Line):
    """Counts what its own process saw alone."""

    def results(self) -> dict[str, Any]:
        return {**super().results(), "rank": processes.rank()}


def _refused(folder: Path) -> dict[str, str]:
    """What is said to wrong requests that every process sees."""
    said = {}

    def expect(name: str, kind: type[Exception], data: Data, engine: Engine, task: Line | None = None) -> None:
        try:
            fit(task or line(), data, engine, folder / name)
        except kind as error:
            said[name] = str(error)

    engine = Engine(epochs=1, device="cpu", **DDP)
    expect("too few", RequestError, Data(), Engine(epochs=1, device="cpu", devices=3))
    whole, divided, forgetful = Data(), Data(), line()
    whole.train = lambda: DataLoader(whole.training, batch_size=None)  # type: ignore[method-assign]
    divided.train = lambda: DataLoader(  # type: ignore[method-assign]
        divided.training, 4, sampler=DistributedSampler(divided.training, num_replicas=2, rank=processes.rank())
    )
    expect("whole", RequestError, whole, engine)
    expect("divided", RequestError, divided, engine)
    forgetful.__class__ = Forgetful
    expect("forgetful", WorkError, Data(), engine, forgetful)
    return said


def fail_in_the_second(folder: Path) -> None:
    """A sample that falls to the second process spoils its loss."""
    data = Data(order="sampler")
    data.train = lambda: DataLoader(data.training, 4)  # type: ignore[method-assign]
    data.training.y[5] = float("nan")
    fit(line(), data, Engine(epochs=1, device="cpu", **DDP), folder)
