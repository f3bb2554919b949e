"""SamPredictor and SamAutomaticMaskGenerator on adapted models: the library's answers, changed by what was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modalities.images.backbones import SAM, TimmViT
from modalities.images.sam_tools import mask_generator, predictor
from shared import LoRA, RequestError, adapt
from shared.adapted import Adapted
from shared.methods.adapt_former import AdaptFormer

POINT = {"point_coords": np.array([[10.0, 20.0]]), "point_labels": np.array([1])}
PROMPTS: list[dict[str, Any]] = [
    POINT,
    {"box": np.array([3.0, 4, 30, 20])},
    {**POINT, "box": np.array([3.0, 4, 30, 20]), "multimask_output": False},
    {**POINT, "mask_input": np.linspace(-5, 5, 32 * 32, dtype=np.float32).reshape(1, 32, 32)},
]
EVERYTHING = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)


def tiny() -> SAM:
    return SAM(3, size="tiny", weights="random")


def adapted(kind: str) -> Adapted:
    methods = {
        "LoRA": LoRA(rank=2, roles=("attention.query", "mlp.up")),
        "AdaptFormer": AdaptFormer(width=4, dropout=0.0),
    }
    return adapt(tiny(), methods[kind])


def moved(model: Adapted) -> Adapted:
    for parameter in model.bank["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def answers(found: Any) -> list[np.ndarray]:
    found.set_image(picture())
    return [part for prompt in PROMPTS for part in found.predict(**prompt)]


def library_answers() -> list[np.ndarray]:
    from segment_anything import SamPredictor

    return answers(SamPredictor(tiny().sam))


@pytest.mark.parametrize("kind", ["LoRA", "AdaptFormer"])
def test_untrained_adapters_answer_as_the_library_and_trained_ones_differently(kind) -> None:
    model, library = adapted(kind), library_answers()
    ours = answers(predictor(model))
    assert [a.shape for a in ours] == [a.shape for a in library]
    assert ours[0].shape == (3, 30, 50)  # masks at the image's own size
    assert all(np.array_equal(a, b) for a, b in zip(ours, library, strict=True))
    trained = answers(predictor(moved(model)))
    for logits in range(2, len(trained), 3):
        assert np.abs(trained[logits] - library[logits]).max() > 1e-3
    with model.disabled():
        assert all(np.array_equal(a, b) for a, b in zip(answers(predictor(model)), library, strict=True))


def test_the_plain_library_predictor_on_the_adapted_model_answers_alike() -> None:
    from segment_anything import SamPredictor

    model = moved(adapted("LoRA"))
    ours, theirs = answers(predictor(model)), answers(SamPredictor(model.backbone.sam))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_masks_of_everything() -> None:
    from segment_anything import SamAutomaticMaskGenerator

    library = SamAutomaticMaskGenerator(tiny().sam, **EVERYTHING).generate(picture())
    model = adapted("LoRA")
    ours = mask_generator(model, **EVERYTHING).generate(picture())
    assert len(ours) == len(library) > 0
    for mine, theirs in zip(ours, library, strict=True):
        assert mine["predicted_iou"] == theirs["predicted_iou"]
        assert np.array_equal(mine["segmentation"], theirs["segmentation"])
    trained = mask_generator(moved(model), **EVERYTHING).generate(picture())
    assert [one["predicted_iou"] for one in trained] != [one["predicted_iou"] for one in library]


def test_prompts_outside_the_image_are_refused() -> None:
    found = predictor(tiny())
    with pytest.raises(RequestError, match="no image is set"):
        found.predict(**POINT)
    found.set_image(picture())
    cases = [
        (r"point \(50.5, 3\) lies outside the image, 50 pixels wide and 30 high", {"point_coords": [[50.5, 3]]}),
        (r"point \(2, -1\) lies outside", {"point_coords": [[1, 1], [2, -1]]}),
        (r"point \(nan, 1\) lies outside", {"point_coords": [[float("nan"), 1]]}),
        (r"box corner \(10, 31\) lies outside", {"box": [1, 1, 10, 31]}),
    ]
    for message, prompt in cases:
        prompt = {name: np.array(value, float) for name, value in prompt.items()}
        if "point_coords" in prompt:
            prompt["point_labels"] = np.ones(len(prompt["point_coords"]))
        with pytest.raises(RequestError, match=message):
            found.predict(**prompt)
    with pytest.raises(RequestError, match="points need labels"):
        found.predict(point_coords=np.array([[1.0, 1.0]]))
    with pytest.raises(RequestError, match="SamPredictor takes uint8"):
        found.set_image(picture().astype(float))
    with pytest.raises(RequestError, match=r"takes \(height, width, 3 bands\)"):
        found.set_image(picture()[..., :2])


def test_more_bands_come_normalised() -> None:
    rgb, found = tiny(), predictor(SAM(6, size="tiny", weights="random"))
    with torch.no_grad():  # the same model on twice the bands: half of the RGB kernel each
        state = rgb.sam.state_dict()
        kernel = state["image_encoder.patch_embed.proj.weight"]
        found.model.load_state_dict(
            state | {"image_encoder.patch_embed.proj.weight": torch.cat([kernel, kernel], 1) / 2}
        )
    values = np.random.default_rng(1).normal(size=(32, 64, 3)).astype(np.float32)
    found.set_image(np.concatenate([values, values], 2))
    with torch.no_grad():
        whole = torch.zeros(1, 3, 64, 64)
        whole[:, :, :32] = torch.from_numpy(values).permute(2, 0, 1)
        assert torch.allclose(found.features, rgb.sam.image_encoder(whole), atol=1e-5)
    masks, _, _ = found.predict(**POINT)
    assert masks.shape == (3, 32, 64)


def test_other_models_and_settings_are_one_line() -> None:
    vit = TimmViT(3, name="vit_tiny_patch16_224", weights="random", image_size=32, model_args={"depth": 1})
    with pytest.raises(RequestError, match="is for the backbone SAM, not TimmViT"):
        predictor(adapt(vit, LoRA(rank=1)))
    with pytest.raises(RequestError, match="SamAutomaticMaskGenerator: .*points_per_sides"):
        mask_generator(tiny(), points_per_sides=3)
