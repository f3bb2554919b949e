"""CoOp: trained vectors for words, shared by all classes or of each, and texts that they do not fit."""

from __future__ import annotations

import pytest
import torch

from modalities.vision_language.coop import CoOp
from shared.errors import RequestError
from shared.methods import Probe
from tests.modalities.vision_language.clips import fed, task


def test_prompts_that_start_from_words_are_those_words_bit_for_bit():
    image = torch.randn(2, 3, 32, 32)
    words = task(Probe()).predict(image)
    assert torch.equal(task(CoOp(count=4, start="a photo of a")).predict(image), words)
    template = ("X X X X {}.",)
    found = task(CoOp(count=4, start="a photo of a"), templates=template)
    assert torch.equal(found.predict(image), words)
    assert not torch.equal(task(Probe(), templates=template).predict(image), words)


def test_prompts_train_alone_and_each_class_can_have_its_own():
    shared, own = (
        task(CoOp(count=3), templates=("X X X {}.",)),
        task(CoOp(count=3, classes=3), templates=("X X X {}.",)),
    )
    assert (shared.model.count()["trainable"], own.model.count()["trainable"]) == (3 * 32, 3 * 3 * 32)
    found = own.train()
    found.loss(next(iter(fed(found).train()))).backward()
    (words,) = found.model.trainable().values()
    assert words.grad is not None
    assert (words.grad.abs().amax((1, 2)) > 0).tolist() == [True] * 3
    before = found.eval().outputs({"image": (image := torch.randn(2, 3, 32, 32))}).detach()
    with torch.no_grad():
        words[1] += 1
    changed = (found.outputs({"image": image}).detach() != before).all(0)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("method", "templates", "message"),
    [
        ({"count": 3}, ("{} X",), "begin every template with the same 3 words"),
        ({"count": 30}, ("X {}",), "begin every template with the same 30 words"),
        ({"count": 3, "start": "a photo of a"}, ("X {}",), "CoOp start 'a photo of a': 4 tokens for count 3"),
        ({"count": 1, "classes": 2}, ("X {}",), "CoOp classes 2: the texts are of 3"),
        ({"count": 0}, ("{}",), "CoOp count 0"),
        ({"count": 1, "classes": 1}, ("{}",), "classes 1: at least 1, and 2 or null"),
    ],
)
def test_prompts_that_do_not_fit_the_texts_are_refused(method, templates, message):
    with pytest.raises(RequestError, match=message):
        task(CoOp(**method), templates=templates).predict(torch.randn(1, 3, 32, 32))
