"""ClipClassification: zero-shot as open_clip computes it, few-shot training, prompts, ways between models."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from modalities.vision_language.backbones import Embeddings, OpenClip
from modalities.vision_language.classification import ClipClassification
from modalities.vision_language.coop import CoOp
from modalities.vision_language.heads import SimilarityHead, ZeroShotHead, contrastive
from modalities.vision_language.zero_shot import class_texts, class_weights, classifier, similarity_maps
from shared import Adapted, adapt
from shared.errors import RequestError, WorkError
from shared.methods import LoRA, Probe
from shared.training import Engine, Optimiser, fit
from tests.modalities.vision_language.clips import NAMES, ROLES, TEMPLATES, clip, fed, images, task, tuned, written

# -- zero-shot -----------------------------------------------------------------------------------------------------


def test_zero_shot_is_open_clips_own_bit_for_bit(tmp_path):
    theirs, settings = written(tmp_path)
    theirs.requires_grad_(False)  # torch multiplies frozen and unfrozen matrices in other orders
    image = torch.randn(4, 3, 32, 32)
    tokenizer = lambda texts: open_clip.SimpleTokenizer()(texts, context_length=20)  # noqa: E731
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(
            theirs, tokenizer, list(NAMES), list(TEMPLATES), num_classes_per_batch=None
        )
        logits = theirs.logit_scale.exp() * theirs.encode_image(image, normalize=True) @ weights
    zero = task(Probe(), backbone=OpenClip(3, **settings), templates=TEMPLATES)
    assert torch.equal(zero.outputs({"image": image}), logits)
    assert torch.equal(zero.predict(image), logits.softmax(-1))
    assert torch.equal(classifier(zero.model, NAMES, TEMPLATES), weights.T)
    linear = task(Probe(), ZeroShotHead(24, 3), OpenClip(3, **settings), templates=TEMPLATES)
    assert torch.equal(linear.outputs({"image": image}), logits)


def test_texts_of_classes():
    assert class_texts(["a", "b"], ["{}!", "no {}"]) == ["a!", "no a", "b!", "no b"]
    embedded = nn.functional.normalize(torch.randn(6, 5), dim=-1)
    expected = nn.functional.normalize(embedded.reshape(2, 3, 5).mean(1), dim=-1)
    torch.testing.assert_close(class_weights(embedded, 2), expected)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "no class names"),
        (["a", " "], ["{}"], "the name of class 1 is empty"),
        (["sea", "Sea "], ["{}"], "class name 'sea' is given twice"),
        (["a"], [], "no templates"),
        (["a"], ["a photo"], "template 'a photo': write {} once"),
        (["a"], ["{} {}"], "write {} once"),
        (["word " * 20], ["{}"], "20 tokens, ViT-B-32 takes 18; shorten it"),
    ],
)
def test_names_and_templates_that_make_no_classifier_are_refused(names, templates, message):
    with pytest.raises(RequestError, match=message):
        classifier(Adapted(clip()), names, templates)


def test_class_names_come_from_the_data_or_as_told():
    data: Any = images()
    data.classes = ("river_lake", "aGrass", "sea")
    model = adapt(clip(), LoRA(rank=2), head=SimilarityHead(3))
    told = ClipClassification(model, data, Optimiser(), names={"aGrass": "grass"}, templates=("{}",))
    assert told.names == ("river lake", "grass", "sea")
    with pytest.raises(RequestError, match="names: 'grass' is no class; there are river_lake"):
        ClipClassification(model, data, Optimiser(), names={"grass": "x"})
    with pytest.raises(RequestError, match="class name 'sea' is given twice"):
        ClipClassification(model, data, Optimiser(), names={"aGrass": "sea"})


def test_similarity_maps_are_cosines_of_patches_and_classes():
    model, image = Adapted(clip()), torch.randn(2, 3, 32, 32)
    weights = classifier(model, NAMES)
    found = similarity_maps(model, image, weights)
    assert found.shape == (2, 3, 4, 4)
    with torch.no_grad():
        patches = model(image, dense=True).patches
    expected = nn.functional.cosine_similarity(patches[1, :, 2, 3], weights[2], dim=0)
    torch.testing.assert_close(found[1, 2, 2, 3], expected)
    whole = classifier(tuned(task()).model, NAMES)
    assert (similarity_maps(model, image, whole) - found).abs().max() > 1e-3


# -- few-shot ------------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_open_clips_where_each_class_comes_once():
    image, text = (nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    label = torch.tensor([3, 0, 4, 1, 2])
    expected = open_clip.ClipLoss()(image, text[label], torch.tensor(14.0))
    torch.testing.assert_close(contrastive(14.0 * image @ text.T, label), expected)
    many = torch.tensor([3, 3, 0, 0, 0])  # classes that are absent do not count, equals are equally right
    scores = (14.0 * image @ text.T)[:, [3, 0]]
    to_text = nn.functional.cross_entropy(scores, torch.tensor([0, 0, 1, 1, 1]))
    columns = scores.T.log_softmax(1)
    to_image = -(columns[0, :2].mean() + columns[1, 2:].mean()) / 2
    torch.testing.assert_close(contrastive(14.0 * image @ text.T, many), (to_text + to_image) / 2)


def test_logits_are_of_full_precision_under_autocast():
    head, image, text = SimilarityHead(3), torch.randn(4, 8), torch.randn(3, 8)
    given = Embeddings(image, text, None, torch.full((4, 1), 100.0))
    expected = head(given, (32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(given, (32, 32)), expected)
        assert image.matmul(text.T).dtype == torch.bfloat16
    torch.testing.assert_close(expected, 100 * image @ (text / text.norm(dim=1, keepdim=True)).T)


@pytest.mark.parametrize(
    ("tower", "objective"), [("image", "cross_entropy"), ("text", "cross_entropy"), ("both", "contrastive")]
)
def test_training_lowers_the_loss_whichever_tower_is_adapted(tower, objective):
    found = task(LoRA(rank=4, roles=ROLES), SimilarityHead(3, objective=objective), clip(towers=tower)).train()
    batch = next(iter(fed(found).train()))
    trained = found.model.trainable()
    optimiser = torch.optim.Adam(trained.values(), 1e-2)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = found.loss(batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in trained.values())


def test_texts_are_encoded_once_until_what_they_depend_on_changes():
    found = task()
    ran: list[int] = []
    text: Any = found.model.backbone.text
    text.register_forward_hook(lambda *_: ran.append(1))
    image = torch.randn(2, 3, 32, 32)
    first = found.predict(image)
    assert torch.equal(found.predict(image), first)
    assert len(ran) == 1
    assert not torch.equal(tuned(found).predict(image), first)
    assert len(ran) == 2
    with found.between(0.5):
        found.outputs({"image": image})
    assert len(ran) == 2 + 1


def test_a_head_of_weights_starts_zero_shot_and_trains_with_the_image_tower_alone(tmp_path):
    zero = task(Probe()).outputs({"image": (image := torch.randn(2, 3, 32, 32))})
    found = task(head=ZeroShotHead(24, 3), backbone=clip(towers="image"))
    with torch.no_grad():
        torch.testing.assert_close(found.outputs({"image": image}), zero)
    assert found.model.count()["head"] == 3 * 24
    data = fed(found)
    result = fit(found, data, Engine(epochs=1, device="cpu"), tmp_path)
    assert 0 <= result["test"]["accuracy"] <= 1
    assert (found.head.weight - found.head.zero_shot).abs().max() > 0
    deaf = task(head=ZeroShotHead(24, 3), backbone=clip(towers="text"))
    with pytest.raises(WorkError, match="no gradient reaches adapter.default.text/"):
        fit(deaf, fed(deaf), Engine(epochs=1, device="cpu"), tmp_path / "deaf")


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "head", "templates"),
    [
        (LoRA(rank=2, roles=ROLES), lambda: SimilarityHead(3), TEMPLATES),
        (LoRA(rank=2), lambda: ZeroShotHead(24, 3), TEMPLATES),
        (CoOp(count=2), lambda: SimilarityHead(3), ("X X {}",)),
    ],
)
def test_a_saved_adapter_gives_the_same_probabilities_when_loaded(method, head, templates, tmp_path):
    image = torch.randn(2, 3, 32, 32)
    found = tuned(task(method, head(), templates=templates))
    found.model.save(tmp_path / "adapter.safetensors")
    other = task(method, head(), templates=templates)
    fresh = other.predict(image)
    other.model.load(tmp_path / "adapter.safetensors")
    assert torch.equal(other.predict(image), found.predict(image))
    assert not torch.equal(fresh, found.predict(image))


def test_a_backbone_without_a_text_tower_is_refused():
    from modalities.images.backbones import TimmViT

    small = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    vit = TimmViT(3, name="vit_small_patch16_224", weights="random", image_size=32, patch_size=8, model_args=small)
    with pytest.raises(RequestError, match="has no text tower: use the backbone OpenClip"):
        ClipClassification(adapt(vit, LoRA(rank=2), head=SimilarityHead(3)), images(), Optimiser())
