"""Images of any size as Segment Anything was trained to see them: views, prompts in them, all objects; by numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modalities.images import seeing
from modalities.images.asking import Asked
from modalities.images.backbones import SAM, Prompts
from modalities.images.prompting import rough
from modalities.images.sam_tools import mask_generator
from modalities.images.seeing import Seer, View, asked_for, everything, views
from shared import LoRA, WorkError, adapt

EVERYTHING = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
CPU = torch.device("cpu")


def tuned() -> Any:
    torch.manual_seed(0)
    model = adapt(SAM(3, size="tiny", weights="random"), LoRA(rank=2))
    for parameter in model.bank.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def seer(side: int = 48, stretched: bool = False, model: Any = None) -> Seer:
    return Seer(model or tuned(), side, stretched, True, CPU)


def image(height: int = 48, width: int = 48) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(3, height, width)).astype(np.float32)


def point(x: float, y: float, label: int = 1) -> Asked:
    return Asked("p", np.array([[x, y]]), np.array([label]))


def whole(found: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask of an object in its image."""
    mask = np.zeros(size, bool)
    mask[found.at[0] : found.at[0] + found.mask.shape[0], found.at[1] : found.at[1] + found.mask.shape[1]] = found.mask
    return mask


def said(model: Any, pixels: np.ndarray, prompts: Prompts, multimask: bool = False) -> tuple[np.ndarray, float]:
    """What the model itself says of an image that it takes as it is."""
    with torch.no_grad():
        masks = model(torch.from_numpy(pixels)[None], prompts, multimask)
    choice = int(masks.iou[0, 0].argmax())
    logits = torch.nn.functional.interpolate(masks.logits[:, :1, choice], pixels.shape[1:], mode="bilinear")
    return (logits[0, 0] > 0).numpy(), float(masks.iou[0, 0, choice])


def test_views_cover_the_image_and_overlap_by_half() -> None:
    assert views((40, 64), 64) == [View(0, 0, 40, 64)]
    first, *squares = views((100, 150), 64)
    assert first == (0, 0, 100, 150)
    assert sorted({view.top for view in squares}) == [0, 18, 36]
    assert sorted({view.left for view in squares}) == [0, 29, 57, 86]
    assert all(view[2:] == (64, 64) for view in squares)
    _, *wide = views((30, 100), 64)
    assert [(view.top, view.left, view.height, view.width) for view in wide] == [
        (0, 0, 30, 64), (0, 18, 30, 64), (0, 36, 30, 64)
    ]  # fmt: skip


def test_an_image_of_the_trained_size_is_answered_as_the_model_does() -> None:
    model, pixels = tuned(), image()
    cases = [
        (point(10, 20), Prompts(torch.tensor([[[[10.0, 20]]]]), torch.ones(1, 1, 1)), True),
        (Asked("b", np.zeros((0, 2)), np.zeros(0, int), (4, 6, 30, 20)),
         Prompts(boxes=torch.tensor([[[4.0, 6, 30, 20]]])), False),
        (Asked("pb", np.array([[9, 9], [40, 3]]), np.array([1, 0]), (4, 6, 30, 20)),
         Prompts(torch.tensor([[[[9.0, 9], [40, 3]]]]), torch.tensor([[[1, 0]]]), torch.tensor([[[4.0, 6, 30, 20]]])),
         False),
    ]  # fmt: skip
    for asked, prompts, multimask in cases:
        (found,) = asked_for(seer(model=model), pixels, np.ones((48, 48), bool), views((48, 48), 48), [asked])
        mask, iou = said(model, pixels, prompts, multimask)
        assert mask.any()
        assert np.array_equal(whole(found, (48, 48)), mask)
        assert found.facts == {"name": asked.name, "predicted_iou": pytest.approx(iou, abs=1e-6)}


def test_a_rough_mask_asks_as_in_training() -> None:
    model, pixels, mask = tuned(), image(), np.zeros((48, 48), bool)
    mask[10:30, 8:40] = True
    asked = Asked("m", np.zeros((0, 2)), np.zeros(0, int), None, mask)
    (found,) = asked_for(seer(model=model), pixels, np.ones((48, 48), bool), views((48, 48), 48), [asked])
    prompts = Prompts(masks=rough(torch.from_numpy(mask)[None, None], 2, 1))
    assert np.array_equal(whole(found, (48, 48)), said(model, pixels, prompts)[0])


def test_a_prompt_in_a_larger_image_is_seen_closely() -> None:
    """In the square whose edges it keeps farthest from, at the image's own resolution."""
    model, pixels = tuned(), image(96, 120)
    parts = views((96, 120), 48)
    asked = point(70, 50)
    (found,) = asked_for(seer(model=model), pixels, np.ones((96, 120), bool), parts, [asked])
    chosen = View(48 // 2, 48, 48, 48)
    assert chosen in parts
    inner = Prompts(torch.tensor([[[[70.0 - 48, 50 - 24]]]]), torch.ones(1, 1, 1))
    expected = np.zeros((96, 120), bool)
    expected[24:72, 48:96] = said(model, np.ascontiguousarray(chosen.cut(pixels)), inner, True)[0]
    assert np.array_equal(whole(found, (96, 120)), expected)


def test_what_no_square_holds_is_seen_in_the_whole_image(monkeypatch) -> None:
    shapes, plain = [], Seer.look
    monkeypatch.setattr(Seer, "look", lambda self, given: (shapes.append(given.shape[1:]), plain(self, given))[1])
    box = Asked("b", np.zeros((0, 2)), np.zeros(0, int), (2, 2, 90, 60))
    asked = [point(20, 20), box, point(21, 22)]
    found = asked_for(seer(), image(64, 96), np.ones((64, 96), bool), views((64, 96), 48), asked)
    assert sorted(shapes) == [(48, 48), (64, 96)]  # one square for both points
    assert [one.facts["name"] for one in found] == ["p", "b", "p"]  # in their order


def test_small_and_oblong_images_fill_a_square_with_nothing() -> None:
    """As tiles that reach beyond their raster do in training."""
    model, pixels = tuned(), image(30, 44)
    (found,) = asked_for(seer(model=model), pixels, np.ones((30, 44), bool), views((30, 44), 48), [point(10, 20)])
    padded = np.pad(pixels, ((0, 0), (0, 18), (0, 4)))
    prompts = Prompts(torch.tensor([[[[10.0, 20]]]]), torch.ones(1, 1, 1))
    assert np.array_equal(whole(found, (30, 44)), said(model, padded, prompts, True)[0][:30, :44])


def test_images_that_were_stretched_in_training_are_stretched() -> None:
    model, pixels = tuned(), image(24, 96)
    (found,) = asked_for(seer(48, True, model), pixels, np.ones((24, 96), bool), [View(0, 0, 24, 96)], [point(40, 10)])
    square = torch.nn.functional.interpolate(torch.from_numpy(pixels)[None], (48, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        masks = model(square, Prompts(torch.tensor([[[[20.0, 20]]]]), torch.ones(1, 1, 1)), True)
    fine = torch.nn.functional.interpolate(masks.logits[:, 0], (48, 48), mode="bilinear")
    fine = torch.nn.functional.interpolate(fine, (24, 96), mode="bilinear")[0, int(masks.iou[0, 0].argmax())]
    assert np.array_equal(whole(found, (24, 96)), (fine > 0).numpy())


def test_pixels_without_data_are_in_no_object() -> None:
    valid = np.ones((48, 48), bool)
    valid[:, :24] = False
    for found in (
        asked_for(seer(), image(), valid, views((48, 48), 48), [point(30, 20)]),
        everything(seer(), image(), valid, views((48, 48), 48), EVERYTHING),
    ):
        assert found
        assert not any(whole(one, (48, 48))[:, :24].any() for one in found)
    gone = asked_for(seer(), image(), ~np.ones((48, 48), bool), views((48, 48), 48), [point(30, 20)])
    assert gone[0].mask.size == 0


def test_all_objects_of_a_square_are_those_of_the_library() -> None:
    """At the size of SamPredictor, on an image normalised as it does."""
    model, pixels = tuned(), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    theirs = mask_generator(model, **EVERYTHING).generate(pixels)
    mean, std = (np.array(part, np.float32) for part in model.backbone.statistics)
    scaled = ((pixels - mean) / std).transpose(2, 0, 1).astype(np.float32)
    ours = everything(seer(64, model=model), scaled, np.ones((64, 64), bool), views((64, 64), 64), EVERYTHING)
    assert len(ours) == len(theirs) > 3
    for one, other in zip(ours, sorted(theirs, key=lambda one: -one["area"]), strict=True):
        assert np.array_equal(whole(one, (64, 64)), other["segmentation"])
        assert one.facts["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert one.facts["point"] == other["point_coords"][0]


class Generator:
    """Gives the connected parts of a fixed mask that are within the view, as the library's generator would."""

    def __init__(self, truth: list[np.ndarray], offsets: list[View]):
        self.truth, self.views = truth, iter(offsets)

    def generate(self, _: np.ndarray) -> list[dict[str, Any]]:
        view = next(self.views)
        parts = [(number, view.cut(mask)) for number, mask in enumerate(self.truth)]
        facts = {"stability_score": 1.0, "point_coords": [[1, 2]]}
        return [
            {"segmentation": part, "predicted_iou": 0.9 + 0.01 * number, **facts}
            for number, part in parts if part.any()
        ]  # fmt: skip


def test_an_object_that_a_view_cuts_is_taken_from_another_and_once(monkeypatch) -> None:
    size, parts = (64, 96), views((64, 96), 48)
    monkeypatch.setattr(Seer, "bounded", lambda self, given: given)
    truth = [np.zeros(size, bool) for _ in range(4)]
    truth[0][4:12, 4:12] = True  # within one square alone, and at no inner edge
    truth[1][20:30, 40:52] = True  # across the edges of several squares, within others
    truth[2][2:60, 10:80] = True  # within no square
    truth[3][0:5, 90:96] = True  # at the edge of the image
    monkeypatch.setattr(seeing, "mask_generator", lambda *_, **__: Generator(truth, parts))
    found = everything(seer(), image(*size), np.ones(size, bool), parts, {})
    assert [int(one.mask.sum()) for one in found] == [58 * 70, 120, 64, 30]  # the largest first
    for one, mask in zip(found, (truth[2], truth[1], truth[0], truth[3]), strict=True):
        assert np.array_equal(whole(one, size), mask)


def test_scores_that_are_not_finite_stop_it() -> None:
    pixels = image()
    pixels[:] = np.nan
    with pytest.raises(WorkError, match="the mask scores are not finite"):
        asked_for(seer(), pixels, np.ones((48, 48), bool), views((48, 48), 48), [point(3, 3)])


def test_masks_of_a_view_larger_than_what_is_seen_are_enlarged() -> None:
    """An image of 192 x 96 pixels, stretched to 48 x 48 in training: its masks are made at 48 x 24."""
    pixels, whole_view = image(192, 96), View(0, 0, 192, 96)
    model = tuned()
    looking = seer(48, True, model)
    found = everything(looking, pixels, np.ones((192, 96), bool), [whole_view], EVERYTHING)
    assert looking.bounded((192, 96)) == (48, 24)
    generator = mask_generator(model, **EVERYTHING)
    generator.predictor = looking
    small = {one["predicted_iou"]: one for one in generator.generate(np.empty((48, 24, 1), np.uint8))}
    assert len(found) == len(small) > 2
    for one in found:
        other = small[one.facts["predicted_iou"]]
        assert int(one.mask.sum()) == pytest.approx(16 * other["area"], rel=0.15)
        assert one.facts["point"] == [4 * part for part in other["point_coords"][0]]
