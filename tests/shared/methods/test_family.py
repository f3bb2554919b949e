"""The family a user expects beside the published systems: BitFit, norm tuning, SSF, (IA)^3, AdaptFormer, prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import IA3, SSF, AdaptFormer, BitFit, NormTuning, Prompt
from shared.sites import Site, Sites
from tests.shared.hosts import HOSTS


def vit_base():
    from modalities.images.backbones import TimmViT

    with torch.device("meta"):
        return TimmViT(3, name="vit_base_patch16_224", weights="random", image_size=224)


# Sums over the published ViT-B/16: 12 blocks of width 768, hidden width 3072, and a final norm.
@pytest.mark.parametrize(
    ("method", "count"),
    [
        (BitFit(), 12 * (2304 + 768 + 3072 + 768 + 2 * 768) + 768 + 768),
        (BitFit(roles=("attention.query", "mlp.up")), 12 * (768 + 3072)),
        (NormTuning(), 25 * 2 * 768),
        (SSF(), 2 * (12 * (2304 + 768 + 3072 + 768 + 2 * 768) + 768 + 768)),  # the paper's 0.20 M beside the head
        (IA3(), 12 * (768 + 768 + 3072)),
        (AdaptFormer(), 1_189_632),  # the paper's 1.19 M
        (Prompt(count=50), 12 * 50 * 768),
        (Prompt(count=50, deep=False), 50 * 768),
    ],
)
def test_counts_on_vit_base(method, count):
    assert adapt(vit_base(), method).count()["adapter"] == count


def scaled(model) -> list[Tensor]:
    return [p for n, p in model.trainable().items() if n.endswith("scale")]


def test_ssf_is_scale_and_shift_of_the_output():
    linear = nn.Linear(4, 3)
    model = adapt(linear, SSF(), sites=Sites([Site("linear", 0, "", linear)]), example=(torch.randn(2, 4),))
    gamma, beta = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([0.1, 0.2, 0.3])
    with torch.no_grad():
        model.trainable()["adapter.default.model.scale"].copy_(gamma)
        model.trainable()["adapter.default.model:bias.shift"].copy_(beta)
    x = torch.randn(5, 4)
    with model.disabled():
        plain = model(x)
    assert torch.allclose(model(x), gamma * plain + beta, atol=1e-6)
    model.merge()
    assert torch.allclose(model(x), gamma * plain + beta, atol=1e-6)


def test_ia3_scales_outputs_and_the_input_of_the_last_layer():
    up, down = nn.Linear(4, 6), nn.Linear(6, 4)
    model = nn.Sequential(up, down)
    sites = Sites([Site("attention.key", 0, "0", up), Site("mlp.down", 0, "1", down)])
    adapted = adapt(model, IA3(roles=("attention.key", "mlp.down")), sites=sites, example=(torch.randn(2, 4),))
    key, hidden = torch.rand(6), torch.rand(6)
    with torch.no_grad():
        adapted.trainable()["adapter.default.0.scale"].copy_(key)
        adapted.trainable()["adapter.default.1.scale"].copy_(hidden)
    x = torch.randn(3, 4)
    up_out = x @ up._parameters["weight"].T + up._parameters["bias"]
    expected = ((up_out * key) * hidden) @ down._parameters["weight"].T + down.bias
    assert torch.allclose(adapted(x), expected, atol=1e-6)


def test_adaptformer_is_beside_the_mlp():
    backbone, _, _ = HOSTS["vit"]()
    model = adapt(backbone, AdaptFormer(width=3, dropout=0.0, depth=0))
    branch = model.bank["default"]["model/blocks/0/mlp"].branch
    nn.init.normal_(branch.up.weight)
    mlp = backbone.model.blocks[0].mlp
    x = torch.randn(2, 5, mlp.fc1.in_features)
    with model.disabled():
        plain = mlp(x)
    expected = plain + 0.1 * (torch.relu(x @ branch.down.weight.T + branch.down.bias) @ branch.up.weight.T)
    assert torch.allclose(mlp(x), expected, atol=1e-6)


def test_prompts_are_seen_by_attention_and_leave_the_output():
    backbone, (image,), _ = HOSTS["vit"]()
    block = backbone.model.blocks[0]
    bare = backbone(image).maps[0].shape
    model = adapt(backbone, Prompt(count=4, depth=0))
    tokens = model.bank["default"]["model/blocks/0"].tokens
    x = torch.randn(2, 1 + 20, 24)
    with model.disabled():
        together = block(torch.cat([x[:, :1], tokens.expand(2, -1, -1), x[:, 1:]], dim=1))
    assert torch.allclose(block(x), torch.cat([together[:, :1], together[:, 5:]], dim=1), atol=1e-6)
    assert model(image).maps[0].shape == bare


def test_a_shallow_prompt_goes_through_all_blocks():
    backbone, _, _ = HOSTS["vit"]()
    model = adapt(backbone, Prompt(count=4, deep=False))
    first = model.bank["default"]["model/blocks/0"].tokens
    x = torch.randn(1, 21, 24)
    whole = torch.cat([x[:, :1], first.expand(1, -1, -1), x[:, 1:]], dim=1)
    y = x
    for block in backbone.model.blocks:
        y = block(y)
    with model.disabled():
        for block in backbone.model.blocks:
            whole = block(whole)
    assert torch.allclose(y, torch.cat([whole[:, :1], whole[:, 5:]], dim=1), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Prompt(count=0), "Prompt count 0"),
        (lambda: AdaptFormer(dropout=1.0), "AdaptFormer dropout 1.0"),
        (lambda: adapt(vit_base(), AdaptFormer(width=0)), "bottleneck width 0 at model/blocks/0/mlp"),
        (lambda: adapt(vit_base(), Prompt(deep=False, depth=(0, 2))), r"consecutive blocks, not \[0, 2\]"),
        (lambda: adapt(nn.Sequential(nn.Linear(2, 2, bias=False)), BitFit()), "has no bias at linear"),
    ],
)
def test_wrong_arguments_are_one_line(method, message):
    with pytest.raises(RequestError, match=message):
        method()
