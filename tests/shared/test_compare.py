"""Comparisons: the table is what the runs measured, and everything is checked before the first one starts."""

from __future__ import annotations

import json
import statistics
import warnings

import pytest
import torch

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
        assert row.latency == json.loads((folder / row.method / "latency.json").read_text())
        assert set(row.latency["one"]) == set(row.latency["batch"]) == {"bare", "separate", "folded", "merged"}
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


def test_the_ways_of_the_recipe_s_own_section_are_the_default(small, tmp_path, capsys):
    path = tmp_path / "small.yaml"
    ways = {"wide": {"method": {"rank": 4}}, "tuned probe": {"method": {"type": "Probe"}, "optimiser": {"power": 2}}}
    path.write_text(small.text() + "\n" + json.dumps({"compare": ways})[1:-1].replace('"compare": ', "compare: "))
    own = recipe.load(str(path))
    assert own.variants == ways
    assert "compare" not in own.tree
    assert "compare" not in own.text()
    (tmp_path / "again.yaml").write_text(own.text(variants=True))
    assert recipe.load(str(tmp_path / "again.yaml")).variants == ways
    planned = compare._plan(own, [], [0, 1], None)
    assert [one.place for one in planned] == [f"{way}/seed_{n}" for way in ways for n in (0, 1)]
    assert planned[0].recipe.tree["method"] == {"type": "LoRA", "rank": 4}
    assert planned[3].recipe.tree["optimiser"]["power"] == 2
    assert [one.method for one in compare._plan(own, ["wide", "lora"], [0], None)] == ["wide", "LoRA"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("compare: [lora]", "compare: wants a name with sections to override for each"),
        ("compare: {a/b: {seed: 1}}", "compare: 'a/b' is no name for a directory"),
        ("compare: {a: {method: {rnk: 1}}}", "compare.a: method.rnk: LoRA has no such setting; nearest: 'rank'"),
    ],
)
def test_a_wrong_section_is_told_with_its_name(small, tmp_path, section, message):
    path = tmp_path / "small.yaml"
    path.write_text(small.text() + "\n" + section)
    with pytest.raises(RequestError, match=message):
        recipe.load(str(path))


def test_all_are_those_that_fit_and_the_others_are_told(small, capsys):
    planned = compare._plan(small, ["all"], [0, 1], None)
    kept, data = compare._fitting(planned, [small.build("data")] * len(planned), skip=True)
    names = {one.method for one in kept}
    assert {"Probe", "LoRA", "Full", "BitFit", "Prompt"} <= names
    assert "ResAdapter" not in names
    assert len(data) == len(kept) == 2 * len(names)
    assert "ResAdapter does not fit: " in capsys.readouterr().out


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


def test_a_lost_latency_is_measured_again_on_data_normalised_as_the_backbone_wants(tmp_path):
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES.replace(", normalisation: measured", ", size: 32, crop: 1.0") + "trainer: {steps: 1}\n")
    chosen, folder = recipe.load(str(path)), tmp_path / "out"
    (row,) = compare.compare(chosen, ["probe"], [0], folder)
    (folder / "Probe" / "latency.json").unlink()
    (again,) = compare.compare(recipe.load(str(path)), ["probe"], [0], folder, resume=True)
    assert again.latency["batch"].keys() == row.latency["batch"].keys()
    assert again.scores == row.scores


def test_data_that_the_run_s_seed_draws_are_drawn_once_a_seed_for_all_methods(tmp_path):
    path = tmp_path / "images.yaml"
    path.write_text(IMAGES)
    chosen = recipe.load(str(path))
    first, second, third, fourth = compare._data(compare._plan(chosen, ["probe", "lora"], [0, 1], None))
    assert (first.seed, second.seed) == (0, 1)
    assert first is third
    assert second is fourth
    assert first.members != second.members
    fixed = compare._data(compare._plan(recipe.load(str(path), ["data.seed=4"]), ["probe"], [0, 1], None))
    assert fixed[0] is fixed[1]
    assert fixed[0].seed == 4


# -- folds -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(small, tmp_path_factory):
    """Four scenes of one tile each, three folds; the recipe, and the folder of its comparison."""
    import numpy as np
    import rasterio

    root, random = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for scene in range(4):
        image = random.uniform(0.1, 1, (8, 32, 32)).astype(np.float32)
        mask = random.choice(np.array([64, 128, 192, 255], np.uint8), (1, 32, 32))
        for part, array in (("images", image), ("masks", mask)):
            size = {"driver": "GTiff", "count": len(array), "height": 32, "width": 32, "dtype": array.dtype}
            path = root / part / f"S_{scene}_0.tif"
            with warnings.catch_warnings(action="ignore"), rasterio.open(path, "w", **size) as file:
                file.write(array)
    one = small.replaced(data={"type": "LandsatBiome", "root": str(root), "batch_size": 2})
    folder = tmp_path_factory.mktemp("folds") / "out"
    return one, folder, compare.compare(one, ["probe"], [0, 1], folder, folds=4)


def test_folds_are_scored_as_one_test_split(folded):
    _, folder, (row,) = folded
    scores = []
    for seed in (0, 1):
        files = [folder / "Probe" / f"seed_{seed}" / f"fold_{k}" / "metrics.json" for k in range(4)]
        runs = [json.loads(file.read_text()) for file in files]
        tested = [scene for run in runs for scene in run["data"]["splits"]["test"]["scenes"]]
        assert sorted(tested) == ["S_0", "S_1", "S_2", "S_3"]
        total = torch.tensor([run["test"]["confusion"] for run in runs]).sum(0).double()
        assert total.sum() == 4 * 32 * 32
        union = total.sum(0) + total.sum(1) - total.diagonal()
        scores.append((total.diagonal() / union).mean().item())
    assert (row.method, row.seeds) == ("Probe", 2)
    assert row.scores["miou"] == pytest.approx(statistics.mean(scores))
    assert row.spreads["miou"] == pytest.approx(statistics.stdev(scores))
    assert 'href="Probe/seed_1/fold_3/report.html"' in (folder / "report.html").read_text()


def test_a_comparison_goes_on_without_training_what_is_finished(folded, monkeypatch):
    one, folder, (row,) = folded
    monkeypatch.setattr("shared.run.run", lambda *_, **__: pytest.fail("a run has started"))
    assert compare.compare(one, ["probe"], [0, 1], folder, folds=4, resume=True) == [row]
    with pytest.raises(RequestError, match="cannot go on with another recipe: trainer.steps was 1, now 2"):
        compare.compare(one.replaced(trainer={"steps": 2}), ["probe"], [0, 1], folder, folds=4, resume=True)
    with pytest.raises(RequestError, match="is not an empty directory"):
        compare.compare(one, ["probe"], [0, 1], folder, folds=4)
    with pytest.raises(RequestError, match="is not an empty directory"):
        compare.compare(one, ["probe"], [0, 1], folder.parent, folds=4, resume=True)


def test_data_without_folds_and_too_few_of_them_are_refused(small, tmp_path):
    with pytest.raises(RequestError, match="data.fold: GeneratedScenes has no such setting"):
        compare.compare(small, ["probe"], [0], tmp_path / "out", folds=3)
    with pytest.raises(RequestError, match="1 folds: use 2 or more"):
        compare.compare(small, ["probe"], [0], tmp_path / "out", folds=1)
    assert not (tmp_path / "out").exists()


def test_numbers_of_several_splits_are_averaged_where_a_task_has_no_counts():
    from shared.training import Task

    assert Task.pooled([{"loss": 1.0, "text": "a", "f1": None}, {"loss": 2.0, "text": "b", "f1": 1.0}]) == {"loss": 1.5}
