"""The head of text classification: pooling that padding cannot touch, and gradients."""

from __future__ import annotations

import pytest
import torch

from modalities.language.backbones import Hidden
from modalities.language.heads import TextHead, pool
from shared.errors import RequestError

STATES = torch.arange(24.0).reshape(2, 4, 3)
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
HIDDEN = Hidden(STATES, MASK, -STATES[:, 0])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", torch.stack([STATES[0].mean(0), STATES[1, :2].mean(0)])),
        ("first", STATES[:, 0]),
        ("last", torch.stack([STATES[0, 3], STATES[1, 1]])),
        ("pooler", -STATES[:, 0]),
    ],
)
def test_pooling(how, expected):
    assert torch.equal(pool(HIDDEN, how), expected)
    dirty = STATES.masked_fill(~MASK[:, :, None], float("nan"))
    assert torch.equal(pool(Hidden(dirty, MASK, HIDDEN.pooled), how), expected)
    half = pool(Hidden(STATES.bfloat16(), MASK, -STATES[:, 0].bfloat16()), how)
    assert half.dtype == torch.bfloat16


def test_a_head_gives_logits_loss_and_probabilities():
    head = TextHead((7, 3), 5, pooling="last")
    logits = head(HIDDEN, ())
    assert torch.allclose(logits, STATES[[0, 1], [3, 1]] @ head.classify.weight.T + head.classify.bias)
    assert torch.allclose(head.predict(logits).sum(1), torch.ones(2))
    label = torch.tensor([1, 4])
    expected = -logits.log_softmax(1)[[0, 1], label].mean()
    assert torch.allclose(head.loss(logits, label), expected)
    assert head(Hidden(STATES.bfloat16(), MASK), ()).dtype == torch.float32


def test_dropout_acts_in_training_alone():
    head = TextHead((3,), 2, dropout=0.5)
    assert torch.equal(head.eval()(HIDDEN), head.eval()(HIDDEN))
    assert not torch.equal(head.train()(HIDDEN), head.eval()(HIDDEN))


def test_no_gradient_comes_from_padding():
    states = STATES.clone().requires_grad_()
    pool(Hidden(states, MASK), "mean").square().sum().backward()
    assert states.grad[~MASK].count_nonzero() == 0
    assert states.grad[MASK].count_nonzero() > 0


def test_what_cannot_be_is_one_line():
    with pytest.raises(RequestError, match=r"backbone\.pooler=true"):
        pool(Hidden(STATES, MASK), "pooler")
    with pytest.raises(RequestError, match=r"head\.dropout 1"):
        TextHead((3,), 2, dropout=1)
