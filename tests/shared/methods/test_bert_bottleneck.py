"""Bottlenecks in BERT's blocks: counts and wrong settings; their formulas are in tests/shared/interop."""

from __future__ import annotations

import pytest
import torch

from modalities.language.backbones import TransformersText
from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import BertBottleneck
from tests.shared.hosts import HOSTS


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 894_528),  # Pfeiffer, a 16th: 12 * (2 * 768 * 48 + 48 + 768)
        ({"place": "houlsby", "parts": ("attention", "mlp")}, 1_789_056),
        ({"place": "parallel", "width": 384, "scale": 4.0}, 7_091_712),
    ],
)
def test_parameters_on_bert_base(settings, count):
    with torch.device("meta"):
        model = adapt(TransformersText(name="bert-base-uncased"), BertBottleneck(**settings))
    assert model.count()["adapter"] == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"place": "somewhere"}, "place 'somewhere'"),
        ({"parts": ()}, "no parts"),
        ({"parts": ("head",)}, "in head"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"width": 0}, "width 0 at"),
        ({"activation": "mish"}, "activation 'mish'"),
        ({"depth": 7}, "depth"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(RequestError, match=message):
        adapt(HOSTS["bert"]()[0], BertBottleneck(**settings))


def test_it_wants_norms_after_the_sums():
    with pytest.raises(RequestError, match="no norm after the sum at model.layers.0.mlp"):
        adapt(HOSTS["llama"]()[0], BertBottleneck(width=3))
