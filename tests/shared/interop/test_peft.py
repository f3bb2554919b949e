"""Adapters of peft: what its own models compute with the files it saves, and what they compute with ours."""

from __future__ import annotations

import copy
import json
import math
import re

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.adapted import Adapted, adapt
from shared.errors import RequestError
from shared.interop import export_adapter, import_adapter
from shared.interop.changes import Change, alpha_of
from shared.methods import DoRA, Imported, LoRA
from tests.shared.hosts import HOSTS

# peft asks transformers by a name it is to lose; it tells what it does with tables, and that changes stay unmerged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
]
TOKENS = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
ALL = ("attention.query", "attention.value", "attention.output", "mlp.up", "mlp.down")


class Small(nn.Module):
    """An embedding, convolutions, a linear layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 8, 1))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.table(tokens).unflatten(1, (3, 2)).permute(0, 3, 1, 2)).flatten(2).mT
        return self.out(self.attention(x, x, x, need_weights=False)[0])


WORDS = TOKENS % 12


def small() -> Small:
    torch.manual_seed(5)
    return Small().eval()


def text(family: str):
    """Our backbone, and the library's model alone with the same weights."""
    torch.manual_seed(5)
    backbone = HOSTS[family]()[0].eval()
    return backbone, copy.deepcopy(backbone.model)


def saved(model: nn.Module, config, folder):
    """peft's model with its changes drawn anew and saved."""
    theirs = peft.get_peft_model(model, config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2) if "bias" in name else p.copy_(torch.randn_like(p) * 0.3)
    theirs.save_pretrained(folder)
    return theirs


def once(theirs):
    """peft's model, which adds the change of an attention's output projection twice (its pull request 3774), mended."""
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.layer.MultiheadAttention):
            for name in module.base_layer.out_proj.scaling:
                module.base_layer.out_proj.scaling[name] /= 2
    return theirs


def states(model, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, Tensor) else output[0]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-5)


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {},
    "biases": {"bias": "lora_only"},
    "all_biases": {"bias": "all"},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True, "use_rslora": True, "bias": "lora_only"},
}
PATTERNS = {
    "llama": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "v_proj": 9}},
    "bert": {"rank_pattern": {"query": 5}, "alpha_pattern": {"^encoder.layer.1.output.dense": 3, "value": 9}},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_peft_saves_computes_the_same_here(family, case, tmp_path):
    backbone, theirs = text(family)
    targets = ["q_proj", "v_proj", "down_proj"] if family == "llama" else ["query", "value", "output.dense"]
    options = CONFIGS[case] or (PATTERNS[family] if case == "patterns" else {})
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    theirs = saved(theirs, config, tmp_path)
    bare = states(backbone)
    model = Adapted(backbone)
    import_adapter(model, tmp_path)
    assert not close(states(model), bare)
    assert close(states(model), states(theirs))
    ranks = {c["shapes"]["down"][0] for c in model.methods["default"].changes.values() if c["kind"] == "low_rank"}
    assert ranks == ({3, 5} if case == "patterns" else {3})
    model.remove()
    assert torch.equal(states(backbone), bare)


def test_scales_are_those_of_peft(tmp_path):
    _, theirs = text("llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 10}
    )
    saved(theirs, config, tmp_path)
    model = Adapted(text("llama")[0])
    import_adapter(model, tmp_path)
    scales = {key.rpartition("/")[2]: c["scale"] for key, c in model.methods["default"].changes.items()}
    assert scales == {"q_proj": 6 / math.sqrt(4), "v_proj": 10 / math.sqrt(4)}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=3, lora_alpha=4, target_modules=["table", "body.0", "body.2", "attention", "out"]),
        peft.LoraConfig(r=20, lora_alpha=4, target_modules=["body.2", "out"]),
        peft.LoraConfig(r=3, lora_alpha=4, target_modules=["table", "body.0", "body.2", "out"], use_dora=True),
        peft.LoHaConfig(r=3, alpha=4, target_modules=["body.0", "body.2", "out"]),
        peft.LoHaConfig(r=3, alpha=4, target_modules=["body.0", "out"], use_effective_conv2d=True),
        peft.LoKrConfig(r=2, alpha=5, target_modules=["body.0", "body.2", "out"]),
        peft.LoKrConfig(r=1, alpha=5, target_modules=["body.0", "out"], decompose_both=True, use_effective_conv2d=True),
        peft.LoKrConfig(r=2, alpha=5, target_modules=["out"], rank_pattern={"out": 1}, alpha_pattern={"out": 3}),
    ],
    ids=["every_layer", "rank_above_the_sides", "dora", "loha", "loha_core", "lokr", "lokr_core", "lokr_patterns"],
)  # fmt: skip
def test_layers_of_every_kind_and_lycoris_in_peft(config, tmp_path):
    theirs = once(saved(small(), config, tmp_path))
    model = Adapted(small())
    import_adapter(model, tmp_path, example=(WORDS,))
    assert not close(states(model, WORDS), states(small(), WORDS))
    assert close(states(model, WORDS), states(theirs, WORDS))


@pytest.mark.parametrize("family", ["llama", "small"])
def test_magnitudes_go_there_and_back_bit_for_bit(family, tmp_path):
    """Of linear layers, convolutions and a table; through a file of ours too."""
    fresh, tokens = (small, WORDS) if family == "small" else (lambda: text("llama")[0], TOKENS)
    targets = ["table", "body.0", "body.2", "out"] if family == "small" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True)
    library = fresh() if family == "small" else text("llama")[1]
    theirs = saved(library, config, tmp_path / "a")
    model, again = Adapted(fresh()), Adapted(fresh())
    import_adapter(model, tmp_path / "a", example=(tokens,))
    export_adapter(model, tmp_path / "b", format="peft")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    loaded = peft.PeftModel.from_pretrained(fresh() if family == "small" else text("llama")[1], tmp_path / "b").eval()
    assert torch.equal(states(loaded, tokens), states(theirs, tokens))
    model.save(tmp_path / "ours.safetensors")
    import_adapter(again, tmp_path / "ours.safetensors", example=(tokens,))
    assert torch.equal(states(again, tokens), states(model, tokens))
    bare = states(fresh(), tokens)
    again.merge()
    assert torch.equal(states(again, tokens), states(model, tokens))
    again.unmerge()
    again.remove()
    assert torch.equal(states(again.backbone, tokens), bare)


def test_our_dora_computes_the_same_in_peft(tmp_path):
    backbone, theirs = text("llama")
    model = perturbed(adapt(backbone, DoRA(rank=2, alpha=3, dropout=0.1)))
    export_adapter(model, tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    assert close(states(peft.PeftModel.from_pretrained(theirs, tmp_path).eval()), states(model))
    model.add(LoRA(rank=2, roles="attention.output"), name="other")
    model.activate("default", "other")
    with pytest.raises(RequestError, match="o_proj has no magnitude .DoRA., others have"):
        export_adapter(model, tmp_path / "x", format="peft")
    model.activate("default", strength=0.5)
    with pytest.raises(RequestError, match="Decomposed at .* is no low-rank change"):
        export_adapter(model, tmp_path / "x", format="peft")
    assert not (tmp_path / "x").exists()


def perturbed(model: Adapted) -> Adapted:
    torch.manual_seed(3)
    with torch.no_grad():
        for name in model.active:
            for p in model.bank[name].parameters():
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.mark.parametrize("host", ["llama", "bert", "bloom", "vit", "clip"])
def test_what_we_write_computes_the_same_in_peft(host, tmp_path):
    torch.manual_seed(5)
    backbone, inputs, sites = HOSTS[host]()
    roles = [role for role in (*ALL, "attention.qkv") if role in sites.roles]
    if host in ("vit", "clip"):
        roles = ["attention.query", "attention.value", "attention.output", "mlp.down"]
    library = backbone.model if hasattr(backbone, "model") else backbone.tower
    bare_state = {name: t.clone() for name, t in library.state_dict().items()}
    model = perturbed(adapt(backbone, LoRA(rank=2, alpha=3, roles=roles, depth="first 2")))
    paths = export_adapter(model, tmp_path, format="peft")
    assert {p.name for p in paths} == {"adapter_config.json", "adapter_model.safetensors"}

    inside = (inputs[0], inputs[1].long()) if host in ("llama", "bert", "bloom") else inputs
    call = (lambda m: m(inside[0], attention_mask=inside[1])) if len(inputs) > 1 else (lambda m: m(*inside))
    ours = states(lambda _: call(library))
    model.remove()
    assert all(torch.equal(bare_state[name], t) for name, t in library.state_dict().items())
    bare = states(lambda _: call(library))
    theirs = once(peft.PeftModel.from_pretrained(library, tmp_path).eval())
    again = states(lambda _: call(theirs.base_model.model))
    assert not close(ours, bare)
    assert close(again, ours)
    loaded, file = peft.get_peft_model_state_dict(theirs), load_file(tmp_path / "adapter_model.safetensors")
    assert loaded.keys() == file.keys()
    assert all(torch.equal(loaded[name], t) for name, t in file.items())


def test_a_round_trip_is_exact_bit_for_bit(tmp_path):
    backbone, _ = text("llama")
    model = perturbed(adapt(backbone, LoRA(rank=3, alpha=7, roles=ALL)))
    export_adapter(model, tmp_path / "a", format="peft")
    before = states(model)
    again = Adapted(text("llama")[0])
    import_adapter(again, tmp_path / "a")
    assert torch.equal(states(again), before)
    export_adapter(again, tmp_path / "b", format="peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again.save(tmp_path / "ours.safetensors")  # and through a file of ours, by import and by the method it names
    third = Adapted(text("llama")[0])
    import_adapter(third, tmp_path / "ours.safetensors")
    assert torch.equal(states(third), before)
    fourth = adapt(text("llama")[0], Imported(**again.methods["default"].arguments()))
    fourth.load(tmp_path / "ours.safetensors")
    assert torch.equal(states(fourth), before)


@given(st.integers(1, 512), st.floats(2**-10, 2**10, width=32))
def test_alpha_gives_the_scale_again(rank, alpha):
    change = Change("low_rank", {"down": torch.empty(rank, 1)}, alpha / rank)
    assert alpha_of(change) / rank == change.scale
    assert alpha_of(Change("low_rank", change.tensors, 3 * rank / rank)) == 3 * rank


def test_a_file_of_ours_is_for_its_backbone(tmp_path):
    model = perturbed(adapt(text("llama")[0], LoRA(rank=3, roles="mlp.up")))
    model.save(tmp_path / "a.safetensors")
    same, other = Adapted(text("llama")[0]), Adapted(text("bert")[0])
    import_adapter(same, tmp_path / "a.safetensors", name="x")
    assert torch.equal(states(same), states(model))
    assert isinstance(same.methods["x"], LoRA)
    with pytest.raises(RequestError, match="made for backbone llama with fingerprint"):
        import_adapter(other, tmp_path / "a.safetensors")
    assert not other.methods


def test_biases_go_there_and_back(tmp_path):
    _, theirs = text("bert")
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only")
    theirs = saved(theirs, config, tmp_path / "a")
    model = Adapted(text("bert")[0])
    import_adapter(model, tmp_path / "a")
    export_adapter(model, tmp_path / "b", format="peft")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    loaded = peft.PeftModel.from_pretrained(text("bert")[1], tmp_path / "b").eval()
    assert torch.equal(states(loaded), states(theirs))


def test_several_adapters_become_one_of_added_rank(tmp_path):
    backbone, theirs = text("llama")
    model = perturbed(adapt(backbone, LoRA(rank=2, roles="mlp.down")))
    model.add(LoRA(rank=3, alpha=1, roles="mlp.down"), name="other")
    perturbed(model)
    model.activate("default", "other", strength={"other": 0.5})
    export_adapter(model, tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
    assert close(states(peft.PeftModel.from_pretrained(theirs, tmp_path).eval()), states(model))


def test_a_model_with_its_head_has_the_names_of_the_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    from modalities.language.backbones import TransformersText
    from tests.shared.hosts import SMALL_TEXT

    shape = {**SMALL_TEXT, "intermediate_size": 24, "num_key_value_heads": 1}
    backbone = TransformersText(name="llama", weights="random", config=shape, lm_head=True)
    whole = AutoModelForCausalLM.from_config(backbone.config).eval()
    whole.model.load_state_dict(backbone.model.state_dict())
    whole.lm_head.load_state_dict(backbone.lm_head.state_dict())
    model = perturbed(adapt(backbone, LoRA(rank=2)))
    export_adapter(model, tmp_path / "a", format="peft")
    assert all(
        n.startswith("base_model.model.model.layers.") for n in load_file(tmp_path / "a/adapter_model.safetensors")
    )
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(whole, tmp_path / "a").eval()
    assert close(states(theirs), backbone.logits(model(TOKENS).states).detach())
    export_adapter(model, tmp_path / "b", format="peft", prefix="")
    assert all(n.startswith("base_model.model.layers.") for n in load_file(tmp_path / "b/adapter_model.safetensors"))


def test_layers_whose_last_words_others_share_are_named_whole(tmp_path):
    backbone, theirs = text("llama")
    model = perturbed(adapt(backbone, LoRA(rank=2, roles="mlp.up", depth=1)))
    export_adapter(model, tmp_path, format="peft")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert re.fullmatch(targets, "layers.1.mlp.up_proj")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert set(loaded.targeted_module_names) == {"layers.1.mlp.up_proj"}
    assert close(states(loaded), states(model))
