"""ClipRetrieval: open_clip's loss, results by hand, training that helps, ranked lists of a run, and refusals."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from modalities.vision_language.clip_retrieval import ClipRetrieval
from modalities.vision_language.data import GeneratedCaptions
from modalities.vision_language.heads import SimilarityHead, contrastive
from modalities.vision_language.retrieval import KS, measure
from shared import adapt, cli, run
from shared.errors import RequestError, WorkError
from shared.methods import Full, LoRA, MoSA
from shared.training import Engine, Optimiser, fit
from tests.modalities.vision_language.clips import ROLES, clip

RATE = Optimiser(learning_rate=1e-2, schedule="constant")


def task(method: Any = None, backbone: Any = None, **options: Any) -> ClipRetrieval:
    torch.manual_seed(0)
    model = adapt(backbone or clip(), method or LoRA(rank=4, roles=ROLES), head=options.pop("head", None))
    return ClipRetrieval(model, options.pop("data", pairs()), RATE, **options).eval()


def pairs(**changes: Any) -> GeneratedCaptions:
    return GeneratedCaptions(**{"count": 40, "batch_size": 16, "crop": 1.0, **changes})


def fed(found: ClipRetrieval, **changes: Any) -> GeneratedCaptions:
    data = pairs(**changes)
    data.normalise_by(found.model.backbone)
    return data


def test_the_loss_is_open_clips_where_every_caption_comes_once():
    found = task()
    batch = next(iter(fed(found).train()))
    with torch.no_grad():
        loss = found.loss(batch)
        told: Any = found.model(batch["image"], found._tokens([caption for (caption,) in batch["captions"]]))
    expected = open_clip.ClipLoss()(told.image, told.text, told.scale[0, 0])
    torch.testing.assert_close(loss, expected)


def test_images_of_one_caption_are_equally_right_for_it_and_the_scale_ends_at_a_hundred():
    found = task()
    image, captions = torch.randn(4, 3, 32, 32), [("a disc",), ("a ring",), ("a disc",), ("a cross",)]
    batch = {"image": image, "captions": captions, "name": list("abcd")}
    with torch.no_grad():
        scores = found.outputs(batch)
        told: Any = found.model(image, found._tokens(["a disc", "a ring", "a cross"]))
        torch.testing.assert_close(scores, told.scale * told.image @ told.text.T)
        torch.testing.assert_close(found.criterion(scores, batch), contrastive(scores, torch.tensor([0, 1, 0, 2])))
        backbone: Any = found.model.backbone
        backbone.logit_scale.fill_(9.0)
        torch.testing.assert_close(found.outputs(batch), 100 * told.image @ told.text.T)


def test_results_are_those_of_the_whole_split_whatever_the_batches():
    found = task()
    data = fed(found, test=0.4, batch_size=3)
    results = []
    for size in (3, 16):
        data.batch_size = size
        for batch in data.test():
            found.evaluate(batch)
        results.append(found.results())
    assert {n: v for n, v in results[0].items() if n != "loss"} == {n: v for n, v in results[1].items() if n != "loss"}
    samples = [data.test().dataset[index] for index in range(16)]
    image = found.embed_images(torch.stack([sample["image"] for sample in samples]))
    text = found.embed_texts([caption for sample in samples for caption in sample["captions"]])
    right = torch.eye(16, dtype=torch.bool).repeat_interleave(2, 1)
    expected = measure(image, text, right)
    assert {n: results[0][n] for n in expected} == pytest.approx(expected)
    recalls = [expected[f"{way}/recall@{k}"] for way in ("image_to_text", "text_to_image") for k in KS]
    assert results[0]["mean_recall"] == pytest.approx(sum(recalls) / 6)
    assert (results[0]["images"], results[0]["captions"]) == (16, 32)


def test_a_caption_of_two_images_finds_either():
    found = task()
    image = torch.randn(3, 3, 32, 32)
    batch = {"image": image, "captions": [("a disc",), ("a disc", "a ring"), ("a cross",)], "name": list("abc")}
    found.evaluate(batch)
    results = found.results()
    at, text = found.embed_images(image), found.embed_texts(["a disc", "a ring", "a cross"])
    right = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    assert results["text_to_image/recall@1"] == pytest.approx(measure(at, text, right)["text_to_image/recall@1"])
    assert results["captions"] == 4


def test_measure_by_hand():
    image, text = torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]
    found = measure(image, text, torch.eye(4, dtype=torch.bool), ks=(1, 2))
    # Two of four are swapped: for them the right one is last of all, since ties count as more similar.
    assert found["image_to_text/recall@1"] == found["text_to_image/recall@1"] == 0.5
    assert found["image_to_text/median_rank"] == np.median([4, 4, 1, 1]) == 2.5
    same = measure(torch.ones(5, 2), torch.ones(5, 2), torch.eye(5, dtype=torch.bool))
    assert same["text_to_image/median_rank"] == 5
    with pytest.raises(RequestError, match="text 1 has no image"):
        measure(torch.eye(2), torch.eye(2), torch.tensor([[True, False], [True, False]]))


@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_training_by_adapters_in_either_tower_helps(towers, tmp_path):
    found = task(backbone=clip(towers=towers))
    data = fed(found)
    before = {name: p.clone() for name, p in found.model.backbone.named_parameters()}
    batches = list(data.train())
    first = sum(found.loss(batch).item() for batch in batches)
    result = fit(found, data, Engine(epochs=8, check_every=8, device="cpu"), tmp_path)
    assert sum(found.eval().loss(batch).item() for batch in batches) < 0.9 * first
    assert 0 <= result["test"]["mean_recall"] <= 1
    assert all(torch.equal(p, before[name]) for name, p in found.model.backbone.named_parameters())


def test_two_passes_of_mosa_and_all_weights_train_too():
    for method, whole in ((MoSA(width=4), False), (Full(), True)):
        found = task(method).train()
        found.model.step(0, 0)
        found.model.loss(found, next(iter(fed(found).train()))).backward()
        trained = found.model.trainable()
        reached = {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}
        if whole:
            assert {"backbone.logit_scale", "backbone.text.token_embedding.weight"} < reached
        else:  # all of them zero at first, which keeps the gradient from the rest
            assert reached == {name for name in trained if ".up." in name}


def test_what_does_not_fit_is_refused():
    with pytest.raises(RequestError, match="leave the section head out"):
        task(head=SimilarityHead(3))
    long = pairs()
    long._source.captions[long.members["test"][0]] = ("word " * 30,)
    with pytest.raises(RequestError, match="30 tokens, ViT-B-32 takes 18; shorten it"):
        task(data=long)
    assert task(data=long, cut=True)._tokens(["word " * 30]).shape == (1, 20)
    found = task()
    found.trainer = type("Trainer", (), {"world_size": 2})()  # type: ignore[assignment]
    with pytest.raises(RequestError, match="give trainer.devices 1"):
        found.configure_optimizers()
    image = torch.full((2, 3, 32, 32), torch.nan)
    with pytest.raises(RequestError, match="samples a, b: an image holds NaN"):
        found.on_before_batch_transfer({"image": image, "captions": [("x",), ("y",)], "name": ["a", "b"]}, 0)
    with pytest.raises(WorkError, match="embeddings are not finite"):
        found.embed_images(image)


SMALL = """
task: {type: ClipRetrieval}
data: {type: GeneratedCaptions, count: 20, batch_size: 16}
backbone: {type: OpenClip, name: ViT-B-32, pretrained: random, image_size: 32,
           model_args: {embed_dim: 24, width: 32, layers: 1, head_width: 16, patch_size: 8},
           text_args: {width: 32, layers: 1, heads: 2, context_length: 16}}
method: {type: LoRA, rank: 2}
optimiser: {learning_rate: 2.0e-2}
trainer: {epochs: 1, device: cpu}
"""


def rows(path: str) -> list[list[str]]:
    with Path(path).open(newline="") as file:
        return list(csv.reader(file))


def test_a_run_ranks_images_for_texts_texts_for_images_and_images_for_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    assert cli.main(["run", "small.yaml", "--output", "run", "--debug"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["test"]["images"] == 4
    Path("in").mkdir()
    for index in range(4):
        Image.new("RGB", (40, 36), (60 * index, 20, 90)).save(f"in/{index}.png")
    Path("queries.txt").write_text("a red disc\n\na blue ring\na red disc\n")
    trained = run.load("run")
    image = trained.task.embed_images(_prepared(trained, [f"in/{i}.png" for i in range(4)]))
    cosine = image @ trained.task.embed_texts(["a red disc", "a blue ring"]).T

    assert cli.main(["predict", "run", "in", "queries.txt", "-o", "a.csv", "--top", "3", "--debug"]) == 0
    header, *found = rows("a.csv")
    assert header == ["query", "rank", "file", "similarity"]
    assert [row[:2] for row in found] == [[t, str(r)] for t in ("a red disc", "a blue ring") for r in (1, 2, 3)]
    best = cosine[:, 0].argsort(descending=True).tolist()
    assert [row[2] for row in found[:3]] == [f"in/{i}.png" for i in best[:3]]
    assert float(found[0][3]) == pytest.approx(float(cosine[:, 0].max()), abs=1e-5)

    assert cli.main(["predict", "run", "in", "queries.txt", "-o", "b.csv", "--as", "texts", "--debug"]) == 0
    header, *found = rows("b.csv")
    assert header == ["file", "rank", "text", "similarity"]
    assert len(found) == 4 * 2
    assert found[2][2] == ("a red disc", "a blue ring")[int(cosine[1].argmax())]

    assert cli.main(["predict", "run", "in", "-o", "c.csv", "--debug"]) == 0
    found = rows("c.csv")[1:]
    assert len(found) == 4 * 3  # never itself
    assert all(row[0] != row[2] for row in found)
    alike = image @ image.T - 2 * torch.eye(4)
    assert found[0][2] == f"in/{int(alike[0].argmax())}.png"

    capsys.readouterr()
    for wrong, message in (
        (["queries.txt", "-o", "d.csv"], "texts alone; name images"),
        (["in", "-o", "d.csv", "--as", "texts"], "name a .txt file with a text a line"),
        (["in", "-o", "d.csv", "--as", "maps"], "--as maps: retrieval ranks images .default. or texts"),
        (["in", "-o", "d.csv", "--top", "0"], "--top 0: use at least 1"),
        (["in/0.png", "-o", "d.csv"], "one image and no text to compare it with"),
        (["in", "-o", "a.csv"], "a.csv exists already; --overwrite replaces it"),
        (["in", "-o", "d.csv", "--window", "9"], "retrieval has no --window"),
    ):
        assert cli.main(["predict", "run", *wrong]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not Path("d.csv").exists()


def _prepared(trained: Any, files: list[str]) -> torch.Tensor:
    from modalities.images.data import Preparation

    preparation = Preparation.of(trained.described)
    return torch.stack([preparation.normalised(preparation.square(preparation.read(Path(file)))) for file in files])
