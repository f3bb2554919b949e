"""Training in several tasks: the context arrives, one task's step moves its own, resume, scores by task, prediction."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import torch.nn.functional as F

from modalities.language.backbones import TransformersText
from modalities.language.data import GeneratedForms, GeneratedText, SeveralTasks
from modalities.language.data.texts import padded
from modalities.language.heads import TextHead, TextHeads
from modalities.language.several import MultiTaskTextClassification
from modalities.language.tokens import Tokens
from shared import cli, recipe, run
from shared.adapted import adapt
from shared.compare import Row
from shared.errors import RequestError, WorkError
from shared.methods import Full, Hyperformer, LoRA, VLAdapter
from shared.report.compare_page import print_comparison
from shared.training.engine import Engine, fit
from shared.training.optimiser import Optimiser
from tests.modalities.language.test_tasks import SMALL
from tests.shared.training.test_fit import Interrupted
from tests.shared.training.test_resume import checkpoint, same

TASKS = ("topic", "form")
METHODS = {
    "none": VLAdapter(share="none", tasks=TASKS),
    "down": VLAdapter(share="down", tasks=TASKS),
    "all": VLAdapter(),
    "hyperformer": Hyperformer(tasks=TASKS, embedding=6, hidden=7, projected=5, reduction=4),
    "lora": LoRA(rank=2),
}
RECIPE = """
task: {type: MultiTaskTextClassification}
data:
  type: SeveralTasks
  tasks:
    topic: {type: GeneratedText, count: 60, batch_size: 8}
    form: {type: GeneratedForms, count: 60, batch_size: 8}
backbone: {type: SmallLM}
method: {type: VLAdapter, share: down, tasks: [topic, form]}
head: {type: TextHeads}
optimiser: {learning_rate: 3.0e-3}
trainer: {epochs: 1, device: cpu}
"""


def data(**more) -> SeveralTasks:
    small = {"tokenizer": "bytes", "batch_size": 8}
    return SeveralTasks(
        tasks={"topic": GeneratedText(count=60, **small), "form": GeneratedForms(**small, count=60)}, **more
    )


def problem(method, given=None) -> tuple[MultiTaskTextClassification, SeveralTasks]:
    given = given or data()
    torch.manual_seed(1)
    backbone = TransformersText(name="llama", weights="random", config=SMALL)
    head = TextHeads(backbone.channels, {task: len(names) for task, names in given.classes.items()})
    return MultiTaskTextClassification(adapt(backbone, method, head=head), given, Optimiser(learning_rate=3e-3)), given


def of(task: str, given: SeveralTasks):
    return next(batch for batch in given.train() if batch["task"] == task)


@pytest.mark.parametrize("kind", METHODS)
def test_a_batch_goes_through_its_task_s_branch_and_head(kind):
    task, given = problem(METHODS[kind])
    with torch.no_grad():
        for parameter in task.model.bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    batch = of("form", given)
    found = task.outputs(batch)
    assert found.shape == (8, 5)
    states = {}
    for name in TASKS:
        task.model.context.task = name
        hidden = task.model.backbone(batch["tokens"], batch["mask"])
        task.model.context.clear()
        states[name] = task.model.head.heads["form"](hidden)
    assert torch.equal(found, states["form"])
    assert torch.equal(states["topic"], states["form"]) == (kind in ("all", "lora"))


@pytest.mark.parametrize("kind", ["none", "down", "hyperformer"])
def test_a_step_of_one_task_moves_nothing_of_another_s_own(kind):
    """Also where another task's step came before: no momentum of the optimiser is left to move it."""
    task, given = problem(METHODS[kind])
    (optimiser, schedule) = (task.configure_optimizers()[k] for k in ("optimizer", "lr_scheduler"))
    del schedule
    trained = task.model.trainable()
    for name, other in (TASKS, TASKS[::-1], TASKS):
        before = {n: p.detach().clone() for n, p in trained.items()}
        optimiser.zero_grad()
        task.loss(of(name, given)).backward()
        optimiser.step()
        moved = {n for n, p in trained.items() if not torch.equal(p, before[n])}
        shared = [n for n in moved if not {*n.split(".")} & {name, other}]
        assert [n for n in moved if n.startswith("adapter.") and f".{name}." in n]
        assert f"head.heads.{name}.classify.weight" in moved
        strangers = [n for n in moved if f".{other}." in n]
        if kind == "down":  # what is shared has the name of its first holder
            strangers = [n for n in strangers if ".topic.down." not in n]
        assert not strangers
        assert bool(shared) == (kind == "hyperformer")


def test_scores_are_those_of_each_task_by_itself():
    task, given = problem(METHODS["none"])
    task.eval()
    hits, counts, nats = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0), 0.0
    with torch.no_grad():
        for batch in given.test():
            task.evaluate(batch)
            logits = task.model(batch["tokens"], batch["mask"], context={"task": batch["task"]})
            hits[batch["task"]] += int((logits.argmax(1) == batch["label"]).sum())
            counts[batch["task"]] += len(logits)
            nats += F.cross_entropy(logits, batch["label"], reduction="sum").item()
    found = task.results()
    for name in TASKS:
        assert found[f"accuracy/{name}"] == pytest.approx(hits[name] / counts[name])
        assert found[f"support/{name}"] == counts[name] == len(given.tasks[name].samples["test"])
        assert sum(map(sum, found["confusions"][name])) == counts[name]
    assert found["accuracy"] == pytest.approx(sum(hits[n] / counts[n] for n in TASKS) / 2)
    assert found["loss"] == pytest.approx(nats / sum(counts.values()), rel=1e-5)
    task.evaluate(of("topic", given))
    assert task.results()["accuracy"] is None  # of one task nothing is known


class Cut(MultiTaskTextClassification):
    """Stops in the third batch of the second epoch."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        if self.current_epoch == 1 and batch_idx == 3:
            raise Interrupted


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(temperature, tmp_path):
    engine = Engine(epochs=3, device="cpu", save_every=2)
    for name, kind in (("whole", MultiTaskTextClassification), ("cut", Cut), ("cut", MultiTaskTextClassification)):
        task, given = problem(METHODS["down"], data(temperature=temperature))
        task.__class__ = kind
        again = (tmp_path / name).exists()
        torch.manual_seed(99 if again else 5)
        try:
            fit(task, given, engine, tmp_path / name, resume=again)
        except Interrupted:
            assert kind is Cut
            assert 10 < checkpoint(tmp_path / name)["global_step"] < 14
    ours, theirs = (checkpoint(tmp_path / name) for name in ("cut", "whole"))
    for part in ("state_dict", "optimizer_states", "silent"):
        assert same(ours[part], theirs[part]), part
    assert ours["silent"] == []
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_the_first_epoch_must_reach_every_branch(tmp_path):
    """A task that never trains is found at the epoch's last batch, or where training ends before it."""
    for name, engine in (("epoch", Engine(epochs=2, device="cpu")), ("steps", Engine(steps=2, device="cpu"))):
        task, given = problem(METHODS["none"], data(only=["form"]))
        with pytest.raises(WorkError, match=r"no gradient reaches adapter.*\.topic\."):
            fit(task, given, engine, tmp_path / name)
        assert task.global_step == (4 if name == "epoch" else 2)


def test_a_run_remembers_which_branches_it_has_reached(tmp_path):
    """Stopped after two steps, a resumed run proves what is left of the first epoch."""
    task, _ = problem(METHODS["none"])
    for name in TASKS:
        task.silent = None
        task.on_load_checkpoint(kept := {"silent": [n for n in task.model.trainable() if f".{name}." in n]})
        task.on_save_checkpoint(saved := {})
        assert saved["silent"] == sorted(kept["silent"]) != []
    task.on_load_checkpoint({})
    assert task.silent is None


def test_full_fine_tuning_in_several_tasks_learns_both(tmp_path):
    """Multi-task fine-tuning: one encoder, a head for each task; chance is 0.25 and 0.2."""
    small = {"tokenizer": "bytes", "batch_size": 8, "count": 160}
    given = SeveralTasks(tasks={"topic": GeneratedText(**small), "form": GeneratedForms(**small)})
    task, _ = problem(Full(), given)
    found = fit(task, given, Engine(epochs=4, device="cpu"), tmp_path)["test"]
    assert found["accuracy/form"] > 0.6
    assert found["accuracy/topic"] > 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: problem(VLAdapter(share="none", tasks=("topic", "from"))),
            "VLAdapter has tasks topic, from, the data",
        ),
        (lambda: headed(lambda c: TextHead(c, 4), GeneratedText(count=60)), "needs data of several: SeveralTasks"),
        (lambda: headed(lambda c: TextHead(c, 4)), "needs a head for each: TextHeads"),
        (lambda: headed(lambda c: TextHeads(c, {"topic": 4, "form": 4})), "which are not those of the data"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(make, message):
    with pytest.raises(RequestError) as caught:
        make()
    assert message in str(caught.value)


def headed(head, given=None):
    backbone = TransformersText(name="llama", weights="random", config=SMALL)
    model = adapt(backbone, LoRA(rank=2), head=head(backbone.channels))
    return MultiTaskTextClassification(model, given or data(), Optimiser())


# -- as a recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    (folder / "r.yaml").write_text(RECIPE)
    assert cli.main(["run", str(folder / "r.yaml"), "--output", str(folder / "run"), "--debug"]) == 0
    return folder / "run"


def test_a_run_keeps_scores_by_task_and_predicts_its_cost(trained):
    found = json.loads((trained / "metrics.json").read_text())
    assert {"accuracy", "accuracy/topic", "accuracy/form"} <= found["test"].keys()
    assert found["best"]["monitor"] == "validation/accuracy"
    assert found["predicted"]["step_seconds"] > 0
    assert found["data"]["classes"].keys() == set(TASKS)


def test_its_page_shows_scores_and_confusions_by_task(trained):
    page = (trained / "report.html").read_text()
    for text in ("accuracy by task", "Confusion of classes (topic, texts)", "Confusion of classes (form, texts)"):
        assert text in page
    assert "by class" not in page
    for name in ("harbour", "denial"):
        assert name in page


def test_it_prints_scores_by_task(trained, capsys):
    from shared.report.terminal import print_run

    print_run(json.loads((trained / "metrics.json").read_text()))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["task", "accuracy", "macro-F1", "balanced", "accuracy", "texts"] in rows
    assert {row[0] for row in rows if row} >= {"topic", "form", "harbour", "denial"}


def test_files_are_classified_by_the_task_that_is_named(trained, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("why does the cold storm stay wet ?\n")
    words = ["predict", str(trained), str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.csv")]
    assert cli.main([*words, "--task", "form"]) == 0
    with open(tmp_path / "out.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    found = run.load(trained)
    ids = padded(Tokens("small_lm").encode([row["text"]], 64), 0)
    expected = found.task.scores(ids["tokens"], ids["mask"], "form")[0].tolist()
    assert [float(value) for value in list(row.values())[2:]] == pytest.approx(expected, abs=1e-5)
    assert [*row] == ["text", "label", "statement", "clause", "question", "past", "denial"]
    for more, message in (
        ([], "this run has several tasks: name one with --task, of "),
        (["--task", "topc"], "--task topc: the run has no such task; nearest: 'topic'"),
    ):
        assert cli.main([*words, "--overwrite", *more]) == 2
        assert message in capsys.readouterr().err


def test_a_loaded_run_scores_as_it_was_tested(trained):
    found, measured = run.load(trained), json.loads((trained / "metrics.json").read_text())["test"]
    with torch.no_grad():
        for batch in recipe.load(str(trained / "recipe.yaml")).build("data").test():
            found.task.evaluate(batch)
    again = found.task.results()
    assert again["confusions"] == measured["confusions"]
    assert again["accuracy"] == pytest.approx(measured["accuracy"])


def test_a_run_of_one_task_takes_no_name(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        "task: {type: TextClassification}\ndata: {type: GeneratedText, count: 60}\nbackbone: {type: SmallLM}\n"
        "method: {type: Probe}\nhead: {type: TextHead}\ntrainer: {steps: 1, device: cpu}\n"
    )
    assert cli.main(["run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run")]) == 0
    (tmp_path / "in.txt").write_text("a boat\n")
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.csv")]
    assert cli.main([*words, "--task", "topic"]) == 2
    assert "has one task, which has no name" in capsys.readouterr().err


def test_a_comparison_tells_scores_by_task(trained, capsys):
    found = json.loads((trained / "metrics.json").read_text())
    scores, times = run.scalars(found["test"]), {"bare": 1.0, "separate": 1.0, "folded": 1.0}
    row = Row("VLAdapter", 1, scores, dict.fromkeys(scores, 0.0), 1, 1.0, 1.0, 1.0, 1.0, {"one": times, "batch": times})
    print_comparison(recipe.load(str(trained / "recipe.yaml")), [row], {"VLAdapter": [found]})
    lines = capsys.readouterr().out.splitlines()
    for name in TASKS:
        (line,) = [line for line in lines if line.split()[:2] == ["accuracy", name]]
        assert line.split()[-1] == f"{found['test'][f'accuracy/{name}']:.3f}"
    assert not [line for line in lines if "support" in line]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.tasks.form.cuont=3", "data.tasks.form.cuont: GeneratedForms has no such setting; nearest: 'count'"),
        ("data.tasks.form.count=x", "data.tasks.form.count: wants int, got 'x'"),
        (
            "data.tasks.form.type=GeneratedForm",
            "data.tasks.form.type: no data is called 'GeneratedForm'; nearest: 'Gener",
        ),
        ("data.tasks.new.count=3", "data.tasks.new.type: wants the name of a data, got None"),
        ("data.tasks=[a]", "data.tasks: wants a name with a type and its settings for each, got ['a']"),
        (
            "data.tasks.form={type: TextFiles, train: gone.txt}",
            "data.tasks.form.train: no such file or folder: gone.txt",
        ),
        ("data.tasks.form={type: TextFiles}", "data.tasks.form.train: TextFiles needs it (Path)"),
    ],
)
def test_nested_data_are_checked_as_strictly_as_the_rest(change, message, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(RequestError) as caught:
        recipe.load(str(tmp_path / "r.yaml"), [change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nested_data_that_refuse_their_settings_are_told_with_their_path(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    chosen = recipe.load(str(tmp_path / "r.yaml"), ["data.tasks.form.count=0"])
    with pytest.raises(RequestError, match=r"data: tasks.form: count 0: at least 1 sentence"):
        chosen.build("data")


def test_a_recipe_of_several_tasks_is_counted_without_data(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    chosen = recipe.load(str(tmp_path / "r.yaml"))
    width = 192
    assert run.count(chosen)["head"] == (4 + 5) * (width + 1)
    changed = recipe.load(str(tmp_path / "r.yaml"), ["data.tasks.form.type=GeneratedText", "data.tasks.form.count=40"])
    assert run.count(changed)["head"] == (4 + 4) * (width + 1)
