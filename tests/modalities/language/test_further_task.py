"""A further task: only what is its own trains, and the earlier tasks' outputs stay bit for bit what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modalities.language.data import GeneratedForms, GeneratedText, SeveralTasks
from shared import store, taxonomy
from shared.errors import RequestError
from shared.methods import Hyperformer, VLAdapter
from shared.training.engine import Engine, fit
from tests.modalities.language.test_several import METHODS, TASKS, data, problem

EARLIER = {kind: METHODS[kind] for kind in ("none", "down", "hyperformer")}
EARLIER["up"] = VLAdapter(share="up", tasks=TASKS, norm_before=True)
ENGINE = Engine(epochs=1, device="cpu")


def three(**more) -> SeveralTasks:
    small = {"tokenizer": "bytes", "batch_size": 8, "count": 60}
    tasks = {"topic": GeneratedText(**small), "form": GeneratedForms(**small), "new": GeneratedText(**small, seed=5)}
    return SeveralTasks(tasks=tasks, **more)


def outputs(task, given) -> dict[str, torch.Tensor]:
    task.eval()
    with torch.no_grad():
        batches = [(batch["task"], task.outputs(batch)) for batch in given.test() if batch["task"] != "new"]
    return {name: torch.cat([output for own, output in batches if own == name]) for name in TASKS}


@pytest.mark.parametrize("kind", EARLIER)
def test_only_the_further_task_trains_and_the_others_say_what_they_said(kind, tmp_path):
    method = EARLIER[kind]
    old, given = problem(method)
    fit(old, given, ENGINE, tmp_path / "old")
    old.model.save(tmp_path / "old.safetensors")
    before = outputs(old, given)

    grown = replace(method, further=("new",), earlier=tmp_path / "old.safetensors")
    task, more = problem(grown, three(only=["new"]))
    own = {n for n, p in task.model.named_parameters() if p.requires_grad}
    assert own
    assert all(".new." in name for name in own)
    sites = grown.sites(task.model.sites())
    assert task.model.count()["adapter"] == taxonomy.count(method.record, grown, sites)
    if kind == "hyperformer":
        assert task.model.count()["adapter"] == 6  # an embedding
    found = fit(task, more, ENGINE, tmp_path / "new")["test"]
    after = outputs(task, more)
    for name in TASKS:
        assert torch.equal(after[name], before[name])
        assert found[f"accuracy/{name}"] == old.outcome["test"][f"accuracy/{name}"]

    task.model.save(tmp_path / "new.safetensors")  # a whole file: the earlier one is not needed again
    (tmp_path / "old.safetensors").unlink()
    again, _ = problem(grown, three())
    again.model.load(tmp_path / "new.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, more).values(), after.values(), strict=True))
    assert store.read_header(tmp_path / "new.safetensors")["method"]["arguments"]["further"] == ["new"]


def test_a_task_is_added_to_an_added_one(tmp_path):
    old, _ = problem(EARLIER["none"])
    old.model.save(tmp_path / "a")
    grown = replace(EARLIER["none"], further=("new",), earlier=tmp_path / "a")
    second, more = problem(grown, three(only=["new"]))
    second.model.prepare([], second.loss)
    second.model.save(tmp_path / "b")
    third = VLAdapter(share="none", tasks=("topic", "form", "new"), further=("last",), earlier=tmp_path / "b")
    tasks = {**more.tasks, "last": more.tasks["form"]}
    last, _ = problem(third, SeveralTasks(tasks=tasks, only=["last"]))
    last.model.prepare([], last.loss)
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(last, more).values(), outputs(second, more).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": 4}, "made with method.reduction 8, now 4: give the same"),
        ({"tasks": ("form", "topic")}, "it has the tasks topic, form: give method.tasks these, in this order"),
        ({"share": "down"}, "made with method.share 'none', now 'down'"),
    ],
)
def test_a_file_that_does_not_fit_is_told(change, message, tmp_path):
    old, _ = problem(EARLIER["none"])
    old.model.save(tmp_path / "a")
    grown = replace(EARLIER["none"], further=("new",), earlier=tmp_path / "a", **change)
    task, _ = problem(grown, three(only=["new"]))
    before = {n: p.clone() for n, p in task.model.trained_state().items()}
    with pytest.raises(RequestError, match="(?s)a: " + message):
        task.model.prepare([], task.loss)
    assert all(torch.equal(p, before[n]) for n, p in task.model.trained_state().items())


def test_other_classes_of_an_earlier_task_do_not_fit(tmp_path):
    old, _ = problem(EARLIER["none"])
    old.model.save(tmp_path / "a")
    grown = replace(EARLIER["none"], further=("new",), earlier=tmp_path / "a")
    given = three(only=["new"])
    tasks = {**given.tasks, "form": given.tasks["topic"]}
    task, _ = problem(grown, SeveralTasks(tasks=tasks, only=["new"]))
    with pytest.raises(RequestError, match="head.heads.form.classify.* does not fit what the earlier tasks have"):
        task.model.prepare([], task.loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VLAdapter(share="none", tasks=("a",), further=("b",)), "further tasks need tasks and the file"),
        (lambda: Hyperformer(earlier=Path("x")), "further tasks need tasks and the file"),
        (lambda: Hyperformer(tasks=("a",), further=("a",), earlier=Path("x")), "one or more different names"),
        (lambda: VLAdapter(tasks=("a",), further=("b",), earlier=Path("x")), "a further task has nothing of its own"),
    ],
)
def test_what_cannot_be_is_one_line(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_data_of_the_earlier_tasks_alone_is_refused():
    with pytest.raises(RequestError, match="VLAdapter has tasks topic, form, new, the data topic, form"):
        problem(replace(EARLIER["none"], further=("new",), earlier=Path("x")), data())
