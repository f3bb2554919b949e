"""A run learns, writes what it says, stops when it should, and resumed is as if never interrupted."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path

import pytest
import torch

from shared.errors import RequestError, WorkError
from shared.training import Engine, fit
from shared.training.optimiser import Optimiser
from tests.shared.training.problem import Data, Line, line


class Interrupted(Exception):
    pass


def rows_of(output: Path) -> list[dict[str, str]]:
    with open(output / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def interrupt(task, epoch: int, batch: int = 1):
    """Makes ``task`` fail in the given epoch and batch (0-based)."""
    plain = task.loss

    def loss(samples):
        if task.current_epoch == epoch and task.trainer.fit_loop.batch_idx == batch:
            raise Interrupted
        return plain(samples)

    task.loss = loss
    return task


def test_the_loss_falls_and_the_model_holds_its_best_state(tmp_path: Path) -> None:
    task = line()
    found = fit(task, Data(), Engine(epochs=30), tmp_path)
    rows = rows_of(tmp_path)
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 150
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    checked = [float(row["validation/loss"]) for row in rows if row.get("validation/loss")]
    assert len(checked) == 30
    assert found["best"]["value"] == pytest.approx(min(checked), rel=1e-5)
    assert found["best"]["epoch"] == checked.index(min(checked)) + 1
    assert found["test"]["loss"] == pytest.approx(min(checked), rel=1e-5)  # the test split is the validation split
    assert found["test"]["points"] == [8]
    assert (found["epochs"], found["steps"]) == (30, 150)


def test_metrics_follow_step_and_epoch(tmp_path: Path) -> None:
    fit(line(schedule="constant"), Data(), Engine(epochs=2), tmp_path)
    rows = rows_of(tmp_path)
    assert list(rows[0])[:2] == ["step", "epoch"]
    training = [row for row in rows if row["train/loss"]]
    assert [(int(r["step"]), int(r["epoch"])) for r in training] == [(s, s // 5) for s in range(10)]
    assert [float(r["learning_rate"]) for r in training] == pytest.approx([0.01] * 10)
    assert [int(r["step"]) for r in rows if r["validation/loss"]] == [4, 9]
    assert [int(r["epoch"]) for r in rows if r["test/loss"]] == [2]


def test_cost_is_measured(tmp_path: Path) -> None:
    cost = fit(line(), Data(), Engine(epochs=2), tmp_path)["cost"]
    assert 0 < cost["step_seconds"] < cost["train_seconds"] < 60
    assert cost["peak_memory_bytes"] > 50e6  # the process: torch alone takes more
    assert 0 < cost["wait_share"] < 1


class Awaited(Data):
    """Samples that take 20 ms each, and steps that take 20 ms, on a clock that nothing else moves."""

    now = 0.0

    def train(self):
        loader = super().train()
        plain = loader.dataset.__getitem__

        class Late(type(loader.dataset)):
            def __getitem__(self, index: int) -> dict:
                Awaited.now += 0.02
                return plain(index)

        loader.dataset.__class__ = Late
        return loader


def test_waiting_for_data_is_told(tmp_path: Path, monkeypatch) -> None:
    class Slow(Line):
        def loss(self, batch):
            Awaited.now += 0.02
            return super().loss(batch)

    monkeypatch.setattr(time, "perf_counter", lambda: Awaited.now)
    task = Slow(line().model, Optimiser(learning_rate=1e-2))
    cost = fit(task, Awaited(), Engine(epochs=1), tmp_path)["cost"]
    assert cost["wait_share"] == pytest.approx(0.8)  # of four samples and a step
    assert cost["step_seconds"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("order", "workers", "accumulate"),
    [
        ("shuffled", 0, 1),
        ("shuffled", 0, 2),
        ("generator", 0, 1),
        ("sampler", 0, 1),
        ("generator", 1, 1),
        ("sampler", 1, 1),
    ],
)
def test_resumed_is_as_if_never_interrupted(tmp_path: Path, order: str, workers: int, accumulate: int) -> None:
    engine = Engine(epochs=4, accumulate=accumulate)
    whole = line()
    torch.manual_seed(11)
    expected = fit(whole, Data(order, workers), engine, tmp_path / "whole")

    first = interrupt(line(), epoch=2)
    torch.manual_seed(11)
    with pytest.raises(Interrupted):
        fit(first, Data(order, workers), engine, tmp_path / "parts")
    second = line()
    torch.manual_seed(99)  # whoever resumes need not know the seed
    found = fit(second, Data(order, workers), engine, tmp_path / "parts", resume=True)

    assert second.seen == whole.seen[10:]
    assert whole.seen[:5] != whole.seen[5:10], "every epoch has an order of its own"
    ours, theirs = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("parts", "whole"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    for key, moments in theirs["optimizer_states"][0]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(ours["optimizer_states"][0]["state"][key][name], tensor), (key, name)
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert found["test"] == expected["test"]
    assert found["best"] == expected["best"]
    assert (tmp_path / "parts/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_a_longer_run_is_a_short_one_gone_on(tmp_path: Path) -> None:
    for name, epochs in (("whole", 4), ("parts", 2)):
        task = line(schedule="constant")
        torch.manual_seed(11)
        fit(task, Data(), Engine(epochs=epochs), tmp_path / name)
    found = fit(line(schedule="constant"), Data(), Engine(epochs=4), tmp_path / "parts", resume=True)
    ours, theirs = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("parts", "whole"))
    assert all(torch.equal(ours["state_dict"][n], t) for n, t in theirs["state_dict"].items())
    assert (found["epochs"], found["steps"]) == (4, 20)


@pytest.mark.parametrize("ended", [Engine(epochs=3), Engine(steps=12)])
def test_resuming_a_finished_run_tests_it_again(tmp_path: Path, ended: Engine) -> None:
    before = fit(line(), Data(), ended, tmp_path)
    task = line()
    after = fit(task, Data(), ended, tmp_path, resume=True)
    assert task.seen == []
    for key in ("test", "best", "steps", "epochs"):
        assert after[key] == before[key], key


def test_steps_end_a_run_within_an_epoch_and_a_check_is_made_there(tmp_path: Path) -> None:
    task = line()
    found = fit(task, Data(), Engine(steps=7), tmp_path)
    assert len(task.seen) == found["steps"] == 7
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows if row["validation/loss"]] == [4, 6]
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7


def test_checks_are_spaced_and_one_is_made_at_the_end(tmp_path: Path) -> None:
    fit(line(), Data(), Engine(epochs=5, check_every=2), tmp_path)
    rows = rows_of(tmp_path)
    assert [int(row["epoch"]) for row in rows if row["validation/loss"]] == [1, 3, 4]


def test_early_stop_and_its_resumption(tmp_path: Path) -> None:
    class Stuck(type(line())):
        def results(self):
            super().results()
            return {"loss": [5.0, 4.0, 4.5, 4.25, 4.0, 3.0, 2.0][min(self.current_epoch, 6)]}

    task = line()
    task.__class__ = Stuck
    engine = Engine(epochs=7, patience=3)
    found = fit(task, Data(), engine, tmp_path)
    assert found["epochs"] == 5
    assert found["best"] == {"monitor": "validation/loss", "value": 4.0, "epoch": 2, "step": 10}
    again = line()
    again.__class__ = Stuck
    assert fit(again, Data(), engine, tmp_path, resume=True)["epochs"] == 5
    assert again.seen == []


def test_checkpoints_hold_only_what_trains(tmp_path: Path) -> None:
    task = line()
    fit(task, Data(), Engine(epochs=1), tmp_path)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["state_dict"].keys() == task.model.trainable().keys()
    trained, frozen = task.model.count()["trainable"], task.model.count()["frozen"]
    assert sum(t.numel() for t in state["state_dict"].values()) == trained < frozen
    tensors = [t for moments in state["optimizer_states"][0]["state"].values() for t in moments.values()]
    assert sum(t.numel() for t in tensors if t.ndim) == 2 * trained
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.ckpt", "last.ckpt"]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = fit(line(), Data(), Engine(epochs=2), tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "metrics.csv").write_text("step,epoch,train/loss\n0,0,0.5\n")
    torch.manual_seed(1)
    again = fit(line(), Data(), Engine(epochs=2), tmp_path / "cut", resume=True)
    assert again["test"] == whole["test"]
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="was not measured; validation gave validation/loss"):
        fit(line(), Data(), Engine(epochs=1, monitor="validation/miou"), tmp_path / "monitor")
    with pytest.raises(RequestError, match="the train split has no batch"):
        fit(line(), _without_training(), Engine(epochs=1), tmp_path / "empty")
    fit(line(), Data(), Engine(epochs=1), tmp_path)
    with pytest.raises(RequestError, match="resume that run, or choose another output"):
        fit(line(), Data(), Engine(epochs=1), tmp_path)
    last = tmp_path / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(RequestError, match=r"last.ckpt: not a readable checkpoint"):
        fit(line(), Data(), Engine(epochs=2), tmp_path, resume=True)


def _without_training() -> Data:
    data = Data()
    data.train = list  # type: ignore[method-assign,return-value,assignment]
    return data


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": Evil(), "loops": {}, "global_step": 0}, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(RequestError, match="not a readable checkpoint"):
        fit(line(), Data(), Engine(epochs=1), tmp_path, resume=True)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(line(), Data(), Engine(epochs=1), tmp_path)
    path = tmp_path / "checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)
    state["state_dict"].popitem()
    torch.save(state, path)
    with pytest.raises(RequestError, match="1 missing"):
        fit(line(), Data(), Engine(epochs=2), tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_before_it_moves_a_weight(tmp_path: Path) -> None:
    task, data = line(), Data()
    data.training.y[13] = float("nan")
    before: dict[str, torch.Tensor] = {}
    plain = task.loss

    def loss(batch):
        before.update({n: t.clone() for n, t in task.state_dict().items()})
        return plain(batch)

    task.loss = loss
    with pytest.raises(WorkError, match=r"the training loss is nan at step \d+ \(samples .*p13.*\)"):
        fit(task, data, Engine(epochs=1), tmp_path)
    assert all(torch.equal(before[n], t) for n, t in task.state_dict().items())
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_a_tensor_that_never_trains_is_an_error(tmp_path: Path) -> None:
    task = line()
    task.model.head.unused = torch.nn.Parameter(torch.ones(2))  # type: ignore[union-attr]
    with pytest.raises(WorkError, match=r"no gradient reaches head.unused \(1 of \d+ trainable tensors\)"):
        fit(task, Data(), Engine(epochs=1), tmp_path)


def test_extra_losses_and_steps_reach_the_model(tmp_path: Path) -> None:
    task = line()
    steps: list[int] = []
    task.model.step = lambda number, seed: steps.append(number)  # type: ignore[method-assign]
    weight = task.model.trainable()["head.weight"]
    task.model.penalty = lambda: (1000 * (weight - 1).square()).sum()  # type: ignore[method-assign]
    fit(task, Data(), Engine(epochs=6), tmp_path)
    assert steps == list(range(30))
    moved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["head.weight"]
    assert moved.min() > 0.03  # every weight went towards 1


def test_a_run_prepares_once_with_all_training_batches(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def prepare(batches, loss):
        losses = [float(loss(batch).detach()) for batch in batches]
        seen.append((len(losses), sum(losses)))

    for epochs, resume in ((2, False), (4, True)):
        task = line()
        task.model.prepare = prepare  # type: ignore[method-assign]
        fit(task, Data(), Engine(epochs=epochs), tmp_path, resume=resume)
    assert [count for count, _ in seen] == [5]
    assert seen[0][1] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "64"])
def test_precisions(tmp_path: Path, precision: str) -> None:
    data = Data()
    if precision == "64":
        for split in (data.training, data.checking):
            split.x, split.y = split.x.double(), split.y.double()
    found = fit(line(), data, Engine(epochs=8, precision=precision), tmp_path)  # type: ignore[arg-type]
    assert found["best"]["value"] < 6  # of about 10 at the start


def test_engine_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="either epochs or steps"):
        Engine()
    with pytest.raises(RequestError, match="either epochs or steps"):
        Engine(epochs=1, steps=1)
    with pytest.raises(RequestError, match=r"trainer.patience 0"):
        Engine(epochs=1, patience=0)
    with pytest.raises(RequestError, match="16-mixed"):
        fit(line(), Data(), Engine(epochs=1, precision="16-mixed", device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_dropped_in_training_are_drawn_anew_each_step_and_alike_after_an_interruption(tmp_path: Path) -> None:
    drawn: dict[str, list[int]] = {}

    def watched(name: str):
        task, seen = line(), drawn.setdefault(name, [])
        plain = task.loss

        def loss(samples):
            result = plain(samples)
            seen.append(task.model.state.drawn)
            below, above = (p.requires_grad for p in (task.model.backbone[0](samples["x"]), result))
            assert below != bool(seen[-1])  # nothing of the first layer is in the graph where its adapter rests
            assert above
            return result

        task.loss = loss
        return task

    whole, engine = watched("whole"), Engine(epochs=4, adapter_drop=1)
    torch.manual_seed(11)
    expected = fit(whole, Data(), engine, tmp_path / "whole")
    assert len(drawn["whole"]) == 20
    assert 3 < sum(drawn["whole"]) < 17
    assert (whole.model.state.most, whole.model.state.drawn) == (0, 0)
    first = interrupt(watched("first"), epoch=2)
    torch.manual_seed(11)
    with pytest.raises(Interrupted):
        fit(first, Data(), engine, tmp_path / "parts")
    found = fit(watched("second"), Data(), engine, tmp_path / "parts", resume=True)
    assert drawn["second"] == drawn["whole"][10:]
    assert found["test"] == expected["test"]


def test_wrong_drops_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"trainer.adapter_drop -1: use 0 or more"):
        Engine(epochs=1, adapter_drop=-1)
    with pytest.raises(
        RequestError, match=r"AdapterDrop of 2 blocks: LoRA 'default' acts in blocks 0 to 1: use 1 to 1"
    ):
        fit(line(), Data(), Engine(epochs=1, adapter_drop=2), tmp_path)


def test_a_tensor_that_never_trains_is_an_error_with_drops_too(tmp_path: Path) -> None:
    task = line()
    task.model.head.unused = torch.nn.Parameter(torch.ones(2))  # type: ignore[union-attr]
    with pytest.raises(WorkError, match=r"no gradient reaches head.unused \(1 of \d+ trainable tensors\)"):
        fit(task, Data(), Engine(epochs=4, adapter_drop=1), tmp_path)
