"""Bottlenecks of AdapterHub: folders written by hand in its layout, against its computation written out.

Its library asks for an older transformers, so it is not installed beside.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from modalities.language.backbones import TransformersText
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.interop import export_adapter, import_adapter
from tests.shared.hosts import HOSTS, SMALL_TEXT

TOKENS = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))
WIDTH = SMALL_TEXT["hidden_size"]
HOULSBY = {
    "mh_adapter": True, "output_adapter": True, "original_ln_before": False, "original_ln_after": True,
    "residual_before_ln": True, "adapter_residual_before_ln": False, "ln_before": False, "ln_after": False,
    "non_linearity": "swish", "reduction_factor": 4, "is_parallel": False, "scaling": 1.0, "use_gating": False,
    "inv_adapter": None, "phm_layer": False, "cross_adapter": False, "leave_out": [], "dropout": 0.0,
}  # fmt: skip
PFEIFFER = HOULSBY | {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
PARALLEL = HOULSBY | {
    "mh_adapter": False, "is_parallel": True, "non_linearity": "relu", "scaling": 4.0, "reduction_factor": 2,
}  # fmt: skip
CONFIGS = {
    "houlsby": HOULSBY,
    "pfeiffer": PFEIFFER,
    "pfeiffer_both": PFEIFFER | {"mh_adapter": True, "non_linearity": "gelu"},
    "parallel": PARALLEL,
    "parallel_both": PARALLEL | {"mh_adapter": True},
    "behind_the_norm": PFEIFFER | {"original_ln_after": False, "residual_before_ln": False},
    "left_out": PFEIFFER | {"leave_out": [0]},
    "widths": PFEIFFER | {"reduction_factor": {"1": 2, "default": 8}},
    "learned": HOULSBY | {"scaling": "learned", "non_linearity": "leakyrelu"},
    "channel": PFEIFFER | {"scaling": "channel", "non_linearity": "gelu_new"},
}
FUNCTIONS = {
    "relu": torch.relu, "swish": F.silu, "gelu": F.gelu, "leakyrelu": F.leaky_relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
JSON = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.lists(st.integers(0, 1), max_size=2)


def text(family: str = "bert") -> TransformersText:
    torch.manual_seed(5)
    if family == "bert":
        return HOSTS["bert"]()[0].eval()
    shape = {**SMALL_TEXT, "intermediate_size": 24, "max_position_embeddings": 20}
    return TransformersText(name=family, weights="random", config=shape).eval()


def tensors(config: dict, family: str = "bert", name: str = "sst") -> dict[str, Tensor]:
    """The adapter's tensors as its library names them."""
    torch.manual_seed(6)
    state = {}
    for block in range(SMALL_TEXT["num_hidden_layers"]):
        if block in config["leave_out"]:
            continue
        factor = config["reduction_factor"]
        factor = factor.get(str(block), factor["default"]) if isinstance(factor, dict) else factor
        for part, on in (("attention.output", "mh_adapter"), ("output", "output_adapter")):
            if not config[on]:
                continue
            stem, inner = f"{family}.encoder.layer.{block}.{part}.adapters.{name}", WIDTH // factor
            state[f"{stem}.adapter_down.0.weight"] = torch.randn(inner, WIDTH) * 0.4
            state[f"{stem}.adapter_down.0.bias"] = torch.randn(inner) * 0.4
            state[f"{stem}.adapter_up.weight"] = torch.randn(WIDTH, inner) * 0.4
            state[f"{stem}.adapter_up.bias"] = torch.randn(WIDTH) * 0.4
            if config["scaling"] in ("learned", "channel"):
                state[f"{stem}.scaling"] = torch.randn(1 if config["scaling"] == "learned" else WIDTH)
    return state


def written(folder, config: dict, state: dict[str, Tensor], **more) -> None:
    folder.mkdir(exist_ok=True)
    whole = {
        "config": config, "hidden_size": WIDTH, "model_class": "BertModel", "model_name": "bert-base-uncased",
        "model_type": "bert", "name": "sst", "version": "adapters.1.2.0", **more,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    torch.save(state, folder / "pytorch_adapter.bin")


def adapter(state: dict[str, Tensor], stem: str, config: dict, x: Tensor) -> Tensor:
    """Down, non-linearity, up, times the scale; without a residual."""
    down = x @ state[f"{stem}.adapter_down.0.weight"].T + state[f"{stem}.adapter_down.0.bias"]
    up = FUNCTIONS[config["non_linearity"]](down) @ state[f"{stem}.adapter_up.weight"].T
    up = up + state[f"{stem}.adapter_up.bias"]
    return up * (state[f"{stem}.scaling"] if isinstance(config["scaling"], str) else config["scaling"])


def sublayer(state, stem: str, config: dict, hidden: Tensor, stream: Tensor, norm) -> Tensor:
    """What its library computes of a sub-layer's output: before the adapter, the adapter, after it."""
    if f"{stem}.adapter_up.weight" not in state:
        return norm(hidden + stream)
    if config["is_parallel"]:
        hidden = adapter(state, stem, config, stream) + hidden
        return norm(hidden + stream)
    residual = hidden
    if config["original_ln_before"]:
        hidden = norm(hidden + stream)
    if not config["residual_before_ln"]:
        residual = hidden
    hidden = adapter(state, stem, config, hidden) + residual
    return norm(hidden + stream) if config["original_ln_after"] else hidden


@torch.no_grad()
def expected(backbone: TransformersText, state: dict[str, Tensor], config: dict) -> Tensor:
    """The states of the whole model, block by block."""
    family = backbone.config.model_type
    x = backbone.model.embeddings(input_ids=TOKENS)
    for index, block in enumerate(backbone.model.encoder.layer):
        stem = f"{family}.encoder.layer.{index}"
        attended = block.attention.output.dense(block.attention.self(x)[0])
        norm = block.attention.output.LayerNorm
        x = sublayer(state, f"{stem}.attention.output.adapters.sst", config, attended, x, norm)
        inner = block.output.dense(block.intermediate(x))
        x = sublayer(state, f"{stem}.output.adapters.sst", config, inner, x, block.output.LayerNorm)
    return x


@torch.no_grad()
def states(model) -> Tensor:
    return model(TOKENS).states


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_computation_is_that_of_its_library(case, family, tmp_path):
    config, backbone = CONFIGS[case], text(family)
    state = tensors(config, family)
    written(tmp_path, config, state)
    bare = states(backbone)
    assert torch.allclose(expected(backbone, {}, config), bare, atol=1e-5)
    wanted = expected(backbone, state, config)
    model = Adapted(backbone)
    import_adapter(model, tmp_path)
    assert not torch.allclose(wanted, bare, atol=1e-2)
    assert torch.allclose(states(model), wanted, atol=1e-5)
    model.save(tmp_path / "ours.safetensors")
    again = Adapted(text(family))
    import_adapter(again, tmp_path / "ours.safetensors")
    assert torch.equal(states(again), states(model))
    assert again.count()["adapter"] == sum(t.numel() for t in state.values()) - (WIDTH * 2 if case == "channel" else 0)
    model.remove()
    assert torch.equal(states(backbone), bare)


def test_older_names_other_files_and_old_activations(tmp_path):
    config = HOULSBY | {"non_linearity": "gelu"}  # "gelu" of files without a version is the tanh form
    state = tensors(config)
    wanted = expected(text(), state, config | {"non_linearity": "gelu_new"})
    old = {
        n.replace("attention.output.adapters", "attention.output.attention_text_task_adapters")
        .replace("output.adapters", "output.layer_text_task_adapters"): t
        for n, t in state.items()
    }  # fmt: skip
    written(tmp_path, config, old)
    file = tmp_path / "adapter_config.json"
    whole = json.loads(file.read_text())
    del whole["version"]
    file.write_text(json.dumps(whole))
    (tmp_path / "head_config.json").write_text("{}")  # a prediction head beside it is left alone
    model = Adapted(text())
    import_adapter(model, tmp_path)
    assert torch.allclose(states(model), wanted, atol=1e-5)
    (tmp_path / "pytorch_adapter.bin").unlink()
    save_file(old, tmp_path / "adapter.safetensors")
    again = Adapted(text())
    import_adapter(again, tmp_path, format="adapterhub")
    assert torch.equal(states(again), states(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PFEIFFER | {"ln_before": True}, "ln_before True is not supported"),
        (PFEIFFER | {"ln_after": True}, "ln_after True"),
        (PFEIFFER | {"use_gating": True}, "use_gating"),
        (PFEIFFER | {"phm_layer": True}, "phm_layer"),
        (PFEIFFER | {"inv_adapter": "nice"}, "inv_adapter 'nice'"),
        (PFEIFFER | {"invertible_adapter": {"block_type": "nice"}}, "invertible_adapter"),
        (PFEIFFER | {"residual_before_ln": "post_add"}, "residual_before_ln 'post_add' is not supported"),
        (PFEIFFER | {"residual_before_ln": False}, "serial with original_ln_before True, original_ln_after True"),
        (PARALLEL | {"original_ln_after": False}, "parallel with"),
        (PFEIFFER | {"non_linearity": "mish"}, "non_linearity 'mish'"),
        (PFEIFFER | {"scaling": "magic"}, "scaling 'magic'"),
        (PFEIFFER | {"output_adapter": False}, "no bottleneck"),
        ({"architecture": "lora", "r": 8}, "architecture 'lora'"),
        ("pfeiffer", "no mapping of settings but 'pfeiffer'"),
        (PFEIFFER | {"mh_adapter": True}, "lacks the adapter of block 0 attention"),
        (PFEIFFER | {"leave_out": [1]}, "also has the adapter of block 1 mlp"),
    ],
)
def test_settings_that_cannot_be_had(config, message, tmp_path):
    written(tmp_path, config, tensors(PFEIFFER))
    refused(tmp_path, message)


def refused(folder, message: str, family: str = "bert") -> None:
    model = Adapted(text(family) if family != "llama" else HOSTS["llama"]()[0])
    with pytest.raises(RequestError, match=message) as error:
        import_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert not model.methods


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(HOULSBY)), JSON)
def test_any_setting_is_read_or_refused_in_one_line(written_once, setting, value):
    folder, model, said = written_once, Adapted(text()), ""
    whole = json.loads((folder / "adapter_config.json").read_text())
    whole["config"] = PFEIFFER | {setting: value}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    try:
        import_adapter(model, folder)
    except (RequestError, WorkError) as error:  # a scaling of zero has no effect
        said = str(error)
    assert "\n" not in said
    assert bool(said) != bool(model.methods)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    written(folder, PFEIFFER, tensors(PFEIFFER))
    return folder


STEM = "bert.encoder.layer.0.output.adapters.sst."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({STEM + "gate.weight": torch.ones(1)}), "gate.weight is no tensor of a plain bottleneck"),
        (lambda s: s.update({STEM.replace("sst", "b") + "adapter_up.bias": torch.ones(16)}), "two adapters in block 0"),
        (lambda s: s.pop(STEM + "adapter_up.bias"), "block 0 mlp: up.bias is absent"),
        (lambda s: s.update({STEM + "adapter_up.weight": torch.ones(16, 5)}), "up.weight is .16, 5., not .16, 4."),
        (lambda s: s.update({STEM.replace(".0.", ".5.") + "adapter_up.bias": torch.ones(16)}), "block 5"),
        (lambda s: s.update({STEM + "adapter_up.bias": torch.full((16,), torch.inf)}), "not finite"),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    state = tensors(PFEIFFER)
    change(state)
    written(tmp_path, PFEIFFER, state)
    refused(tmp_path, message)


def test_files_that_are_absent_damaged_or_for_another_model(tmp_path):
    written(tmp_path, PFEIFFER, tensors(PFEIFFER))
    refused(tmp_path, "for BERT and RoBERTa", "llama")
    torch.save({"x": object()}, tmp_path / "pytorch_adapter.bin")
    refused(tmp_path, "more than tensors")
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"\x80")
    refused(tmp_path, "it cannot be read|more than tensors")
    (tmp_path / "pytorch_adapter.bin").unlink()
    refused(tmp_path, "it holds no pytorch_adapter.bin")


def test_it_is_not_written(tmp_path):
    written(tmp_path, PFEIFFER, tensors(PFEIFFER))
    model = Adapted(text())
    import_adapter(model, tmp_path)
    with pytest.raises(RequestError, match="acts on activations at model.encoder.layer.0.output.LayerNorm"):
        export_adapter(model, tmp_path / "x", format="peft")
