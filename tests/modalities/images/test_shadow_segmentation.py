"""Shadow segmentation: what the counts say, the answer at an image's own size, and a run that gets better."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modalities.images.adapter_shadow import AdapterShadow
from modalities.images.backbones import SAM
from modalities.images.data import GeneratedShadows
from modalities.images.shadow_segmentation import ShadowSegmentation, dotted, measure
from shared import LoRA, RequestError, WorkError, adapt
from shared.training.engine import Engine, fit
from shared.training.optimiser import Optimiser

SMALL = {"grid": 4, "subsample": 2, "detector": "test_efficientnet", "detector_weights": "random"}


def shadows(**more) -> GeneratedShadows:
    return GeneratedShadows(**{"count": 8, "side": 48, "size": 48, "batch_size": 2, "validation": 0.25, **more})


def task(data=None, *, loss: str = "focal", method=None) -> ShadowSegmentation:
    model = adapt(SAM(3, size="tiny", weights="random"), method or AdapterShadow(**SMALL))
    return ShadowSegmentation(model, data or shadows(), Optimiser(learning_rate=3e-3, weight_decay=0.0), loss=loss)


def test_balanced_error_by_hand() -> None:
    found = measure(torch.tensor([30, 10, 90, 20, 50]))  # tp, fp, tn, fn
    assert found["shadow_error"] == pytest.approx(40.0)
    assert found["lit_error"] == pytest.approx(10.0)
    assert found["balanced_error"] == pytest.approx(25.0)
    assert found["iou"] == pytest.approx(0.5)
    assert measure(torch.tensor([0, 10, 90, 0, 0]))["balanced_error"] is None


def test_pixels_of_all_images_are_pooled_at_their_own_sizes() -> None:
    model = task().eval()
    logits = iter([torch.full((1, 1, 4, 4), 5.0), torch.full((1, 1, 4, 4), -5.0)])

    def says(_):
        answer = next(logits)
        return SimpleNamespace(logits=answer, coarse=-answer)

    model.model.forward = says
    for size in ((6, 8), (10, 4)):
        mask = torch.zeros(1, *size, dtype=torch.long)
        mask[:, 0] = 1
        model.evaluate({"image": torch.zeros(1, 3, 16, 16), "mask": mask, "name": ["x"]})
    found = model.results()
    # The first is all shadow: 8 right, 40 wrong. The second all light: 36 right, 4 missed.
    assert found["shadow_error"] == pytest.approx(100 * 4 / 12)
    assert found["lit_error"] == pytest.approx(100 * 40 / 76)
    assert found["iou"] == pytest.approx(8 / 52)
    assert found["coarse_shadow_error"] == pytest.approx(100 * 8 / 12)


def test_a_prediction_has_the_size_asked_for() -> None:
    model = task()
    found = model.predict(torch.randn(2, 3, 48, 64), (30, 40))
    assert found.mask.shape == found.coarse_mask.shape == (2, 30, 40)
    assert found.mask.dtype == torch.bool
    assert found.points.shape == (2, 16, 2)
    assert float(found.points[..., 0].max()) > 48 - 12  # x runs along the width
    assert model.training
    with pytest.raises(RequestError, match=r"the model takes \(B, 3, H, W\)"):
        model.predict(torch.randn(2, 4, 48, 48))


@pytest.mark.parametrize("loss", ["focal", "wce"])
def test_a_short_training_lowers_the_loss(loss, tmp_path) -> None:
    data = shadows(crop=1.0, flip=False, count=6)
    model = task(data, loss=loss)
    batch = next(iter(data.train()))

    def now() -> float:
        with torch.no_grad():
            return float(model.train().loss(batch))

    before = now()
    found = fit(model, data, Engine(epochs=8, check_every=8, device="cpu"), tmp_path)
    assert now() < 0.97 * before
    assert found["test"]["balanced_error"] is not None
    assert model.pictures(data, 1).rows[0][1]["prediction"].shape == (48, 48, 3)


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(RequestError, match="needs the method AdapterShadow"):
        task(method=LoRA(rank=2))
    with pytest.raises(RequestError, match="shadow segmentation has two, light and shadow"):
        task(SimpleNamespace(classes=("a", "b", "c")))
    model, good = task(), {"image": torch.zeros(1, 3, 48, 48), "mask": torch.zeros(1, 48, 48).long(), "name": ["n"]}
    cases = {
        "samples n: images .* three bands": {"image": torch.zeros(1, 4, 48, 48)},
        "samples n: an image holds NaN": {"image": torch.full((1, 3, 48, 48), float("nan"))},
        "samples n: mask value 7; a shadow is 1": {"mask": torch.full((1, 48, 48), 7)},
    }
    for message, change in cases.items():
        with pytest.raises(RequestError, match=message):
            model.on_before_batch_transfer(good | change, 0)
    assert model.on_before_batch_transfer(good, 0) is good
    model.model.forward = lambda _: SimpleNamespace(
        logits=torch.full((1, 1, 2, 2), float("nan")), coarse=torch.zeros(1)
    )
    with pytest.raises(WorkError, match="not finite on samples n"):
        model.evaluate(good)


def test_points_are_drawn_where_they_are() -> None:
    import numpy as np

    picture = dotted(np.zeros((32, 40, 3), np.uint8), torch.tensor([[39.0, 0.0], [10.0, 20.0]]), torch.tensor([1.0, 0]))
    assert picture[0, 39].tolist() == [230, 159, 0]
    assert picture[20, 10].tolist() == [0, 114, 178]
    assert picture.any(-1).sum() == 4 + 9
