"""Segmentation: metrics against hand-counted numbers and torchmetrics, refusals, and a whole run on a tiny problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_jaccard_index,
)

from modalities.remote_sensing.heads import LightDecoder, LinearDecoder, Mask2FormerHead
from modalities.remote_sensing.segmentation import Segmentation, measure
from shared.adapted import adapt
from shared.backbone import Features
from shared.errors import RequestError, WorkError
from shared.methods import LoRA, Probe
from shared.sites import describe
from shared.training import Engine, Optimiser, fit


class Data:
    """Images whose brightest band is the class of a pixel; blocks of 8 pixels; one corner without a label."""

    bands, classes, ignore_index = 3, ("water", "field", "town"), 255

    def __init__(self, count: int = 8):
        generator = torch.Generator().manual_seed(4)
        blocks = torch.randint(0, 3, (count, 4, 4), generator=generator)
        masks = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        images = nn.functional.one_hot(masks, 3).movedim(-1, 1) + 0.2 * torch.randn(
            count, 3, 32, 32, generator=generator
        )
        masks[:, :6, :6] = 255
        self.samples = [
            {"image": image, "mask": mask, "name": f"tile{n}"}
            for n, (image, mask) in enumerate(zip(images, masks, strict=True))
        ]

    def train(self) -> DataLoader:
        return DataLoader(self.samples, 4, shuffle=True)  # type: ignore[arg-type]

    def validation(self) -> DataLoader:
        return DataLoader(self.samples, 4)  # type: ignore[arg-type]

    test = validation

    def displays(self, image: Tensor) -> Any:
        return {"true colour": (image.clamp(0, 1) * 255).byte().movedim(0, -1).numpy()}


class Patches(nn.Module):
    """A frozen backbone of stride 4 with two maps."""

    channels = (12, 12)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 4, stride=4), nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, image: Tensor) -> Features:
        first = self.first(image).tanh()
        second = self.second(first).tanh()
        return Features((first, second), second.mean((2, 3)))


def task(head: Any = None, method: Any = None, **settings: Any) -> Segmentation:
    torch.manual_seed(0)
    backbone = Patches()
    method = method or LoRA(rank=2, roles=("conv",))
    head = head or LightDecoder(backbone.channels, 3, width=16)
    model = adapt(backbone, method, head=head, sites=describe(backbone))
    return Segmentation(model, Data(), Optimiser(**{"learning_rate": 1e-2, **settings}))


def test_exposure_changes_training_images_and_nothing_else() -> None:
    batch = next(iter(Data().validation()))
    plain, exposed = task(), task()
    exposed.exposure = 1.0
    assert plain.loss(batch).item() == plain.loss(batch).item()
    assert exposed.loss(batch).item() != exposed.loss(batch).item()
    for one in (plain, exposed):
        one.eval()
        one.evaluate(batch)
    assert plain.results() == exposed.results()
    model = plain.model
    with pytest.raises(RequestError, match=r"task.exposure -1.0: use 0"):
        Segmentation(model, Data(), Optimiser(), exposure=-1.0)


def test_splits_are_pooled_by_pixels_and_not_averaged() -> None:
    counts = torch.tensor([[[90, 0], [10, 0]], [[0, 0], [5, 5]]])
    splits = [{"loss": loss, **measure(c, ("a", "b"))} for loss, c in zip((1.0, 2.0), counts, strict=True)]
    pooled = Segmentation.pooled(splits)
    assert pooled == {"loss": 1.5, **measure(counts.sum(0), ("a", "b"))}
    assert pooled["miou"] == pytest.approx((90 / 105 + 5 / 20) / 2)
    assert pooled["miou"] != pytest.approx((splits[0]["miou"] + splits[1]["miou"]) / 2)


# -- numbers -------------------------------------------------------------------------------------------------------


def test_measures_of_a_hand_counted_matrix() -> None:
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 4, 0, 4]])
    found = measure(confusion, ("a", "b", "c", "d"))
    assert found["iou/a"] == pytest.approx(6 / 9)
    assert found["iou/b"] == pytest.approx(3 / 10)
    assert found["iou/c"] is None  # neither there nor said to be
    assert found["iou/d"] == pytest.approx(4 / 8)
    assert found["miou"] == pytest.approx((6 / 9 + 3 / 10 + 4 / 8) / 3)
    assert found["oa"] == pytest.approx(13 / 20)
    assert found["f1"] == pytest.approx((12 / 15 + 6 / 13 + 8 / 12) / 3)
    assert [found[f"support/{c}"] for c in "abcd"] == [8, 4, 0, 8]
    assert found["confusion"] == confusion.tolist()
    json.dumps(found, allow_nan=False)


def test_a_class_only_predicted_counts_as_wrong() -> None:
    found = measure(torch.tensor([[3, 1], [0, 0]]), ("a", "b"))
    assert found["iou/b"] == 0
    assert found["miou"] == pytest.approx(3 / 8)


def test_nothing_counted_is_undefined_and_not_zero() -> None:
    found = measure(torch.zeros(2, 2, dtype=torch.int64), ("a", "b"))
    assert (found["miou"], found["oa"], found["f1"], found["iou/a"]) == (None,) * 4


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_measures_agree_with_torchmetrics(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    said, truth = torch.randint(0, classes, (2, 2, 6, 6), generator=generator)
    truth[torch.rand(2, 6, 6, generator=generator) < 0.2] = 255
    truth[..., 0, 0] = 0
    settings_ = {"num_classes": classes, "ignore_index": 255}
    names = [str(n) for n in range(classes)]
    found = measure(multiclass_confusion_matrix(said, truth, **settings_), names)
    assert found["miou"] == pytest.approx(multiclass_jaccard_index(said, truth, **settings_).item(), abs=1e-6)
    assert found["oa"] == pytest.approx(multiclass_accuracy(said, truth, average="micro", **settings_).item(), abs=1e-6)
    assert found["f1"] == pytest.approx(multiclass_f1_score(said, truth, average="macro", **settings_).item(), abs=1e-6)


def test_evaluation_counts_every_labelled_pixel_of_every_batch_once() -> None:
    segmentation, data = task().eval(), Data()
    truth, said = [], []
    with torch.no_grad():
        for batch in data.test():
            segmentation.evaluate(batch)
            truth.append(batch["mask"])
            said.append(segmentation.predict(batch["image"]))
    found = segmentation.results()
    truth, said = torch.cat(truth), torch.cat(said)
    for row in range(3):
        for column in range(3):
            assert found["confusion"][row][column] == ((truth == row) & (said == column)).sum()
    assert sum(found[f"support/{c}"] for c in data.classes) == 8 * (32 * 32 - 36)
    losses = [segmentation.loss(batch).item() for batch in data.test()]
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    batch = next(iter(data.test()))
    segmentation.evaluate(batch)
    assert sum(map(sum, segmentation.results()["confusion"])) == 4 * (32 * 32 - 36), "results start the counts anew"


# -- prediction ----------------------------------------------------------------------------------------------------


def test_predict_is_the_best_class_in_eval_mode() -> None:
    segmentation = task(LinearDecoder((12, 12), 3)).train()
    image = torch.randn(2, 3, 20, 28)
    classes = segmentation.predict(image)
    assert classes.shape == (2, 20, 28)
    assert classes.dtype == torch.int64
    assert segmentation.training
    assert segmentation.head.training
    assert not segmentation.model.backbone.training
    segmentation.eval()
    assert torch.equal(classes, segmentation.model(image).argmax(1))
    scores = segmentation.scores(image)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 20, 28))


def test_predict_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(RequestError, match=r"\(1, 4, 8, 8\): the model takes \(B, 3, H, W\)"):
        task().predict(torch.zeros(1, 4, 8, 8))
    with pytest.raises(WorkError, match="not finite"):
        task().predict(torch.full((1, 3, 8, 8), float("nan")))


def test_pictures_show_image_truth_prediction_and_errors(monkeypatch) -> None:
    from shared.report.plots import RIGHT, WRONG

    segmentation, data = task(), Data()
    found = segmentation.pictures(data, count=3)
    names = [name.partition(":")[0] for name, _ in found.rows]
    assert names == ["tile0", "tile4", "tile7"]
    assert found.legends == {
        "Classes": {**dict(zip(data.classes, found.legends["Classes"].values(), strict=False)), "ignored": "#000000"},
        "Errors": {"right": RIGHT, "wrong": WRONG, "ignored": "#000000"},
    }
    caption, shown = found.rows[1]
    assert {label: array.shape for label, array in shown.items()} == dict.fromkeys(
        ("true colour", "truth", "prediction", "errors"), (32, 32, 3)
    )
    truth = data.samples[4]["mask"].numpy()
    ignored = truth == segmentation.ignore_index
    assert ignored[:6, :6].all()
    said = segmentation.predict(data.samples[4]["image"][None])[0].numpy()
    assert not shown["truth"][ignored].any()
    colours = list(found.legends["Classes"].values())
    for label, mask, palette in (
        ("truth", truth, colours), ("prediction", said, colours), ("errors", truth != said, [RIGHT, WRONG])
    ):  # fmt: skip
        painted = ["#" + bytes(pixel).hex() for pixel in shown[label][~ignored]]
        assert painted == [palette[int(value)] for value in mask[~ignored]]
    right = (truth == said)[~ignored].mean()
    assert caption == f"tile4: {right:.1%} of its pixels are right"
    monkeypatch.setattr(Data, "displays", lambda self, image: dict.fromkeys(("one", "other"), image), raising=False)
    rows = segmentation.pictures(data, count=1).rows
    assert [list(row) for _, row in rows] == [["one", "other"], ["truth", "prediction", "errors"]]


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["light", "linear"])
def test_it_learns(tmp_path: Path, head: str) -> None:
    segmentation = task() if head == "light" else task(LinearDecoder((12, 12), 3), Probe())
    untrained = _miou(segmentation)
    found = fit(segmentation, Data(), Engine(epochs=25), tmp_path)
    assert untrained < 0.4
    assert found["test"]["miou"] > 0.85
    assert found["best"]["value"] == pytest.approx(found["test"]["miou"], rel=1e-5)
    assert found["test"]["support/town"] > 0
    json.dumps(found, allow_nan=False)
    assert _miou(segmentation) == pytest.approx(found["test"]["miou"])


def _miou(segmentation: Segmentation) -> float:
    with torch.no_grad():
        segmentation.eval()
        for batch in Data().test():
            segmentation.evaluate(batch)
    return segmentation.results()["miou"]


def test_resumed_is_as_if_never_interrupted(tmp_path: Path) -> None:
    """With Mask2Former, whose loss is at random points, and with buffers, accumulation and clipping."""

    def make() -> Segmentation:
        torch.manual_seed(0)
        small = {"queries": 4, "decoder_layers": 1, "encoder_layers": 1, "width": 32, "feedforward": 32, "points": 64}
        backbone = Patches()
        head = Mask2FormerHead((12,), 3, **small, encoder_feedforward=32)
        plain, backbone.forward = backbone.forward, lambda x: Features(plain(x).maps[1:], plain(x).summary)  # type: ignore[method-assign]
        model = adapt(backbone, LoRA(rank=2, roles=("conv",), dropout=0.2), head=head, sites=describe(backbone))
        return Segmentation(model, Data(), Optimiser(warmup=1))

    engine = Engine(epochs=3, clip=1.0)
    whole = fit(make(), Data(), engine, tmp_path / "whole")
    broken = make()
    plain = broken.loss
    broken.loss = lambda batch: plain(batch) if broken.global_step < 5 else 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        fit(broken, Data(), engine, tmp_path / "parts")
    parts = fit(make(), Data(), engine, tmp_path / "parts", resume=True)
    ours, theirs = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("parts", "whole"))
    assert all(torch.equal(ours["state_dict"][n], t) for n, t in theirs["state_dict"].items())
    assert parts["best"] == whole["best"]
    assert parts["test"]["confusion"] == whole["test"]["confusion"]


def test_a_checkpoint_holds_no_frozen_weight(tmp_path: Path) -> None:
    segmentation = task(LinearDecoder((12, 12), 3), Probe())
    segmentation.model.backbone.register_parameter("ballast", nn.Parameter(torch.zeros(1_000_000), requires_grad=False))
    fit(segmentation, Data(), Engine(epochs=1), tmp_path)
    assert (tmp_path / "checkpoints/last.ckpt").stat().st_size < 40_000
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert "head.norm.running_mean" in state
    assert all(name.startswith("head.") for name in state)


def test_everything_ignored_in_training_leaves_a_finite_run(tmp_path: Path) -> None:
    data = Data()
    for sample in data.samples[:4]:
        sample["mask"] = torch.full((32, 32), 255)
    found = fit(task(), data, Engine(epochs=2), tmp_path)
    assert 0 <= found["test"]["miou"] <= 1


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(4, 32, 32)}, r"samples .*images \(\d, 4, 32, 32\) and masks .* do not fit 3 bands"),
        ({"mask": torch.zeros(16, 16, dtype=torch.int64)}, r"masks \(\d, 16, 16\) do not fit"),
        ({"mask": torch.full((32, 32), 3)}, r"samples tile\d.*: mask value 3; this data set has 0 to 2 and 255"),
        ({"image": torch.zeros(3, 32, 32).double()}, "images are torch.float64, the model computes in torch.float32"),
        ({"image": torch.full((3, 32, 32), float("inf"))}, "samples tile.*holds NaN or infinity"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    data = Data()
    for sample in data.samples:
        sample |= change
    with pytest.raises(RequestError, match=message):
        fit(task(), data, Engine(epochs=1), tmp_path)
    assert not (tmp_path / "checkpoints/last.ckpt").exists()


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="segmentation needs a head"):
        task(nn.Identity())
    with pytest.raises(RequestError, match="the head has 4 classes, the data 3"):
        task(LinearDecoder((12, 12), 4))
    with pytest.raises(RequestError, match="head.ignore_index 0: the data use 255"):
        task(LinearDecoder((12, 12), 3, ignore_index=0))
