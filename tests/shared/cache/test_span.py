"""How far up a model is frozen, from what acts where; what leaves nothing frozen is one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modalities.remote_sensing.cloud_adapter import CloudAdapter
from shared import methods
from shared.adapted import adapt
from shared.cache import Span, span
from shared.errors import RequestError
from shared.method import Method
from shared.sites import describe
from tests.shared.cache.models import model, vit
from tests.shared.hosts import clip, llama

BIASES = methods.BitFit(roles=("attention.query", "mlp.up"), depth="last 2")
LADDER = methods.S2A(bias=False, prompts=0, side="ladder", reduction=4, bits=None)


@pytest.mark.parametrize(
    ("method", "summary", "maps"),
    [
        (methods.Probe(), Span(4, (), False), Span(4, (0, 1, 3), True)),
        (methods.LoRA(depth="last 2"), Span(2, (1,), False), Span(2, (0, 1), True)),
        (methods.LoRA(depth=[3]), Span(3, (2,), False), Span(3, (0, 1, 2), True)),
        (methods.AdaptFormer(depth="last 1"), Span(3, (2,), False), Span(3, (0, 1, 2), True)),
        (methods.Prompt(depth="last 3"), Span(1, (0,), False), Span(1, (0,), True)),
        (BIASES, Span(2, (1,), False), Span(2, (0, 1), True)),
        (methods.NormTuning(tags=("final",)), Span(4, (3,), False), Span(4, (0, 1, 3), True)),
        (CloudAdapter(width=4, stages=1, depth="last 2"), Span(2, (1,), False), Span(2, (0, 1), True)),
        (LADDER, Span(4, (0, 1, 2, 3), False), Span(4, (0, 1, 2, 3), True)),
    ],
)  # fmt: skip
def test_what_is_frozen_and_what_of_it_is_read(method: Method, summary: Span, maps: Span) -> None:
    assert span(model(method)) == summary
    assert span(model(method, maps=True)) == maps


def test_a_model_without_a_head_gives_all_its_maps() -> None:
    assert span(adapt(vit(depths=(0, 3)), methods.LoRA(depth="last 2"))) == Span(2, (0, 1), True)


def test_other_towers_have_one_too() -> None:
    backbone = clip()[0]
    assert span(adapt(backbone, methods.LoRA(depth="last 2", roles=("attention.qkv",)))) == Span(1, (0,), True)
    assert span(adapt(clip()[0], methods.NormTuning(tags=("final",)))).start == 3


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (methods.LoRA(), r"LoRA acts in block 0 \(model.blocks.0.attn.qkv\); leave the first blocks frozen, such as "
                         "with method.depth='last 4'"),
        (methods.Prompt(), "Prompt acts in block 0"),
        (methods.Full(), "weights of the backbone train"),
        (methods.NormTuning(), "NormTuning acts in block 0"),
        (methods.BitFit(), "BitFit acts at model.patch_embed.proj, before the blocks"),
        (CloudAdapter(width=4, stages=1), "CloudAdapter acts in block 0"),
    ],
)  # fmt: skip
def test_methods_that_leave_no_prefix_say_where_they_act(method: Method, why: str) -> None:
    with pytest.raises(RequestError, match=f"no frozen prefix: {why}"):
        span(model(method))


def test_an_adapter_around_the_backbone_that_may_change_its_image_leaves_none() -> None:
    made = model(CloudAdapter(width=4, stages=1, depth="last 2"))
    perceive = next(module for key, module in made.bank["default"].items() if key == "model")  # type: ignore[operator]
    type(perceive).observes = False
    try:
        with pytest.raises(RequestError, match="CloudAdapter acts around the whole backbone"):
            span(made)
    finally:
        type(perceive).observes = True


def test_a_weight_that_trains_and_a_module_in_training_mode_count() -> None:
    made = model()
    made.backbone.blocks[1].mlp.requires_grad_(True)  # type: ignore[index]
    assert span(made).start == 1
    made.backbone.model.pos_embed.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="weights of the backbone train at model, before the blocks"):
        span(made)
    made = model()
    made.backbone.blocks[0].attn.train()  # type: ignore[index]
    with pytest.raises(RequestError, match="training mode in block 0"):
        span(made)


def test_active_adapters_alone_count() -> None:
    made = model()
    made.add(methods.LoRA(rank=2), name="everywhere")
    with pytest.raises(RequestError, match="block 0"):
        span(made)
    made.activate("default")
    assert span(made).start == 2
    made.activate()
    assert span(made).start == 4


@pytest.mark.parametrize("other", [lambda: llama()[0], lambda: nn.Sequential(nn.Linear(3, 3))])
def test_a_backbone_that_cannot_be_split_has_none(other: Any) -> None:
    backbone = other()
    made = adapt(backbone, methods.Probe(), sites=describe(backbone))
    with pytest.raises(RequestError, match="has no frozen prefix to keep: its run cannot be split"):
        span(made)


def test_merged_weights_have_none() -> None:
    made = model()
    with torch.no_grad():
        made.merge()
    with pytest.raises(RequestError, match="merged"):
        span(made)
