"""The language backbone: counts of published models, outputs equal to the library's, sites, weights, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from modalities.language.backbones import TransformersText, published
from modalities.language.backbones.families import FAMILIES
from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import Full, LoRA

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
FEED = {"intermediate_size": 24}
MORE = {
    "llama": FEED | {"num_key_value_heads": 1},
    "mistral": FEED | {"num_key_value_heads": 1},
    "qwen2": FEED | {"num_key_value_heads": 1},
    "gemma": FEED | {"num_key_value_heads": 1, "head_dim": 8},
    "bert": FEED | {"max_position_embeddings": 16},
    "roberta": FEED | {"max_position_embeddings": 16},
    "xlm-roberta": FEED | {"max_position_embeddings": 16},
    "bloom": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
    "gptj": {"rotary_dim": 4, "n_inner": 24},
}
# As the model cards and papers give them, with the language-modelling head where it is tied or part of the count.
COUNTS = {
    ("llama-7b", "lm_head"): 6_738_415_616,
    ("llama-13b", "lm_head"): 13_015_864_320,
    ("Llama-2-7b-hf", "lm_head"): 6_738_415_616,
    ("Meta-Llama-3-8B", "lm_head"): 8_030_261_248,
    ("Mistral-7B-v0.1", "lm_head"): 7_241_732_096,
    ("bloom-560m", "lm_head"): 559_214_592,
    ("bloom-7b1", "lm_head"): 7_069_016_064,
    ("opt-1.3b", "lm_head"): 1_315_758_080,
    ("opt-6.7b", "lm_head"): 6_658_473_984,
    ("gpt-j-6b", "lm_head"): 6_050_882_784,
    ("bert-base-uncased", "pooler"): 109_482_240,
    ("bert-large-uncased", "pooler"): 335_141_888,
    ("bert-base-multilingual-cased", "pooler"): 177_853_440,
    ("roberta-base", "pooler"): 124_645_632,
    ("roberta-large", "pooler"): 355_359_744,
    ("xlm-roberta-base", "pooler"): 278_043_648,
}


def library_model(family: str, seed: int):
    """The library's own model with its head, which ``small(family, lm_head=True, seed=seed)`` must equal."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForCausalLM if FAMILIES[family].causal else AutoModelForMaskedLM
    config = AutoConfig.for_model(family, **SMALL, **MORE[family])
    torch.manual_seed(seed)
    return kind.from_config(config).eval()


def small(family: str, **more) -> TransformersText:
    return TransformersText(name=family, weights="random", config=SMALL | MORE[family], **more)


@pytest.mark.parametrize(("name", "with_"), COUNTS)
def test_published_sizes_are_counted_without_weights(name, with_):
    with torch.device("meta"):
        backbone = TransformersText(name=name, **{with_: True})
    assert sum(p.numel() for p in backbone.parameters()) == COUNTS[name, with_]
    assert backbone.name == published.find(name)
    assert "meta device" in backbone.source


def test_an_adapter_of_a_published_size_is_counted():
    with torch.device("meta"):
        roberta = TransformersText(name="roberta-base")
        llama = TransformersText(name="llama-7b")
    assert adapt(roberta, LoRA(rank=8)).count()["adapter"] == 294_912
    everything = [f"attention.{r}" for r in ("query", "key", "value", "output")] + ["mlp.up", "mlp.gate", "mlp.down"]
    assert adapt(llama, LoRA(rank=128, roles=everything)).count()["adapter"] == 319_815_680


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_logits_are_those_of_the_library(family):
    backbone, theirs = small(family, lm_head=True, seed=3), library_model(family, 3)
    assert not any(module.training for module in backbone.model.modules())
    tokens, mask = backbone.example()
    with torch.no_grad():
        hidden = backbone(tokens, mask)
        expected = theirs(tokens, attention_mask=mask.long(), output_hidden_states=True)
        assert torch.equal(backbone.logits(hidden.states), expected.logits)
    assert torch.equal(hidden.states, expected.hidden_states[-1])
    assert torch.equal(hidden.mask, mask)
    assert torch.equal(backbone.context.token_mask, mask)
    assert torch.equal(backbone.context.tokens, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_and_the_causal_flag_says_who_sees_whom(family):
    backbone = small(family)
    tokens, mask = backbone.example()
    with torch.no_grad():
        together = backbone(tokens, mask).states
        alone = backbone(tokens[1:, :3], mask[1:, :3]).states
        assert torch.allclose(together[1, :3], alone[0], atol=1e-6)
        assert torch.equal(backbone(tokens[:1]).states, backbone(tokens[:1], mask[:1]).states)
        other = tokens.clone()
        other[0, 4] = (tokens[0, 4] + 7) % 40
        assert torch.equal(backbone(other, mask).states[0, :4], together[0, :4]) is backbone.causal


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_where_they_say(family):
    backbone = small(family)
    sites = backbone.sites()
    assert all(backbone.get_submodule(site.path) is site.module for site in sites)
    assert len({site.key for site in sites}) == len(sites)
    assert sites.depth == 3
    count = {role: sum(site.role == role for site in sites) for role in sites.roles}
    for role in ("block", "attention", "attention.output", "mlp.up", "mlp.down"):
        assert count[role] == 3
    assert count["model"] == 1
    assert count.get("attention.qkv", count.get("attention.query")) == 3
    assert all(site.width == site.weight.shape[0] for site in sites if site.parameter and site.role != "embedding")
    covered = {(id(s.module), s.parameter) for s in sites if s.parameter}
    covered |= {(id(b.module), b.parameter) for s in sites if s.parameter and (b := s.bias)}
    everything = {(id(m), name) for m in backbone.model.modules() for name, p in m._parameters.items() if p is not None}
    assert everything == covered  # every weight of the model can be adapted


def test_the_order_of_the_last_blocks_and_the_final_norm():
    llama, bert = small("llama").sites(), small("bert").sites()
    assert [s.path for s in llama.select("norm", tags="final")] == ["model.norm"]
    assert [s.path for s in llama.select("attention.query", "last 2")] == [
        "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj",
    ]  # fmt: skip
    assert {s.tags for s in bert if s.role == "embedding"} == {("tokens",), ("positions",), ("segments",)}
    assert bert.select("attention", 0)[0].tags == ("residual",)
    with pytest.raises(RequestError, match="no site with role 'mlp'"):
        bert.select("mlp")


def test_rows_of_bloom_are_those_of_query_key_and_value_of_each_head():
    """They lie head by head, so no range of rows is the query: only the whole projection is a site."""
    backbone = small("bloom")
    fused = backbone.sites().select("attention.qkv", 0)[0].module(torch.randn(1, 4, 16))
    heads = fused.unflatten(-1, (2, 3, 8))
    for index, part in enumerate(backbone.model.h[0].self_attention._reshape(fused)):
        assert torch.equal(part, heads[:, :, :, index].transpose(1, 2))


@pytest.mark.parametrize("family", ["llama", "bert", "bloom", "opt", "gptj"])
def test_full_training_reaches_every_weight(family):
    """No part of the model is built that the forward does not use."""
    model = adapt(small(family), Full())
    tokens, mask = model.backbone.example()
    model(tokens, mask).states.square().sum().backward()
    assert [n for n, p in model.trainable().items() if p.grad is None] == []


def test_the_pooler_is_a_dense_layer_and_tanh_on_the_first_token():
    backbone = small("bert", pooler=True)
    hidden = backbone(*backbone.example())
    expected = backbone.model.pooler.dense(hidden.states[:, 0]).tanh()
    assert torch.equal(hidden.pooled, expected)
    assert small("bert")(*backbone.example()).pooled is None


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_weights_come_back_from_a_folder_and_a_file(family, lm_head, tmp_path):
    first = small(family, lm_head=True, seed=5)
    library_model(family, 5).save_pretrained(tmp_path)
    again = TransformersText(name=family, checkpoint=str(tmp_path), lm_head=lm_head)
    file = TransformersText(
        name=family, checkpoint=str(tmp_path / "model.safetensors"), config=SMALL | MORE[family], lm_head=lm_head
    )
    tokens, mask = first.example()
    for other in (again, file):
        assert torch.equal(other(tokens, mask).states, first(tokens, mask).states)
        assert other.source.startswith("file: ")
        assert not any(module.training for module in other.model.modules())
        if lm_head:
            assert torch.allclose(other.logits(torch.ones(1, 16)), first.logits(torch.ones(1, 16)), atol=1e-6)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    library_model("llama", 0).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    file, config = tmp_path / "part.safetensors", SMALL | MORE["llama"]
    save_file({n: t for n, t in state.items() if "layers.1.mlp.up_proj" not in n}, file, {"format": "pt"})
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        TransformersText(name="llama", checkpoint=str(file), config=config)
    with pytest.raises(RequestError, match=r"\(24, 16\) for \(32, 16\)"):
        TransformersText(name="llama", checkpoint=str(tmp_path), config={"intermediate_size": 32})
    save_file(state, file, {"format": "pt"})
    with pytest.raises(RequestError, match=r"layers\.2\..* has no place"):
        TransformersText(name="llama", checkpoint=str(file), config=config | {"num_hidden_layers": 2})
    bad = {n: t.clone() for n, t in state.items()}
    bad["model.norm.weight"][0] = float("nan")
    save_file(bad, file, {"format": "pt"})
    with pytest.raises(RequestError, match="not finite"):
        TransformersText(name="llama", checkpoint=str(file), config=config)


def test_the_precision_is_that_of_the_weights():
    backbone = small("llama", dtype="bfloat16")
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert backbone(*backbone.example()).states.dtype == torch.bfloat16


def test_eager_attention_can_be_differentiated_twice():
    backbone = small("llama", attention="eager")
    scale = torch.ones((), requires_grad=True)
    tokens, mask = backbone.example()
    handle = backbone.model.embed_tokens.register_forward_hook(lambda module, args, out: out * scale)
    (first,) = torch.autograd.grad(backbone(tokens, mask).states.square().sum(), scale, create_graph=True)
    (second,) = torch.autograd.grad(first, scale)
    handle.remove()
    assert torch.isfinite(second)
    assert second != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gpt2", "weights": "random"}, "no family and no published name known here"),
        ({"name": "roberta-bose", "weights": "random"}, "nearest: 'roberta-base'"),
        ({"name": "some/model", "weights": "random"}, "where there is a network run `hf download some/model"),
        ({"name": "roberta-base"}, "where there is a network run `hf download FacebookAI/roberta-base"),
        ({"name": "llama", "weights": "random", "config": {"hiden_size": 8}}, "no 'hiden_size'; nearest: 'hidden_"),
        ({"name": "llama", "weights": "random", "config": {**SMALL, "hidden_size": 15}}, "refuses .*: The hidden size"),
        ({"name": "opt", "weights": "random", "config": {**SMALL, "hidden_size": 15}}, "refuses this configuration"),
        ({"name": "llama", "weights": "random", "checkpoint": "x"}, "exclude each other"),
        ({"name": "llama", "checkpoint": "nowhere"}, "checkpoint nowhere: no such file or folder"),
        ({"name": "llama", "weights": "random", "pooler": True}, "a pooler comes with BERT"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RequestError, match=message) as caught:
        TransformersText(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "longest"), [("bert", 16), ("roberta", 14), ("opt", 16), ("bloom", None)])
def test_the_longest_text_is_the_longest_that_runs(family, longest):
    backbone = small(family)
    assert backbone.longest == longest
    tokens = torch.full((1, longest or 40), 5)
    assert backbone(tokens).states.shape == (1, longest or 40, 16)
    if longest is not None:
        with pytest.raises((IndexError, RuntimeError)):
            backbone(torch.full((1, longest + 1), 5))


def test_logits_need_the_head():
    with pytest.raises(RequestError, match=r"backbone\.lm_head=true"):
        small("llama").logits(torch.ones(1, 16))


def test_a_copy_is_independent():
    backbone = small("llama", lm_head=True)
    twin = copy.deepcopy(backbone)
    tokens, mask = backbone.example()
    expected = backbone(tokens, mask).states
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert torch.equal(backbone(tokens, mask).states, expected)
