"""Runs: the directory holds what it promises, repeats exactly, and nothing is overwritten or mixed up."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pytest
import torch
import yaml

from shared import recipe, run
from shared.errors import RequestError, WorkError
from shared.store import read_header

SMALL = """
task: {type: Segmentation}
data: {type: GeneratedScenes, count: 6, size: 32, bands: [red, green, blue, nir], batch_size: 2}
backbone:
  type: TimmViT
  name: vit_tiny_patch16_224
  weights: random
  image_size: 32
  depths: [0]
  model_args: {depth: 1, embed_dim: 12, num_heads: 2}
method: {type: LoRA, rank: 2}
head: {type: LightDecoder, width: 8}
optimiser: {learning_rate: 0.01}
trainer: {epochs: 2, device: cpu}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "small <&> one.yaml"
    path.write_text(SMALL)
    return recipe.load(str(path))


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, run.run(small, folder)


class Page(HTMLParser):
    """Addresses and tags of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "use", "path", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_directory_holds_what_it_promises(done, small):
    folder, found = done
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "adapter.safetensors", "metrics.json", "metrics.csv", "checkpoints", "log.txt", "report.html",
    }  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(found))
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == small.tree
    assert found["test"]["miou"] == pytest.approx(
        sum(v for n, v in found["test"].items() if n.startswith("iou/") and v is not None)
        / sum(v is not None for n, v in found["test"].items() if n.startswith("iou/"))
    )
    assert found["parameters"]["adapter"] == 2 * 2 * (12 + 12) == run.count(small)["adapter"]
    assert found["steps"] == 2 * found["epochs"] == 4
    assert found["predicted"]["trainable"] == found["parameters"]["trainable"]
    more = {"trainable", "trained_backbone", "epoch_seconds", "plan_seconds"}
    assert found["predicted"].keys() == {*found["cost"], *more}
    assert found["file_bytes"] == (folder / "adapter.safetensors").stat().st_size
    with open(folder / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 4


def test_the_adapter_file_rebuilds_the_model_that_was_tested(done, small):
    folder, found = done
    header = read_header(folder / "adapter.safetensors")
    assert header["method"]["type"] == "LoRA"
    assert header["method"]["arguments"]["rank"] == 2
    assert header["metrics"] == {n: v for n, v in found["test"].items() if isinstance(v, (int, float))}
    assert header["extra"]["recipe"] == small.tree
    data = small.build("data")
    model = run.build(small, data)
    model.load(folder / "adapter.safetensors")
    task = small.build("task", model=model, data=data, optimiser=small.build("optimiser"))
    for batch in data.test():
        task.validation_step(batch, 0)
        task.eval()
    assert task.results()["confusion"] == found["test"]["confusion"]


def test_the_page_is_whole_self_contained_and_escaped(done):
    folder, found = done
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "small &lt;&amp;&gt; one" in text
    assert "<&>" not in text
    assert "weights are random" in text
    assert f"{found['test']['miou']:.4f}" in text
    for label in (
        "true colour",
        "NIR, red, green",
        "truth",
        "prediction",
        "errors",
    ):  # every image of the charts is one
        assert (
            text.count(f'<img alt="{label} of ') == len([a for a in page.addresses if a.startswith("data:")]) // 5 > 0
        )
    assert "Confusion of classes (pixels)" in text
    assert f"{1000 * found['predicted']['step_seconds']:.1f} ms" in text
    assert len(text) < 400_000
    assert text.count("<svg") >= 3
    assert "rank: 2" in text
    assert torch.__version__.partition("+")[0] in text


def test_the_log_tells_data_parameters_and_scores(done):
    text = (done[0] / "log.txt").read_text()
    for word in ("recipe small", 'predicted {"trainable": ', "data {", "parameters {", "test {", "done: "):
        assert word in text


def test_running_the_resolved_recipe_repeats_the_run_exactly(done, tmp_path):
    folder, found = done
    again = run.run(recipe.load(str(folder / "recipe.yaml")), tmp_path / "again")
    assert again["test"] == found["test"]
    assert again["best"] == found["best"]


def test_resuming_a_finished_run_changes_nothing(small, tmp_path):
    first = run.run(small, tmp_path)
    assert run.directory(small, tmp_path, resume=True) == tmp_path
    assert run.run(small, tmp_path, resume=True)["test"] == first["test"]


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(small):
    def weights(one):
        return run.build(one, small.outline()).trainable()["head.classify.weight"]

    assert torch.equal(weights(small), weights(small))
    assert not torch.equal(weights(small), weights(small.replaced(seed=1)))


def test_a_failure_is_logged(small, tmp_path):
    with pytest.raises(WorkError, match="loss is"):
        run.run(small.replaced(optimiser={"learning_rate": 1e30}), tmp_path)
    assert "stopped: WorkError: " in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_wrong_request_leaves_no_directory(small, tmp_path):
    with pytest.raises(RequestError, match="trainer: give either epochs or steps"):
        run.run(small.replaced(trainer={"steps": 3}), tmp_path / "a")
    with pytest.raises(RequestError, match="resample"):
        run.run(small.replaced(method={"type": "ResAdapter"}), tmp_path / "b")
    with pytest.raises(RequestError, match="16-mixed' needs a GPU"):
        run.run(small.replaced(trainer={"precision": "16-mixed"}), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


class TestDirectory:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def past(self, small, name: str):
        from pathlib import Path

        folder = Path("runs") / small.name / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(small.text())
        return folder

    def test_new_runs_go_below_the_recipe_s_name_and_never_collide(self, small, monkeypatch):
        first = run.directory(small, None)
        assert first.parts[:2] == ("runs", "small <&> one")
        monkeypatch.setattr(
            run, "datetime", type("Fixed", (), {"now": lambda: type("T", (), {"strftime": lambda s, f: "t"})()})
        )
        self.past(small, "t")
        self.past(small, "t_2")
        assert run.directory(small, None).name == "t_3"

    def test_what_is_there_is_not_overwritten(self, small, tmp_path):
        folder = self.past(small, "a")
        with pytest.raises(RequestError, match="not an empty directory; add --resume"):
            run.directory(small, folder)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "letter.txt").touch()
        with pytest.raises(RequestError, match="other is not an empty directory$"):
            run.directory(small, tmp_path / "other")
        with pytest.raises(RequestError, match="letter.txt is not an empty directory"):
            run.directory(small, tmp_path / "other" / "letter.txt")

    def test_resuming_takes_the_last_run_of_the_same_recipe(self, small):
        with pytest.raises(RequestError, match="nothing to resume: runs/small <&> one holds no run"):
            run.directory(small, None, resume=True)
        self.past(small, "2026-01-01_00-00-00")
        last = self.past(small, "2026-01-02_00-00-00")
        assert run.directory(small, None, resume=True) == last
        with pytest.raises(RequestError, match=r"cannot go on with another recipe: method\.rank was 2, now 4"):
            run.directory(small.replaced(method={"rank": 4}), None, resume=True)
        with pytest.raises(RequestError, match=r"trainer\.clip was not set, now 1"):
            run.directory(small.replaced(trainer={"clip": 1.0}), last, resume=True)
