"""A resumed run is bit for bit the uninterrupted one, wherever its state is kept; and each place it is kept counts."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from shared.training import Engine, fit
from tests.shared.training.everything import everything
from tests.shared.training.problem import Data, Line, line
from tests.shared.training.test_fit import Interrupted, interrupt, rows_of

ENGINE = Engine(epochs=5, accumulate=2, clip=1.0, patience=4)


def train(task: Line, data: Data, output: Path, seed: int = 11, engine: Engine = ENGINE, **more: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    return fit(task, data, engine, output, **more)


def checkpoint(output: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(output / f"checkpoints/{name}.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and plain values are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("resume") / "whole"
    train(everything(), Data(noisy=True), output)
    return output


def interrupted(output: Path, workers: int = 0) -> None:
    """A run that stops within its fourth epoch, with state of three."""
    with pytest.raises(Interrupted):
        train(interrupt(everything(), epoch=3), Data(noisy=True, workers=workers), output)


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_resumed_is_as_if_never_interrupted(whole: Path, tmp_path: Path, workers: int) -> None:
    interrupted(tmp_path, workers)
    assert checkpoint(tmp_path)["global_step"] == 9  # 5 batches are 3 steps
    task = everything()
    train(task, Data(noisy=True, workers=workers), tmp_path, seed=99, resume=True)
    for name in ("last", "best"):
        ours, theirs = checkpoint(tmp_path, name), checkpoint(whole, name)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops"):
            assert same(ours[part], theirs[part]), (name, part)
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    kept = checkpoint(tmp_path)["state_dict"]
    assert {"backbone.1.running_var", "backbone.1.num_batches_tracked", "adapter.default.3.mean"} <= kept.keys()
    assert kept["backbone.1.num_batches_tracked"] == 25


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_within_an_epoch_goes_on_there(whole: Path, tmp_path: Path, workers: int) -> None:
    """Stopped in the fourth batch of the fourth epoch, of which two were in the checkpoint: 10 steps, 17 batches."""
    engine = replace(ENGINE, save_every=1)
    with pytest.raises(Interrupted):
        train(interrupt(everything(), epoch=3, batch=3), Data(noisy=True, workers=workers), tmp_path, engine=engine)
    assert checkpoint(tmp_path)["global_step"] == 10
    assert checkpoint(tmp_path)["state_dict"]["backbone.1.num_batches_tracked"] == 17
    task = everything()
    train(task, Data(noisy=True, workers=workers), tmp_path, seed=99, engine=engine, resume=True)
    assert len(task.seen) == 25 - 17
    for name in ("last", "best"):
        ours, theirs = checkpoint(tmp_path, name), checkpoint(whole, name)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert same(ours[part], theirs[part]), (name, part)
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.parametrize("every", [2, 3])
def test_checkpoints_within_an_epoch_fall_between_steps(tmp_path: Path, monkeypatch, every: int) -> None:
    """Epochs of three steps (two batches, two, one): a multiple of ``every`` that no check falls on is written."""
    written: list[int] = []
    plain = Trainer.save_checkpoint

    def save(self: Trainer, *args: Any, **kwargs: Any) -> None:
        written.append(self.global_step)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    train(everything(), Data(), tmp_path, engine=Engine(epochs=3, accumulate=2, save_every=every))
    assert written == ([2, 3, 4, 6, 8, 9] if every == 2 else [3, 6, 9])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_ended_within_an_epoch_can_be_made_longer(tmp_path: Path, accumulate: int) -> None:
    tasks = [line(schedule="constant") for _ in range(3)]
    for task, name, steps in ((tasks[0], "whole", 13), (tasks[1], "parts", 7)):
        train(task, Data(noisy=True), tmp_path / name, engine=Engine(steps=steps, accumulate=accumulate))
    longer = Engine(steps=13, accumulate=accumulate)
    found = train(tasks[2], Data(noisy=True), tmp_path / "parts", seed=99, engine=longer, resume=True)
    assert tasks[1].seen + tasks[2].seen == tasks[0].seen
    assert (found["steps"], found["epochs"]) == (13, 3 if accumulate == 1 else 5)
    assert same(checkpoint(tmp_path / "parts")["state_dict"], checkpoint(tmp_path / "whole")["state_dict"])
    checks = [int(row["step"]) for row in rows_of(tmp_path / "parts") if row["validation/loss"]]
    assert checks == ([4, 6, 9, 12] if accumulate == 1 else [2, 5, 6, 8, 11, 12])


def _optimiser(state: dict[str, Any], fresh: dict[str, Any]) -> None:
    state["optimizer_states"][0]["state"] = {}


def _schedule(state: dict[str, Any], fresh: dict[str, Any]) -> None:
    state["lr_schedulers"] = fresh["lr_schedulers"]


def _position(state: dict[str, Any], fresh: dict[str, Any]) -> None:
    state["loops"]["fit_loop"]["epoch_progress"] = fresh["loops"]["fit_loop"]["epoch_progress"]


def _seed(state: dict[str, Any], fresh: dict[str, Any]) -> None:
    state["callbacks"]["Order"]["seed"] = 99


def _tensor(name: str):
    def lose(state: dict[str, Any], fresh: dict[str, Any]) -> None:
        state["state_dict"][name] = fresh["state_dict"][name]

    return lose


@pytest.mark.parametrize(
    "lose",
    [
        _optimiser, _schedule, _position, _seed, _tensor("adapter.default.3.mean"),
        _tensor("backbone.1.running_mean"), _tensor("backbone.4.running_var"), _tensor("head.weight"),
    ],
    ids=["moments", "schedule", "position", "seed", "adapter buffer", "mean", "variance", "weight"],
)  # fmt: skip
def test_whatever_is_lost_shows(whole: Path, tmp_path: Path, lose: Any) -> None:
    """The comparison above is sharp: without any one part of the checkpoint the end differs."""
    interrupted(tmp_path / "cut")
    with pytest.raises(Interrupted):
        train(interrupt(everything(), epoch=1), Data(noisy=True), tmp_path / "fresh")
    path, state = tmp_path / "cut/checkpoints/last.ckpt", checkpoint(tmp_path / "cut")
    lose(state, checkpoint(tmp_path / "fresh"))
    torch.save(state, path)
    train(everything(), Data(noisy=True), tmp_path / "cut", seed=98, resume=True)
    assert not same(checkpoint(tmp_path / "cut")["state_dict"], checkpoint(whole)["state_dict"])


@pytest.mark.parametrize(
    ("owner", "name"),
    [(random, "seed"), (np.random, "seed"), (torch, "default_generator")],
    ids=["python", "numpy", "torch"],
)
def test_each_source_of_random_numbers_counts(whole: Path, tmp_path: Path, monkeypatch, owner: Any, name: str) -> None:
    """Left unseeded, any one of Python's, NumPy's and torch's numbers makes another run."""
    unseeded = torch.Generator() if owner is torch else lambda number: None
    monkeypatch.setattr(owner, name, unseeded)
    train(everything(), Data(noisy=True), tmp_path)
    assert not same(checkpoint(tmp_path)["state_dict"], checkpoint(whole)["state_dict"])


class Scripted(Line):
    """Measures what it is told to, by epoch."""

    losses = (5.0, 4.0, 4.5, 4.25, 4.75, 3.0, 2.0)

    def results(self) -> dict[str, Any]:
        return {**super().results(), "loss": self.losses[min(self.current_epoch, 6)]}


def scripted() -> Scripted:
    task = line()
    task.__class__ = Scripted
    return task  # type: ignore[return-value]


def test_patience_and_the_best_state_survive(tmp_path: Path) -> None:
    """Interrupted after two of three checks without improvement: one more ends it, and the best is the old one."""
    patient = Engine(epochs=7, patience=3)
    expected = train(scripted(), Data(), tmp_path / "whole", engine=patient)
    with pytest.raises(Interrupted):
        train(interrupt(scripted(), epoch=4), Data(), tmp_path / "cut", engine=patient)
    found = train(scripted(), Data(), tmp_path / "cut", seed=99, engine=patient, resume=True)
    assert (found["epochs"], found["steps"]) == (expected["epochs"], expected["steps"]) == (5, 25)
    assert found["best"] == expected["best"] == {"monitor": "validation/loss", "value": 4.0, "epoch": 2, "step": 10}
    ours, theirs = (checkpoint(tmp_path / name, "best")["state_dict"] for name in ("cut", "whole"))
    assert same(ours, theirs)


@pytest.mark.parametrize("at", ["best.ckpt", "last.ckpt"])
def test_stopped_around_the_writing_of_a_checkpoint(whole: Path, tmp_path: Path, monkeypatch, at: str) -> None:
    """Whichever rename the second check's end comes before, the run goes on to the same end."""
    plain, count = os.replace, iter(range(1000))

    def rename(source: Any, target: Any) -> None:
        if str(target).endswith(at) and next(count) == 1:
            raise Interrupted
        plain(source, target)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(Interrupted):
        train(everything(), Data(noisy=True), tmp_path)
    train(everything(), Data(noisy=True), tmp_path, seed=99, resume=True)
    for name in ("last", "best"):
        assert same(checkpoint(tmp_path, name)["state_dict"], checkpoint(whole, name)["state_dict"])
