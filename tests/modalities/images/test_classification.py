"""Classification: metrics against hand-counted numbers and torchmetrics, refusals, a whole run, and labels of files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_recall,
)

from modalities.images.backbones import OpenClipTower, TimmViT
from modalities.images.classification import Classification, framed, measure
from modalities.images.data import GeneratedImages
from modalities.images.heads import LinearHead
from shared import cli, recipe, run
from shared.adapted import adapt
from shared.backbone import Features
from shared.errors import RequestError, WorkError
from shared.methods import LoRA, Probe
from shared.sites import describe
from shared.training import Engine, Optimiser, fit

SMALL = """
task: {type: Classification}
data: {type: GeneratedImages, count: 12, classes: [disc, stripes, checks], side: 32, size: 32, crop: 1, batch_size: 8}
backbone: {type: TimmViT, name: vit_small_patch16_224, weights: random, image_size: 32, patch_size: 8,
           model_args: {depth: 2, embed_dim: 48, num_heads: 3}}
method: {type: LoRA, rank: 2}
head: {type: LinearHead, norm: layer}
optimiser: {learning_rate: 2.0e-3}
trainer: {epochs: 2, device: cpu}
"""


class Waves(nn.Module):
    """A frozen backbone of random filters whose summary says how strong their answers are."""

    channels = (24,)
    statistics = ((127.5,) * 3, (64.0,) * 3)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 7, stride=2)

    def forward(self, image: torch.Tensor) -> Features:
        found = self.first(image)
        return Features((found,), found.abs().mean((2, 3)))


def images(**changes) -> GeneratedImages:
    return GeneratedImages(**{"count": 20, "classes": ("disc", "stripes"), "side": 32, "crop": 1.0, **changes})


def task(data: GeneratedImages | None = None, head: nn.Module | None = None, method=None) -> Classification:
    torch.manual_seed(0)
    backbone = Waves()
    method = method or LoRA(rank=2, roles=("conv",))
    model = adapt(backbone, method, head=head or LinearHead(24, 2, norm="batch"), sites=describe(backbone))
    return Classification(model, data or images(), Optimiser(learning_rate=2e-2))


# -- numbers -------------------------------------------------------------------------------------------------------


def test_measures_of_a_hand_counted_matrix():
    found = measure(torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 4]]), ("a", "b", "c", "d"))
    assert found["accuracy"] == pytest.approx(13 / 20)
    assert [found[f"recall/{c}"] for c in "abd"] == pytest.approx([6 / 8, 3 / 4, 4 / 8])
    assert found["recall/c"] is None
    assert [found[f"support/{c}"] for c in "abcd"] == [8, 4, 0, 8]
    assert found["macro_f1"] == pytest.approx((12 / 15 + 6 / 13 + 8 / 12) / 3)
    assert found["confusion"][0] == [6, 2, 0, 0]
    assert json.loads(json.dumps(found)) == found


def test_measures_of_nothing():
    found = measure(torch.zeros(2, 2, dtype=torch.long), ("a", "b"))
    assert (found["accuracy"], found["macro_f1"], found["recall/a"]) == (None, None, None)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_measures_are_those_of_torchmetrics(pairs):
    truth, said = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = measure(multiclass_confusion_matrix(said, truth, 4), "abcd")
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(said, truth, 4, average="micro").item(), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(multiclass_f1_score(said, truth, 4).item(), abs=1e-6)
    for name, recall in zip("abcd", multiclass_recall(said, truth, 4, average=None).tolist(), strict=True):
        assert (found[f"recall/{name}"] or 0) == pytest.approx(recall, abs=1e-6)


def test_results_are_those_of_all_batches_and_start_anew():
    one = task().eval()
    batch = next(iter(images(normalisation="measured").test()))
    with torch.no_grad():
        for part in (slice(0, 3), slice(3, None)):
            one.evaluate({key: value[part] for key, value in batch.items()})
        said = one.outputs(batch).argmax(1)
        found = one.results()
        expected = one.criterion(one.outputs(batch), batch)
    assert found["accuracy"] == pytest.approx((said == batch["label"]).float().mean().item())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert sum(map(sum, found["confusion"])) == len(said)
    with torch.no_grad():
        one.evaluate(batch)
    assert sum(map(sum, one.results()["confusion"])) == len(said)


def test_it_learns_and_keeps_its_best(tmp_path):
    data = images(count=40, batch_size=8)
    one = task(data)
    before = fit_accuracy(one, data)
    found = fit(one, data, Engine(epochs=8, device="cpu"), tmp_path)
    assert found["best"]["monitor"] == "validation/accuracy"
    assert found["test"]["accuracy"] >= 0.9 > before


def fit_accuracy(one: Classification, data: GeneratedImages) -> float:
    said = [(one.predict(b["image"]).argmax(1) == b["label"]).float() for b in data.test()]
    return torch.cat(said).mean().item()


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(RequestError, match="the head has 3 classes, the data 2"):
        task(head=LinearHead(24, 3))
    with pytest.raises(RequestError, match="needs a head, such as LinearHead"):
        task(head=nn.Flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2, 4, 8, 8)}, "do not fit 3 bands"),
        ({"label": torch.tensor([0])}, "do not fit 3 bands and each other"),
        ({"label": torch.tensor([0, 2])}, "samples a, b: label 2; this data set has 0 to 1"),
        ({"label": torch.tensor([-1, 0])}, "label -1"),
        ({"image": torch.full((2, 3, 8, 8), torch.nan)}, "holds NaN"),
        ({"image": torch.zeros(2, 3, 8, 8).double()}, "images are torch.float64"),
    ],
)
def test_a_bad_batch_is_refused(change, message):
    batch = {"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 1]), "name": ["a", "b"]}
    assert task().on_before_batch_transfer(batch, 0) is batch
    with pytest.raises(RequestError, match=message):
        task().on_before_batch_transfer({**batch, **change}, 0)


def test_predicting_wants_images_of_the_right_bands_and_finite_scores():
    one = task()
    with pytest.raises(RequestError, match=r"\(B, 3, H, W\)"):
        one.predict(torch.zeros(2, 1, 8, 8))
    with pytest.raises(WorkError, match="not finite"):
        one.predict(torch.full((1, 3, 8, 8), torch.nan))
    assert one.training


# -- backbones -----------------------------------------------------------------------------------------------------


def test_backbones_state_the_statistics_of_their_weights():
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    dino = TimmViT(3, name="vit_small_patch14_dinov2", weights="random", image_size=28, model_args=small)
    np.testing.assert_allclose(dino.statistics[0], [123.675, 116.28, 103.53])
    np.testing.assert_allclose(dino.statistics[1], [58.395, 57.12, 57.375])
    assert (
        TimmViT(4, name="vit_small_patch14_dinov2", weights="random", image_size=28, model_args=small).statistics
        is None
    )
    clip = OpenClipTower(3, name="ViT-B-32", pretrained="random", image_size=32, model_args={"layers": 1, "width": 64})
    np.testing.assert_allclose(clip.statistics[0], [122.771, 116.746, 104.094], atol=1e-3)


def test_the_head_gets_the_width_of_a_clip_summary(tmp_path):
    clip = (
        "{type: OpenClipTower, name: ViT-B-32, pretrained: random, image_size: 32, model_args: {layers: 1, width: 64}}"
    )
    text = SMALL.replace(SMALL[SMALL.index("backbone") : SMALL.index("method")], f"backbone: {clip}\n")
    (tmp_path / "clip.yaml").write_text(text)
    chosen = recipe.load(str(tmp_path / "clip.yaml"))
    model = run.build(chosen, chosen.outline())
    assert model.head.classify.weight.shape == (3, 512)


def test_aerial_vit_may_be_named(tmp_path):
    (tmp_path / "a.yaml").write_text(SMALL)
    chosen = recipe.load(str(tmp_path / "a.yaml"), ["backbone={type: AerialViT}", "data.normalisation=backbone"])
    data = chosen.build("data")
    Classification(run.build(chosen, data), data, Optimiser())
    assert data.describe()["normalisation"]["mean"] == [94.5, 97.23, 86.98]


# -- a whole run, and labels of files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(run directory, folder of images)"""
    top = tmp_path_factory.mktemp("classification")
    (top / "small.yaml").write_text(SMALL)
    assert cli.main(["run", str(top / "small.yaml"), "--output", str(top / "run"), "--debug"]) == 0
    data = GeneratedImages(count=6, classes=("disc", "stripes", "checks"), side=40, seed=5)
    for index, name in enumerate(data._source.names):
        (top / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data._source.read(index).transpose(1, 2, 0)).save(top / "new" / f"{name}.png")
    return top / "run", top / "new"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_shows_recall_confusion_and_pictures(trained):
    text = (trained[0] / "report.html").read_text()
    assert "recall by class" in text
    assert "Confusion of classes (images)" in text
    assert "macro-F1" in text
    assert "2 images" in text
    assert " px<" not in text
    assert text.count("<img") == 6  # as many as test
    found = json.loads((trained[0] / "metrics.json").read_text())
    wrong = 6 - sum(found["test"]["confusion"][c][c] for c in range(3))
    assert text.count("said to be") == 2 * wrong  # caption and alternative text


def test_a_frame_marks_a_picture():
    found = framed(np.zeros((32, 32, 3), np.uint8), "#0a0b0c")
    assert found.shape == (36, 36, 3)
    assert found[0, 0].tolist() == [10, 11, 12]
    assert not found[2:-2, 2:-2].any()


def test_labels_of_a_folder(trained, tmp_path, capsys):
    folder, new = trained
    assert cli.main(["predict", str(folder), str(new), "-o", str(tmp_path / "out")]) == 0
    assert "predictions.csv: 18 images" in capsys.readouterr().out
    found = rows(tmp_path / "out" / "predictions.csv")
    assert [row["file"] for row in found] == [p.as_posix() for p in sorted(new.rglob("*.png"))]
    one, described, _ = run.load(folder)
    scale = described["normalisation"]
    for row in found[::5]:
        stored = torch.from_numpy(np.asarray(Image.open(row["file"])).transpose(2, 0, 1).copy())
        pixels = nn.functional.interpolate(stored[None].float(), (32, 32), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(scale[key])[:, None, None] for key in ("mean", "std"))
        expected = one.predict((pixels.round() - mean) / std)[0]
        said = [float(row[f"p/{name}"]) for name in one.classes]
        np.testing.assert_allclose(said, expected, atol=0.01)
        assert row["label"] == one.classes[int(np.argmax(said))]
        assert sum(said) == pytest.approx(1, abs=1e-5)


def test_a_bad_image_among_others_is_named_and_the_others_are_written(trained, tmp_path, capsys):
    folder, new = trained
    (tmp_path / "bad.png").write_bytes(b"")
    arguments = ["predict", str(folder), str(tmp_path / "bad.png")]
    assert cli.main([*arguments, "-o", str(tmp_path / "one.csv")]) == 2
    assert not (tmp_path / "one.csv").exists()
    assert cli.main([*arguments, str(new / "disc"), "-o", str(tmp_path / "all.csv")]) == 1
    error = capsys.readouterr().err
    assert "bad.png: not a readable image: the file is empty" in error
    assert "1 of 7 images failed" in error
    assert len(rows(tmp_path / "all.csv")) == 6


def test_what_predict_refuses(trained, tmp_path, capsys):
    folder, new = trained
    (tmp_path / "none").mkdir()
    (tmp_path / "old.csv").write_text("kept")
    for arguments, message in (
        ([str(new), "-o", str(tmp_path / "old.csv")], "exists already; --overwrite replaces it"),
        ([str(tmp_path / "none"), "-o", str(tmp_path / "a.csv")], "none: holds no image"),
        ([str(new), "-o", str(tmp_path / "a.csv"), "--window", "8"], "classification has no --window"),
        ([str(tmp_path / "x.png"), "-o", str(tmp_path / "a.csv")], "x.png: no such file"),
    ):
        assert cli.main(["predict", str(folder), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "old.csv").read_text() == "kept"
    assert not (tmp_path / "a.csv").exists()
    assert cli.main(["predict", str(folder), str(new), "-o", str(tmp_path / "old.csv"), "--overwrite"]) == 0


def test_the_probe_trains_the_head_alone(tmp_path):
    one = task(method=Probe())
    assert {name.partition(".")[0] for name in one.model.trainable()} == {"head"}
