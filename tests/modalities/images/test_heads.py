"""The linear head: its numbers against torch's own, what it refuses, and that the run tells it the summary's width."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modalities.images.heads import LinearHead
from shared.backbone import Features
from shared.errors import RequestError


def features(count: int = 6, width: int = 5) -> Features:
    return Features((), 3 + 2 * torch.randn(count, width))


def test_logits_loss_and_probabilities():
    head, given, label = LinearHead(5, 3), features(), torch.tensor([0, 1, 2, 0, 1, 2])
    logits = head(given, (8, 8))
    torch.testing.assert_close(logits, given.summary @ head.classify.weight.T + head.classify.bias)
    torch.testing.assert_close(head.loss(logits, label), F.cross_entropy(logits, label))
    torch.testing.assert_close(head.predict(logits), logits.softmax(1))
    assert head.predict(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("norm", "extra"), [(None, 0), ("batch", 0), ("layer", 10)])
def test_what_trains(norm, extra):
    assert sum(p.numel() for p in LinearHead(5, 3, norm=norm).parameters()) == 5 * 3 + 3 + extra


@pytest.mark.parametrize(("norm", "dim"), [("batch", 0), ("layer", 1)])
def test_norms(norm, dim):
    head, given = LinearHead(5, 3, norm=norm), features(64)
    normed = (given.summary - given.summary.mean(dim, keepdim=True)) / given.summary.std(
        dim, keepdim=True, correction=0
    )
    expected = normed @ head.classify.weight.T + head.classify.bias
    torch.testing.assert_close(head(given, (8, 8)), expected, rtol=1e-3, atol=1e-3)


def test_dropout_only_in_training():
    head, given = LinearHead(5, 3, dropout=0.5), features()
    assert not head(given, (8, 8)).equal(head(given, (8, 8)))
    head.eval()
    assert head(given, (8, 8)).equal(head(given, (8, 8)))


def test_refusals():
    with pytest.raises(RequestError, match="head.dropout 1.0"):
        LinearHead(5, 3, dropout=1.0)
    with pytest.raises(RequestError, match="summaries of width 5, the backbone's have 7"):
        LinearHead(5, 3)(features(width=7), (8, 8))
