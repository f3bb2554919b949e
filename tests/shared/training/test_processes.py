"""Two processes learn what one learns from the same batches, by DDP and FSDP, and checkpoints move between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import recipe, run
from shared.errors import RequestError, WorkError
from shared.store import read
from shared.training import Engine, fit, launch
from tests.shared.cache import training as cached
from tests.shared.test_run import SMALL
from tests.shared.training.in_processes import ALONE, CASES, everywhere, fail_in_the_second, line, train
from tests.shared.training.problem import Data
from tests.shared.training.test_fit import rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What two processes gave, after what one alone left for them to go on with."""
    for name in ("ddp", "fsdp"):
        train(folder / f"alone then {name}", ALONE, stop=True)
    (folder / "small.yaml").write_text(SMALL.replace("device: cpu}", "device: cpu, devices: 2}"))
    return launch(2, everywhere, folder, folder / "small.yaml")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: train(folder / f"alone {name}", ALONE, **case) for name, case in CASES.items()}


def weights(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(output / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


def check_equal(ours: Path, theirs: Path, name: str = "last", rounding: float = 2e-6) -> None:
    a, b = weights(ours, name), weights(theirs, name)
    assert a.keys() == b.keys()
    for key, tensor in b.items():
        told = lambda said, key=key: f"{key}: {said}"  # noqa: E731
        torch.testing.assert_close(a[key], tensor, rtol=50 * rounding, atol=rounding, msg=told)


@pytest.mark.parametrize("run", [*(f"ddp {name}" for name in CASES), "fsdp plain", "fsdp accumulated"])
def test_two_processes_learn_and_measure_what_one_does(folder: Path, found, alone, run: str) -> None:
    name = run.partition(" ")[2]
    rounding = 1e-3 if name == "halved" else 2e-6  # a share's gradients are rounded by themselves
    check_equal(folder / run, folder / f"alone {name}", rounding=rounding)
    ours, theirs = found[run], alone[name]
    assert ours["test"]["points"] == theirs["test"]["points"] == [9]  # no sample twice
    assert ours["test"]["loss"] == pytest.approx(theirs["test"]["loss"], rel=5 * rounding)
    assert (ours["epochs"], ours["steps"]) == (theirs["epochs"], theirs["steps"])
    assert ours["best"]["epoch"] == theirs["best"]["epoch"]
    rows = [rows_of(folder / each) for each in (run, f"alone {name}")]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    losses = [[float(r["train/loss"]) for r in each if r["train/loss"]] for each in rows]
    assert losses[0] == pytest.approx(losses[1], rel=50 * rounding)  # of the whole batch, not of a share
    moved = max((t - line().state_dict()[n]).abs().max() for n, t in weights(folder / run).items())
    assert moved > 0.005, "it trained"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpoints_move_between_one_process_and_two(folder: Path, found, alone, kind: str) -> None:
    """Within an epoch: see ``train``."""
    check_equal(folder / f"alone then {kind}", folder / "alone plain")
    assert found[f"alone then {kind}"]["test"]["loss"] == pytest.approx(alone["plain"]["test"]["loss"], rel=1e-5)
    assert torch.load(folder / f"{kind} then alone/checkpoints/last.ckpt", weights_only=True)["global_step"] == 14
    gone_on = train(folder / f"{kind} then alone", ALONE, resume=True)
    check_equal(folder / f"{kind} then alone", folder / "alone plain")
    assert (gone_on["epochs"], gone_on["steps"]) == (4, 24)


def test_a_method_draws_alike_in_every_process_and_the_loss_does_not(found) -> None:
    first, second = found["drawn"]
    assert len(first["method"]) == 8
    assert first["method"] == second["method"]
    assert len({tuple(numbers) for numbers in first["method"]}) == 8
    assert all(a[i] != b[i] for a, b in zip(first["loss"], second["loss"], strict=True) for i in range(3))
    names = [name for name in first["state"] if "num_batches" not in name]
    assert [n for n in names if first["state"][n] != second["state"][n]] == []


def test_two_processes_share_one_cache(folder: Path, found) -> None:
    """Each computes its share in the first epoch and finds the other's in the next, in which shares are others."""
    here = folder / "cached"
    cached.train(here / "alone", None)
    check_equal(here / "together", here / "alone")
    first, second = cached.indices(here)
    # Two shards; both processes may make what both are given at once: the last image of the epoch, the checked batch.
    assert cached.TRAIN + cached.CHECK <= first + second <= cached.TRAIN + cached.CHECK + 1 + cached.CHECK


def test_refusals(found, tmp_path: Path) -> None:
    said = found["refused"]
    assert "trainer.devices 3 x trainer.nodes 1: 2 processes were started" in said["too few"]
    assert "whole batches" in said["whole"]
    assert "leave that to the engine" in said["divided"]
    assert "Forgetful.results() differ between processes" in said["forgetful"]
    with pytest.raises(RequestError, match="1 processes were started"):
        fit(line(), Data(), Engine(epochs=1, device="cpu", devices=2), tmp_path)
    with pytest.raises(RequestError, match="give trainer.devices too"):
        Engine(epochs=1, strategy="fsdp")
    assert not list(tmp_path.iterdir())


def test_the_run_directory_is_written_once(folder: Path, found) -> None:
    output = folder / "run"
    assert {p.name for p in output.iterdir()} == {
        "recipe.yaml", "adapter.safetensors", "metrics.json", "metrics.csv", "checkpoints", "log.txt", "report.html",
    }  # fmt: skip
    log = (output / "log.txt").read_text()
    assert log.count("INFO recipe") == log.count("INFO done") == 1
    metrics = json.loads((output / "metrics.json").read_text())
    tested, header = read(output / "adapter.safetensors")
    assert header["metrics"]["miou"] == metrics["test"]["miou"]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    one = recipe.load(str(folder / "small.yaml"), ["trainer.devices=1"])
    run.run(one, folder / "run alone")  # its loss, cross entropy and Dice of a batch, is no mean over samples
    check_equal(output, folder / "run alone")
    assert run.directory(one, output, resume=True) == output  # where it runs is no other recipe
    again = run.run(one, output, resume=True)
    assert again["test"]["confusion"] == metrics["test"]["confusion"]
    assert all(torch.equal(t, tested[n]) for n, t in read(output / "adapter.safetensors")[0].items())


def test_a_failure_in_one_process_ends_all_and_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"the training loss is nan at step 1 \(samples p5"):
        launch(2, fail_in_the_second, tmp_path)
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_nodes_are_started_by_torchrun(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL.replace("device: cpu}", "device: cpu, nodes: 2}"))
    with pytest.raises(RequestError, match="trainer.nodes 2: start omniadapt on every node through torchrun"):
        run.run(recipe.load(str(tmp_path / "small.yaml")), tmp_path / "run")


def test_under_torchrun_the_output_is_given_and_checked_by_the_first(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    one = recipe.load(str(tmp_path / "small.yaml"))
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="started by torchrun: give --output DIR"):
        run.directory(one, None)
    assert run.directory(one, tmp_path / "full") == tmp_path / "full"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RequestError, match="not an empty directory"):
        run.directory(one, tmp_path / "full")
