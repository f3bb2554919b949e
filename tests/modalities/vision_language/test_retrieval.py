"""Recall of retrieval: hand-counted, against torchmetrics, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from modalities.vision_language.heads import contrastive
from modalities.vision_language.retrieval import recall_at
from shared import adapt
from shared.errors import RequestError
from shared.methods import LoRA
from tests.modalities.vision_language.clips import ROLES, clip


def test_hand_counted():
    image, text = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    found = recall_at(image, text, torch.tensor([0, 1, 2]), ks=(1, 2, 3))
    assert [found[f"image_to_text/recall@{k}"] for k in (1, 3)] == [1 / 3, 1.0]
    same = recall_at(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4), ks=(1, 3, 4))
    assert list(same.values()) == [0, 0, 1] * 2  # all alike: nothing is found but among all


def test_equals_torchmetrics_with_several_texts_an_image():
    image, text = (torch.nn.functional.normalize(torch.randn(n, 6), dim=-1) for n in (9, 30))
    image_of = torch.cat([torch.arange(9), torch.randint(0, 9, (21,))])
    scores, right = image @ text.T, image_of[None] == torch.arange(9)[:, None]
    found = recall_at(image, text, image_of)
    for way, values, truth in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        query = torch.arange(len(values))[:, None].expand_as(values)
        for k in (1, 5):
            metric = RetrievalHitRate(top_k=k)
            expected = metric(values.flatten(), truth.flatten(), indexes=query.flatten())
            assert found[f"{way}/recall@{k}"] == pytest.approx(float(expected))
        assert found[f"{way}/recall@10"] >= found[f"{way}/recall@5"]


def test_of_an_adapted_clip_trained_on_pairs():
    backbone = clip()
    model = adapt(backbone, LoRA(rank=4, roles=ROLES))
    image, tokens = torch.randn(4, 3, 32, 32), backbone.tokens(["a disc", "stripes", "a red cross", "checks"])
    optimiser = torch.optim.Adam(model.trainable().values(), 2e-2)
    for _ in range(30):
        found = model(image, tokens)
        loss = contrastive(found.scale * found.image @ found.text.T, torch.arange(4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found = model(image, tokens)
    assert recall_at(found.image, found.text, torch.arange(4), ks=(1,)) == {
        "image_to_text/recall@1": 1.0,
        "text_to_image/recall@1": 1.0,
    }


@pytest.mark.parametrize(
    ("image", "text", "image_of", "message"),
    [
        (torch.zeros(0, 2), torch.eye(2), torch.zeros(2, dtype=torch.long), "among 0 images and 2 texts"),
        (torch.eye(2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "among 2 images and 0 texts"),
        (torch.eye(2), torch.eye(2), torch.tensor([0, 2]), "wants one of 2 images for each"),
        (torch.eye(2), torch.eye(2), torch.tensor([0]), "wants one of 2 images for each"),
        (torch.eye(2), torch.eye(2), torch.tensor([0, 0]), "image 1 has no text"),
        (torch.eye(2) * torch.nan, torch.eye(2), torch.tensor([0, 1]), "NaN or infinity"),
    ],
)
def test_what_cannot_be_counted_is_refused(image, text, image_of, message):
    with pytest.raises(RequestError, match=message):
        recall_at(image, text, image_of)
    with pytest.raises(RequestError, match="recall at nothing"):
        recall_at(torch.eye(2), torch.eye(2), torch.arange(2), ks=())
