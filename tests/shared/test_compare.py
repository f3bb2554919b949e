"""Comparisons: the table is what the runs measured, and everything is checked before the first one starts."""

from __future__ import annotations

import json
import statistics

import pytest

from shared import compare, recipe
from shared.errors import RequestError
from tests.shared.test_run import SMALL

IMAGES = """
task: {type: Classification}
data: {type: GeneratedImages, count: 4, normalisation: measured}
backbone: {type: TimmViT, name: vit_small_patch16_224, weights: random, image_size: 32, patch_size: 8,
           model_args: {depth: 1, embed_dim: 24, num_heads: 2}}
method: {type: Probe}
head: {type: LinearHead}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(SMALL.replace("epochs: 2", "steps: 1"))
    return recipe.load(str(path))


@pytest.fixture(scope="module")
def compared(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    return folder, compare.compare(small, ["probe", "lora"], [0, 1], folder)


def test_rows_are_means_and_spreads_of_the_runs(compared):
    folder, rows = compared
    assert [row.method for row in rows] == ["Probe", "LoRA"]
    for row in rows:
        found = [json.loads((folder / row.method / f"seed_{n}" / "metrics.json").read_text()) for n in (0, 1)]
        scores = [run["test"]["miou"] for run in found]
        assert row.seeds == 2
        assert row.scores["miou"] == pytest.approx(statistics.mean(scores))
        assert row.spreads["miou"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
        assert row.trainable == found[0]["parameters"]["trainable"]
        assert row.file_bytes == statistics.mean(run["file_bytes"] for run in found)
        assert row.peak_bytes > 1e8
    probe, lora = rows
    assert lora.trainable - probe.trainable == 2 * 2 * (12 + 12)


def test_the_recipe_s_own_method_keeps_its_settings_and_others_start_from_theirs(compared, small):
    folder, _ = compared
    read = {m: recipe.load(str(folder / m / "seed_1" / "recipe.yaml")) for m in ("LoRA", "Probe")}
    assert read["LoRA"].tree["method"] == {"type": "LoRA", "rank": 2}
    assert read["Probe"].tree["method"] == {"type": "Probe"}
    assert {one.seed for one in read.values()} == {1}
    assert {str(one.tree["data"]) for one in read.values()} == {str(small.tree["data"])}


def test_the_page_holds_the_table_the_plot_and_the_runs(compared):
    folder, rows = compared
    text = (folder / "report.html").read_text()
    for row in rows:
        assert f"{row.scores['miou']:.3f} ± {row.spreads['miou']:.3f}" in text
        assert f"{row.trainable:,}" in text
        assert f'href="{row.method}/seed_1/report.html"' in text
    assert "trainable parameters" in text
    assert "Cost, predicted / measured" in text
    assert text.count("<svg") == 1
    assert "weights are random" in text
    assert json.loads((folder / "compare.json").read_text())[0]["method"] == "Probe"


def test_printing(compared, small, capsys):
    from shared.report.compare_page import print_comparison

    folder, rows = compared
    found = {row.method: [json.loads((folder / row.method / "seed_0" / "metrics.json").read_text())] for row in rows}
    print_comparison(small, rows, found)
    out = capsys.readouterr().out
    assert "IoU thin cloud" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    cells = [f"{1000 * r[of]['step_seconds']:.1f}" for r in found["LoRA"] for of in ("predicted", "cost")]
    assert f"{cells[0]} ms / {cells[1]} ms" in out
    assert f"{rows[1].trainable:,}" in out
    assert "weights are random" in out


def test_a_method_that_does_not_fit_the_backbone_is_told_before_anything_trains(small, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.run.run", lambda *_, **__: pytest.fail("a run has started"))
    with pytest.raises(RequestError, match="role 'conv'|no site|tags"):
        compare.compare(small, ["probe", "res_adapter"], [0], tmp_path / "out")


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        ([], [0], "name at least one method"),
        (["lora", "LoRA"], [0], "LoRA is named twice"),
        (["lora"], [1, 1], "1 is named twice"),
        (["lorra"], [0], "no method is called 'lorra'; nearest: 'LoRA'"),
    ],
)
def test_wrong_requests(small, tmp_path, methods, seeds, message):
    with pytest.raises(RequestError, match=message):
        compare.compare(small, methods, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_the_run_s_seed_draws_are_drawn_once_a_seed_for_all_methods(tmp_path):
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES)
    chosen = recipe.load(str(path))
    planned = compare._recipes(chosen, ["probe", "lora"], [0, 1])
    data = compare._data(planned)
    assert {seed: each.seed for seed, each in data.items()} == {0: 0, 1: 1}
    assert data[0].members != data[1].members
    fixed = compare._data(compare._recipes(recipe.load(str(path), ["data.seed=4"]), ["probe"], [0, 1]))
    assert fixed[0] is fixed[1]
    assert fixed[0].seed == 4
