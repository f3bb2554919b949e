"""Between the zero-shot and the tuned model: both ends bit for bit, between them, and a run that predicts there."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
import torch
from PIL import Image

from modalities.vision_language.coop import CoOp
from modalities.vision_language.heads import SimilarityHead, ZeroShotHead
from modalities.vision_language.zero_shot import classifier, ensembled
from shared import cli, run
from shared.errors import RequestError
from shared.methods import Full, LoRA, Probe
from shared.training import Engine, fit
from tests.modalities.vision_language.clips import NAMES, clip, fed, task, tuned

SMALL = """
task: {type: ClipClassification, templates: ["a photo of a {}."]}
data: {type: GeneratedImages, count: 8, classes: [disc, stripes, checks], side: 32, size: 32, crop: 1, batch_size: 8}
backbone: {type: OpenClip, name: ViT-B-32, pretrained: random, image_size: 32,
           model_args: {embed_dim: 24, width: 32, layers: 2, head_width: 16, patch_size: 8},
           text_args: {width: 32, layers: 1, heads: 2, context_length: 12}}
method: {type: LoRA, rank: 2}
head: {type: ZeroShotHead}
optimiser: {learning_rate: 2.0e-2}
trainer: {epochs: 2, device: cpu}
"""


@pytest.mark.parametrize("head", [SimilarityHead, lambda classes: ZeroShotHead(24, classes)])
def test_the_ensemble_at_0_is_the_zero_shot_model_and_at_1_the_tuned_one_bit_for_bit(head):
    image = torch.randn(4, 3, 32, 32)
    zero = task(Probe(), head(3)).predict(image)
    found = tuned(task(head=head(3)))
    whole = found.predict(image)
    assert (whole - zero).abs().max() > 1e-3
    at = {}
    for share in (0.0, 0.5, 1.0):
        found.ensemble = share
        at[share] = found.predict(image)
    assert torch.equal(at[0.0], zero)
    assert torch.equal(at[1.0], whole)
    assert all((at[0.5] - at[share]).abs().max() > 1e-4 for share in (0.0, 1.0))
    found.ensemble = 1.0
    assert torch.equal(found.predict(image), whole)


def test_half_of_a_low_rank_change_is_the_mean_of_the_weights():
    found = tuned(task(LoRA(rank=2, roles=("mlp.up",))))
    site = found.model.sites().select("mlp.up", tags="text")[0]
    host: Any = site.module
    with torch.no_grad():
        whole = host.weight.clone()
        with found.between(0.0):
            bare = host.weight.clone()
        with found.between(0.5):
            half = host.weight.clone()
    torch.testing.assert_close(half, (bare + whole) / 2)


def test_ensembled_states():
    first, second = ({"w": torch.randn(3, 3), "n": torch.tensor(k)} for k in (1, 5))
    for share, expected in ((0, first), (1, second)):
        assert all(torch.equal(t, expected[n]) for n, t in ensembled(first, second, share).items())
    torch.testing.assert_close(ensembled(first, second, 0.3)["w"], 0.7 * first["w"] + 0.3 * second["w"])
    with pytest.raises(RequestError, match="n is in one only"):
        ensembled(first, {"w": second["w"]}, 0.5)
    with pytest.raises(RequestError, match="w has two shapes"):
        ensembled(first, second | {"w": torch.zeros(2)}, 0.5)
    with pytest.raises(RequestError, match="ensemble 1.5: use a share"):
        ensembled(first, second, 1.5)


def test_ensembles_that_cannot_be_are_refused():
    with pytest.raises(RequestError, match="overwrites the zero-shot weights"):
        task(Full(), ensemble=0.5)
    with pytest.raises(RequestError, match="ensemble -1: use a share"):
        task(ensemble=-1)
    prompts = task(CoOp(count=2), templates=("X X {}",), ensemble=0.5)
    with pytest.raises(RequestError, match="takes no strength"):
        prompts.predict(torch.randn(1, 3, 32, 32))


def test_a_training_tested_at_0_gives_the_zero_shot_results(tmp_path):
    found = task(head=ZeroShotHead(24, 3), backbone=clip(towers="image"), ensemble=0.0)
    zero, data = task(Probe()), fed(found)
    result = fit(found, data, Engine(epochs=1, device="cpu"), tmp_path)["test"]
    for batch in data.test():
        zero.evaluate(batch)
    expected = zero.results()
    assert result["confusion"] == expected["confusion"]
    assert result["loss"] == pytest.approx(expected["loss"])
    found.ensemble = 1.0
    for batch in data.test():
        found.evaluate(batch)
    assert found.results()["loss"] != result["loss"]


def test_a_run_predicts_for_files_at_any_share(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = SMALL.replace("OpenClip,", "OpenClip, towers: image,")
    (tmp_path / "small.yaml").write_text(text)
    assert cli.main(["run", "small.yaml", "--output", "run", "--debug"]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"]["accuracy"] is not None
    for index in range(3):
        Image.new("RGB", (40, 36), (80 * index, 20, 90)).save(tmp_path / f"{index}.png")
    rows = {}
    for share in ("0", "0.5", "1", None):
        option = [] if share is None else ["--ensemble", share]
        files = [f"{index}.png" for index in range(3)]
        assert cli.main(["predict", "run", *files, "-o", f"{share}.csv", *option, "--debug"]) == 0
        with (tmp_path / f"{share}.csv").open() as opened:
            rows[share] = [[float(v) for v in row[2:]] for row in list(csv.reader(opened))[1:]]
    assert rows["1"] == rows[None]
    trained = run.load(tmp_path / "run").task
    with trained.model.disabled():
        torch.testing.assert_close(trained.head.zero_shot, classifier(trained.model, NAMES))
    assert rows["0"] != rows["0.5"] != rows["1"]
    assert cli.main(["predict", "run", "0.png", "-o", "x.csv", "--ensemble", "2"]) == 2
    assert "ensemble 2.0: use a share of the tuned model" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()
