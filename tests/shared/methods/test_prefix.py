"""Prefix and prompt tuning of language models and of vision transformers, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modalities.language.backbones import TransformersText
from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import LoRA, Prefix, Prompt
from tests.shared.hosts import HOSTS

TOKENS = torch.tensor([[3, 7, 11, 5, 2], [9, 4, 6, 0, 0]])
MASK = TOKENS > 0
BIG = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {
    "llama": {**BIG, "intermediate_size": 24, "num_key_value_heads": 2},
    "bloom": BIG,
    "opt": {**BIG, "ffn_dim": 24, "word_embed_proj_dim": 32, "max_position_embeddings": 16},
    "gptj": {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 16},
    "bert": {**BIG, "intermediate_size": 24, "max_position_embeddings": 16},
}


def text(family: str, **more) -> TransformersText:
    config = {**SMALL[family], "pad_token_id": 0}
    return TransformersText(name=family, weights="random", config=config, **more)


@pytest.mark.parametrize("family", SMALL)
def test_a_prefix_lengthens_the_keys_of_every_layer_and_nothing_else(family, monkeypatch):
    from transformers import DynamicCache

    backbone = text(family)
    model = adapt(backbone, Prefix(count=3))
    seen = []
    update = DynamicCache.update

    def watched(self, keys, values, layer, *args, **kwargs):
        whole = update(self, keys, values, layer, *args, **kwargs)
        seen.append((layer, keys.shape[2], whole[0].shape[2]))
        return whole

    monkeypatch.setattr(DynamicCache, "update", watched)
    states = model(TOKENS, MASK).states
    assert states.shape == (2, 5, 32)
    assert [s for s in seen if s[1] == 5] == [(0, 5, 8), (1, 5, 8)]
    channels = 16 if family == "llama" else 32  # two heads of keys serve four of queries
    assert model.count()["trainable"] == 2 * 2 * channels * 3


@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "gptj"])
def test_a_prefix_of_the_keys_of_real_tokens_is_those_tokens(family):
    """Prefix keys and values taken from a text make the rest of that text what the whole text makes it."""
    from transformers import DynamicCache

    backbone = text(family)
    whole = backbone(TOKENS[:1]).states
    past = DynamicCache()
    backbone.model(input_ids=TOKENS[:1, :2], past_key_values=past, use_cache=True)
    model = adapt(backbone, Prefix(count=2))
    prefix = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in past.layers])  # L 2 heads n width
    with torch.no_grad():
        model.trainable()["adapter.default.model.embedding"].copy_(prefix.permute(3, 0, 1, 2, 4).flatten(1))
        assert torch.allclose(model(TOKENS[:1, 2:]).states, whole[:, 2:], atol=1e-5)


def test_prompts_are_the_embeddings_of_tokens_in_front():
    backbone = text("llama")
    whole = backbone(TOKENS[:1]).states
    model = adapt(backbone, Prompt(count=2, deep=False))
    with torch.no_grad():
        model.trainable()["adapter.default.model.tokens"].copy_(backbone.model.embed_tokens.weight[TOKENS[0, :2]])
        assert torch.allclose(model(TOKENS[:1, 2:]).states, whole[:, 2:], atol=1e-5)


def test_prompt_and_prefix_together_come_in_the_order_of_the_cache_then_the_prompt():
    backbone = text("llama")
    model = adapt(backbone, Prefix(count=2), name="prefix")
    model.add(Prompt(count=1, deep=False), name="prompt")
    model.activate("prefix", "prompt")
    both = model(TOKENS, MASK).states
    model.activate("prompt", "prefix")
    assert torch.equal(model(TOKENS, MASK).states, both)
    model.activate("prefix")
    assert not torch.allclose(model(TOKENS, MASK).states, both, atol=1e-3)
    model.activate()
    assert torch.equal(model(TOKENS, MASK).states, backbone(TOKENS, MASK).states)


def test_padding_changes_nothing_behind_a_prefix():
    model = adapt(text("llama"), Prefix(count=2))
    padded, alone = model(TOKENS, MASK).states[1, :3], model(TOKENS[1:, :3]).states[0]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_a_pooler_reads_the_first_real_token_behind_a_prompt():
    backbone = text("bert", pooler=True)
    output = adapt(backbone, Prompt(count=2, deep=False))(TOKENS, MASK)
    assert torch.allclose(output.pooled, backbone.model.pooler(output.states))


def test_a_prefix_in_a_vision_transformer_is_attention_over_more_keys():
    backbone, _, _ = HOSTS["vit"]()
    model = adapt(backbone, Prefix(count=3, depth=1))
    attention, x = backbone.model.blocks[1].attn, torch.randn(2, 7, 24)
    keys, values = model.bank["default"]["model/blocks/1/attn"].tokens()[:, 0].unbind(1)
    q, k, v = (part.unflatten(2, (2, 12)).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    k, v = (
        torch.cat([more.unflatten(1, (2, 12)).transpose(0, 1).expand(2, -1, -1, -1), own], 2)
        for more, own in ((keys, k), (values, v))
    )
    expected = attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x), expected, atol=1e-6)


def test_a_projection_makes_the_same_tokens_from_fewer_numbers():
    model = adapt(text("bert"), Prefix(count=3, projection=5))
    adapter = model.bank["default"]["model"]
    first, second = adapter.project[0], adapter.project[2]
    hidden = torch.tanh(adapter.embedding @ first.weight.T + first.bias)
    assert torch.equal(adapter.tokens(), (hidden @ second.weight.T + second.bias).view(3, 2, 2, 32))
    assert model.count()["trainable"] == 3 * 32 + 33 * 5 + 6 * 2 * 2 * 32


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Prefix(count=0), "Prefix count 0, projection None: both are at least 1"),
        (lambda: Prefix(projection=0), "projection 0"),
        (lambda: adapt(text("llama"), Prefix(depth="last 1")), "takes a prefix of all its blocks: use .all."),
        (lambda: adapt(text("llama"), Prompt()), "use deep=False and all blocks, or Prefix for every block"),
        (lambda: adapt(HOSTS["clip"]()[0], Prefix()), "nn.MultiheadAttention has no place for a prefix"),
        (lambda: adapt(text("bert"), Prefix(count=12)), "5 tokens behind 12 of a prompt or prefix; it takes 16 in all"),
    ],
)
def test_what_cannot_be_is_one_line(ask, message):
    with pytest.raises(RequestError, match=message):
        ask()


def test_a_masked_attention_is_refused():
    class Masked(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    from shared.sites import Site, Sites

    module = Masked()
    sites = Sites([Site("attention", 0, "", module, parameter=None, width=8)])
    with pytest.raises(RequestError, match="this attention is masked"):
        adapt(module, Prefix(count=2), sites=sites, example=(torch.randn(1, 2, 5, 4),))


def test_lora_and_a_prefix_on_one_model():
    model = adapt(text("llama"), LoRA(rank=2), name="lora")
    model.add(Prefix(count=2), name="prefix")
    model.activate("lora", "prefix")
    model(TOKENS, MASK).states.square().sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())
