"""Prompted segmentation: its loss by hand, its scores, training that helps, resuming to the same weights."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from modalities.images.backbones import SAM, Masks, Prompts, SAMEncoder, TimmViT
from modalities.images.data import FolderMasks, GeneratedShadows
from modalities.images.prompted import PromptedSegmentation, best, mask_loss
from modalities.images.prompting import Objects
from modalities.remote_sensing.data import FolderScenes, GeneratedScenes
from modalities.remote_sensing.heads import LightDecoder
from modalities.remote_sensing.segmentation import Segmentation
from shared import LoRA, RequestError, WorkError, adapt
from shared.methods.full import Full
from shared.training.engine import Engine, fit
from shared.training.optimiser import Optimiser


def scenes(bands=("red", "green", "blue")) -> GeneratedScenes:
    return GeneratedScenes(count=6, size=48, bands=bands, batch_size=2, validation=0.2, test=0.2)


def task(data=None, *, method=None, backbone=None, **settings) -> PromptedSegmentation:
    data = data or scenes()
    backbone = backbone or SAM(data.bands, size="tiny", weights="random")
    roles = ("attention.query", "attention.value", "mlp.up")
    model = adapt(backbone, method or LoRA(rank=4, roles=roles))
    return PromptedSegmentation(model, data, Optimiser(learning_rate=1e-2), **settings)


# -- loss and scores ---------------------------------------------------------------------------------------------------


def everything(truth: torch.Tensor) -> Objects:
    return Objects(truth, torch.ones(truth.shape[:2], dtype=torch.bool), torch.ones_like(truth[:, 0]))


def test_the_loss_by_hand() -> None:
    truth = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    truth[..., 0] = True
    masks = Masks(torch.zeros(1, 1, 1, 2, 2), torch.full((1, 1, 1), 0.25))
    focal = 0.25 * math.log(2) * 0.5  # (1 - p)^2 log p at a half, weights a quarter and three quarters
    assert mask_loss(masks, everything(truth), (1, 0, 0)).item() == pytest.approx(focal, abs=1e-6)
    dice = 1 - (2 * 1 + 1) / (2 + 2 + 1)
    assert mask_loss(masks, everything(truth), (0, 1, 0)).item() == pytest.approx(dice, abs=1e-6)
    assert mask_loss(masks, everything(truth), (0, 0, 1)).item() == pytest.approx(
        0.25**2, abs=1e-6
    )  # nothing is above 0


def test_only_the_best_of_three_masks_counts() -> None:
    truth = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    truth[..., :2] = True
    right = torch.where(truth, 8.0, -8.0)
    logits = torch.stack([-right, right, torch.zeros_like(right)], 2).requires_grad_()
    iou = torch.tensor([[[0.9, 0.2, 0.3]]])
    loss = mask_loss(Masks(logits, iou), everything(truth), (20, 1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(0.8**2, abs=1e-2)  # the right mask, said to be at 0.2
    moved = logits.grad.abs().sum((3, 4))[0, 0]
    assert moved[1] > 0
    assert moved[[0, 2]].tolist() == [0, 0]
    assert torch.equal(best(Masks(logits.detach(), iou)), -right)  # what the model thinks best


def test_pixels_and_objects_that_do_not_count() -> None:
    truth = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    truth[0, ..., :2] = True
    logits = torch.randn(2, 1, 1, 4, 4, requires_grad=True)
    objects = Objects(truth, torch.tensor([[True], [False]]), torch.ones(2, 4, 4, dtype=torch.bool))
    objects.counts[0, :, 3] = False
    mask_loss(Masks(logits, torch.zeros(2, 1, 1)), objects, (20, 1, 1)).backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0, ..., 3] == 0).all()
    assert (logits.grad[0, ..., :3] != 0).all()
    logits.grad = None
    nothing = objects._replace(valid=torch.zeros(2, 1, dtype=torch.bool))
    loss = mask_loss(Masks(logits, torch.zeros(2, 1, 1)), nothing, (20, 1, 1))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_scores_by_hand() -> None:
    data = scenes()
    model = task(data, prompts=["box"], smallest=1).eval()
    mask = torch.zeros(1, 48, 48, dtype=torch.long)
    mask[0, :, :24] = 1
    mask[0, :4, 30:40] = 2
    mask[0, :, 44:] = data.ignore_index

    def decode(embedding, prompts, kind):  # everything left of the middle, whatever is asked
        logits = torch.full((1, prompts.boxes.shape[1], 1, 24, 24), -5.0)
        logits[..., :12] = 5.0
        return Masks(logits, torch.zeros(1, prompts.boxes.shape[1], 1))

    model.decode = decode
    model.evaluate({"image": torch.zeros(1, 3, 48, 48), "mask": mask, "name": ["x"]})
    found = model.results()
    assert found["iou/box"] == pytest.approx((1 + 0) / 2)
    said, area = 24 * 48, 40
    assert found["pixel_iou/box"] == pytest.approx(said / (said + said + area))
    assert found["iou"] == found["iou/box"]
    assert model.results() == {
        "loss": None,
        "iou": None,
        "iou/box": None,
        "pixel_iou/box": None,
    }  # started anew, and empty


def test_measuring_embeds_each_image_once(monkeypatch) -> None:
    model, calls = task(), []
    encode = model.model.backbone.encode
    monkeypatch.setattr(model.model.backbone, "encode", lambda image: (calls.append(len(image)), encode(image))[1])
    batch = next(iter(scenes().test()))
    with torch.no_grad():
        model.eval().evaluate(batch)
    assert calls == [len(batch["image"])]
    assert set(model.results()) == {
        "loss", "iou", "iou/points", "iou/box", "iou/mask", "pixel_iou/points", "pixel_iou/box", "pixel_iou/mask",
    }  # fmt: skip


def test_the_halves_are_the_whole() -> None:
    model = task().eval()
    for parameter in model.model.bank["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(2, 3, 48, 48)
    asked = Prompts(boxes=torch.tensor([4.0, 6, 20, 30]).expand(2, 1, 4))
    with torch.no_grad():
        apart = model.decode(model.embed(image), asked, "box")
        together = model.model(image, asked)
    assert torch.equal(apart.logits, together.logits)
    assert torch.equal(model.predict(image, asked)[:, 0].sum() > 0, (together.logits > 0).any())
    assert model.predict(image, asked).shape == (2, 1, 48, 48)


# -- clicks ------------------------------------------------------------------------------------------------------------


def asked_of(model: PromptedSegmentation, batch: dict) -> list[Prompts]:
    """The prompts of all passes of a training step."""
    seen, forward = [], model.model.backbone.decode
    model.model.backbone.decode = lambda embedding, asked, multimask: (
        seen.append((asked, multimask)), forward(embedding, asked, multimask))[1]  # fmt: skip
    model.outputs(batch)
    del model.model.backbone.decode
    return seen


@pytest.mark.parametrize("kind", ["points", "box", "mask"])
def test_every_pass_brings_the_last_mask_and_maybe_a_point(kind) -> None:
    model, batch = task(prompts=[kind], clicks=3, points=1), next(iter(scenes().test()))
    torch.manual_seed(4)
    asked = asked_of(model, batch)
    assert len(asked) == 1 + 3 + 2
    (first, multimask), *later = asked
    assert multimask == (kind == "points")
    assert not any(several for _, several in later)
    count = [0 if each.points is None else each.points.shape[2] for each, _ in asked]
    assert count[0] == (0 if kind == "box" else 1)
    grown = [after - before for before, after in pairwise(count)]
    assert sorted(grown) == [0, 0, 1, 1, 1]
    assert grown[-1] == 0
    for before, (after, _) in zip([first, *(each for each, _ in later)], later, strict=False):
        assert after.masks.shape == (len(batch["image"]), 4, 1, 24, 24)
        assert not after.masks.requires_grad
        assert after.boxes is first.boxes
        assert before.masks is not after.masks


def test_the_mask_that_is_brought_is_the_one_the_model_thinks_best() -> None:
    model, batch = task(prompts=["points"], clicks=1, points=1), next(iter(scenes().test()))
    torch.manual_seed(1)
    asked = asked_of(model, batch)
    torch.manual_seed(1)
    found = model.outputs(batch).passes
    assert len(found) == len(asked) == 4
    assert found[0].logits.shape[2] == 3
    for masks, (after, _) in zip(found, asked[1:], strict=False):
        assert torch.equal(after.masks[:, :, 0], best(masks))


def test_the_loss_is_the_mean_of_all_passes() -> None:
    model, batch = task(clicks=2), next(iter(scenes().test()))
    found = model.outputs(batch)
    each = [mask_loss(masks, found.objects, model.weights).item() for masks in found.passes]
    assert len(each) == 5
    assert model.criterion(found, batch).item() == pytest.approx(sum(each) / 5)
    assert len(task(clicks=0).outputs(batch).passes) == 1


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_helps(tmp_path) -> None:
    data = GeneratedShadows(count=10, side=48, size=48, batch_size=4, crop=1.0, flip=False)
    model = task(data, method=Full(), prompts=["box"], instances="class", clicks=0)
    model.optimiser = Optimiser(learning_rate=2e-3)

    def now() -> float:
        with torch.no_grad():
            for batch in data.train():
                model.eval().evaluate(batch)
        return model.results()["iou"]

    before = now()
    found = fit(model, data, Engine(epochs=10, check_every=10, device="cpu"), tmp_path)
    assert now() > before + 0.03
    assert 0 <= found["test"]["iou"] <= 1
    pictures = model.pictures(data, 1)
    assert list(pictures.rows[0][1]) == ["image", "truth", "box"]


class Killed(Exception):
    pass


def test_resuming_draws_the_same_prompts(tmp_path) -> None:
    data, engine = scenes(), Engine(steps=6, check_every=1, device="cpu")

    def run(folder, resume: bool = False, steps: int = 99) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = task(data, measured=1)
        outputs, calls = model.outputs, []

        def counted(batch):
            calls.append(1)
            if len(calls) > steps:
                raise Killed
            return outputs(batch)

        model.outputs = counted
        fit(model, data, engine, folder, resume=resume)
        assert len(calls) == (2 if resume else 6)
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    through = run(tmp_path / "through")
    with pytest.raises(Killed):
        run(tmp_path / "killed", steps=5)
    resumed = run(tmp_path / "killed", resume=True)
    assert all(torch.equal(through[name], tensor) for name, tensor in resumed.items())


def test_frozen_weights_may_be_in_half_precision(tmp_path) -> None:
    """In both halves of the model, which are called one by one."""
    found = fit(task(measured=2), scenes(), Engine(steps=1, device="cpu", frozen="bfloat16"), tmp_path)
    assert 0 <= found["test"]["iou"] <= 1


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_engine_trains_either_part(part, tmp_path) -> None:
    data = scenes(("red", "green", "blue", "nir", "swir1"))
    model = task(data, backbone=SAM(5, size="tiny", weights="random", part=part))
    before = {n: p.detach().clone() for n, p in model.model.trainable().items()}
    fit(model, data, Engine(steps=2, device="cpu"), tmp_path)
    assert any(not torch.equal(before[n], p) for n, p in model.model.trainable().items())


def test_the_whole_model_may_train_though_no_prompt_uses_all_of_it(tmp_path) -> None:
    model = task(method=Full(), prompts=["points"])
    fit(model, scenes(), Engine(steps=1, device="cpu"), tmp_path)


def test_what_does_not_fit_is_one_line() -> None:
    data = scenes()
    vit = TimmViT(3, name="vit_tiny_patch16_224", weights="random", image_size=48, model_args={"depth": 1})
    cases = [
        ("is for the backbone SAM, not vit_tiny", {"backbone": vit}),
        ("one or more of points, box, mask", {"prompts": []}),
        ("at least 1", {"objects": 0}),
        ("clicks and weights at least 0", {"clicks": -1}),
        ("task.background 'sea': the classes are clear", {"background": "sea"}),
    ]
    for message, settings in cases:
        with pytest.raises(RequestError, match=message):
            task(data, **settings)
    model = task(data)
    good = {"image": torch.zeros(1, 3, 48, 48), "mask": torch.zeros(1, 48, 48).long(), "name": ["n"]}
    bad = {
        "do not fit 3 bands": {"image": torch.zeros(1, 4, 48, 48)},
        "holds NaN": {"image": torch.full((1, 3, 48, 48), float("nan"))},
        "mask value 9; this data set has 0 to 3 and 255": {"mask": torch.full((1, 48, 48), 9)},
    }
    for message, change in bad.items():
        with pytest.raises(RequestError, match=message):
            model.on_before_batch_transfer(good | change, 0)
    with pytest.raises(RequestError, match=r"the model takes \(B, 3, H, W\)"):
        model.predict(torch.zeros(1, 4, 48, 48), Prompts())
    model.decode = lambda *_: SimpleNamespace(logits=torch.full((1, 1, 1, 2, 2), float("nan")))
    with pytest.raises(WorkError, match="not finite on sample n"):
        model.evaluate(good | {"mask": torch.ones(1, 48, 48).long()})


def test_an_adapter_around_the_whole_model_is_refused() -> None:
    from modalities.images.adapter_shadow import AdapterShadow

    method = AdapterShadow(grid=4, detector="test_efficientnet", detector_weights="random")
    with pytest.raises(
        RequestError, match="adapter 'default' acts around all of sam_tiny, which is used in two halves"
    ):
        task(method=method)


# -- the encoder alone, and real images --------------------------------------------------------------------------------


def test_the_encoder_alone_carries_a_class_map(tmp_path) -> None:
    data = scenes(("red", "nir", "swir1", "tir1"))
    backbone = SAMEncoder(4, size="tiny", weights="random")
    head = LightDecoder(backbone.channels, len(data.classes), width=8)
    model = adapt(backbone, LoRA(rank=2, roles=("conv", "attention.query", "attention.value")), head=head)
    found = fit(Segmentation(model, data, Optimiser()), data, Engine(steps=2, device="cpu"), tmp_path)
    assert found["test"]["miou"] is not None


def test_real_land_cover_and_roads(materials) -> None:
    folder = materials / "data" / "land_cover_samples" / "loveda"
    classes = ["background", "building", "road", "water", "barren", "forest", "agricultural"]
    cover = FolderScenes(
        images=folder / "images", masks=folder / "masks", classes=classes, label_values=range(1, 8), ignore_value=0,
        tile=256, validation=0.5, test=0, batch_size=1,
    )  # fmt: skip
    roads = materials / "data" / "aerial_roads"
    roads = FolderMasks(images=roads / "images", masks=roads / "masks", size=64, classes=["rest", "road"], crop=1.0)
    for data, loader in ((cover, cover.train), (roads, roads.validation)):
        model = task(data, measured=2)
        batch = model.on_before_batch_transfer(next(iter(loader())), 0)
        with torch.no_grad():
            assert math.isfinite(float(model.loss(batch)))
            model.eval().evaluate(batch)
        found = model.results()
        assert 0 <= found["iou"] <= 1
