"""Predicted costs: they are near what is measured, and a run with a prediction is bit for bit one without."""

from __future__ import annotations

import copy
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from shared import plan
from shared.adapted import adapt
from shared.errors import RequestError
from shared.training import Engine, Optimiser, fit
from tests.shared.test_prepare import Prepared
from tests.shared.training.everything import everything
from tests.shared.training.problem import Data, Head, Line, Points, line

EPOCHS = Engine(epochs=2, device="cpu")


def prepared() -> Line:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16))
    model = adapt(backbone, Prepared(), head=Head(16, 1), example=(torch.randn(2, 4),))
    return Line(model, Optimiser(learning_rate=1e-2))


class Kept(Data):
    """Its loaders, and what they draw from, are the same whenever they are asked for."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.loaders = {split: getattr(super(Kept, self), split)() for split in ("train", "validation", "test")}

    def train(self) -> DataLoader:
        return self.loaders["train"]

    def validation(self) -> DataLoader:
        return self.loaders["validation"]


def random_states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def whole_state(task) -> dict:
    return {n: t.clone() for n, t in (*task.named_parameters(), *task.named_buffers())}


@pytest.mark.parametrize(
    ("build", "order"),
    [(line, "shuffled"), (line, "sampler"), (everything, "shuffled"), (prepared, "shuffled"), (prepared, "generator")],
)
def test_a_run_with_a_prediction_is_bit_for_bit_one_without(tmp_path, build, order):
    def trained(predict: bool):
        task, data = build(), Kept(order, noisy=True)
        torch.manual_seed(11)
        random.seed(12)
        np.random.seed(13)
        if predict:
            assert plan.plan(task, data, EPOCHS, tmp_path)
        found = fit(task, data, EPOCHS, tmp_path / str(predict))
        return task, found["test"], random_states()

    (one, found, states), (other, found_other, states_other) = trained(False), trained(True)
    assert found == found_other
    assert one.seen == other.seen
    assert states == states_other
    for (name, a), (_, b) in zip(whole_state(one).items(), whole_state(other).items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("build", "precision"), [(line, "64"), (everything, "32"), (prepared, "bf16-mixed")])
def test_a_prediction_leaves_the_task_and_the_random_states_as_they_were(tmp_path, build, precision):
    task = build()
    before, states, mode = whole_state(task), random_states(), [m.training for m in task.modules()]
    data = Data()
    if precision == "64":
        data.training.x, data.training.y = data.training.x.double(), data.training.y.double()
        data.checking.x, data.checking.y = data.checking.x.double(), data.checking.y.double()
    plan.plan(task, data, Engine(epochs=1, device="cpu", precision=precision), tmp_path)
    after = whole_state(task)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert random_states() == states
    assert [m.training for m in task.modules()] == mode
    assert (task.seen, task.outcome, task.model.prepared) == ([], {}, set())
    assert list(tmp_path.iterdir()) == []


def test_a_copy_shares_the_frozen_weights_alone():
    task = line()
    trial = plan.trial(task, EPOCHS, plan._Watch())
    for (name, mine), (_, its) in zip(task.named_parameters(), trial.named_parameters(), strict=True):
        assert (mine is its) == (not mine.requires_grad), name


class Slow(Line):
    """Batches take 20 ms, those of a check 10 ms, on a clock that nothing else moves."""

    def loss(self, batch):
        Slow.now += 0.02
        return super().loss(batch)

    def evaluate(self, batch):
        Slow.now += 0.01
        super().evaluate(batch)

    now = 0.0


@pytest.mark.parametrize(
    ("engine", "batches", "checks"),
    [
        ({"epochs": 4, "check_every": 2}, 40, 2),
        ({"steps": 6, "accumulate": 2}, 12, 2),
    ],
)
def test_what_is_predicted_is_what_is_measured(tmp_path, monkeypatch, engine, batches, checks):
    monkeypatch.setattr(time, "perf_counter", lambda: Slow.now)
    chosen, data = Engine(**engine, device="cpu"), Data(count=40, checks=24)
    task = Slow(line().model, Optimiser(learning_rate=1e-2))
    found = plan.plan(task, data, chosen, tmp_path)
    cost = fit(task, data, chosen, tmp_path / "run")["cost"]
    assert found.trainable == task.model.count()["trainable"] == sum(p.numel() for p in task.model.trainable().values())
    assert found.step_seconds == pytest.approx(0.02) == cost["step_seconds"]
    assert found.train_seconds == pytest.approx(batches * 0.02 + checks * 6 * 0.01)
    assert found.train_seconds == pytest.approx(cost["train_seconds"])
    assert found.peak_memory_bytes == pytest.approx(cost["peak_memory_bytes"], rel=0.1)


def test_a_first_check_that_is_slow_is_not_taken_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: Slow.now)

    class Cold(Slow):
        checked = 0

        def evaluate(self, batch):
            Slow.now += 5.0 * (Cold.checked == 0)  # as where the metrics' library is imported
            Cold.checked += 1
            super().evaluate(batch)

    chosen, data = Engine(epochs=4, check_every=2, device="cpu"), Data(count=40, checks=24)
    found = plan.plan(Cold(line().model, Optimiser(learning_rate=1e-2)), data, chosen, tmp_path)
    assert found.train_seconds == pytest.approx(40 * 0.02 + 2 * 6 * 0.01)


def test_the_parts_of_a_training_add_up():
    watch = plan._Watch()
    watch.steps, watch.waits, watch.checks, watch.after = (
        [9.0, 1.0, 1.0, 1.5],
        [5.0, 0.5, 0.5, 0.5],
        [[20.0, 22.0, 23.0]],
        4.0,
    )
    engine = Engine(epochs=3, check_every=2)
    # The loader's start of 5; 29 waits of 0.5; 30 batches of 1; 2 checks of 4 and 8 more validation batches of 1.
    assert watch.training(engine, batches=10, validation=10) == 5 + 29 * 0.5 + 30 + 2 * (4 + 8)


def test_few_batches_of_the_data_are_read(tmp_path):
    data = Data(count=400, checks=400)
    read: list[int] = []

    class Counted(Points):
        def __getitem__(self, index: int) -> dict:
            read.append(index)
            return super().__getitem__(index)

    data.training.__class__ = data.checking.__class__ = Counted
    plan.plan(line(), data, EPOCHS, tmp_path)
    assert len(read) == 4 * (plan.PASSES * (plan.TRIED + plan.CHECKED) + plan.CHECKED)  # what stands for the test


def test_a_prediction_that_fails_is_a_line_in_the_log(tmp_path, caplog):
    before = copy.deepcopy(EPOCHS)
    assert plan.predict(line(learning_rate=1e30), Data(), EPOCHS, tmp_path) is None
    assert "no prediction of the cost: WorkError: the training loss is" in caplog.text
    assert "no prediction of the cost: RequestError: costs are predicted for one process" not in caplog.text
    assert plan.predict(line(), Data(), Engine(epochs=1, devices=2), tmp_path) is None
    assert "costs are predicted for one process" in caplog.text
    with pytest.raises(RequestError, match="one process"):
        plan.plan(line(), Data(), Engine(epochs=1, devices=2), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert before == EPOCHS


def test_a_warm_up_longer_than_the_trial_hinders_no_prediction(tmp_path):
    task = line()
    task.optimiser = Optimiser(learning_rate=1e-2, warmup=6)
    assert plan.predict(task, Data(), EPOCHS, tmp_path) is not None
    assert task.optimiser.warmup == 6
