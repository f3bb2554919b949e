"""What of peft's files is refused, in one line that names it, and leaves the model as it was."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from shared.adapted import Adapted, adapt
from shared.errors import RequestError
from shared.interop import export_adapter, import_adapter
from shared.methods import AdaptFormer, BitFit, LoRA
from tests.shared.hosts import HOSTS
from tests.shared.interop.test_peft import saved, states, text

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    saved(text("llama")[1], peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), tmp_path)
    return tmp_path


def refused(folder, message: str, **options):
    backbone, _ = text("llama")
    bare, model = states(backbone), Adapted(backbone)
    with pytest.raises(RequestError, match=message) as error:
        import_adapter(model, folder, **options)
    assert "\n" not in str(error.value)
    assert not model.methods
    assert torch.equal(states(backbone), bare)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True), ("lora_bias", True), ("layer_replication", [[0, 1]]), ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1]), ("init_lora_weights", "pissa"), ("peft_type", "IA3"), ("lora_alpha", "many"),
        ("alpha_pattern", {"(": 3}), ("rank_pattern", [1]), ("peft_type", None), ("peft_type", "LOHA"),
        ("peft_type", ["LORA"]),
    ],
)  # fmt: skip
def test_settings_that_mean_another_computation(folder, setting, value):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    refused(
        folder,
        {"many": "alpha 'many'", "{'(': 3}": "is no scale", "LOHA": "low_rank change in a LOHA"}.get(
            str(value), setting
        ),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["0", ".*", "("]), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    saved(nn.Sequential(nn.Linear(4, 5)), peft.LoraConfig(r=3, target_modules=["0"]), folder)
    return folder, json.loads((folder / "adapter_config.json").read_text())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_setting_is_read_or_refused_in_one_line(one, data):
    folder, config = one
    setting = data.draw(st.sampled_from(sorted(config)))
    (folder / "adapter_config.json").write_text(json.dumps(config | {setting: data.draw(JSON)}))
    model, said = Adapted(nn.Sequential(nn.Linear(4, 5))), ""
    try:
        import_adapter(model, folder)
    except RequestError as error:
        said = str(error)
    assert "\n" not in said
    assert bool(said) != bool(model.methods)
    assert all(math.isfinite(change["scale"]) for m in model.methods.values() for change in m.changes.values())


def rewritten(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


FIRST = "base_model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({FIRST.replace(".0.", ".7.") + "A.weight": torch.ones(3, 16)}), "layers.7.*no module"),
        (lambda s: s.pop(FIRST + "B.weight"), "q_proj lacks up"),
        (lambda s: s.update({FIRST + "A.weight": torch.ones(3, 9)}), "layers/0/self_attn/q_proj.*down .3, 9"),
        (lambda s: s.update({FIRST + "B.weight": torch.ones(16, 4)}), "up .4, 16.* do not make its matrix"),
        (lambda s: s.update({FIRST + "B.weight": torch.full((16, 3), torch.nan)}), "not finite"),
        (lambda s: s.update({"base_model.model.score.weight": torch.ones(2, 16)}), "score.weight"),
        (lambda s: s.update({FIRST + "magnitude_vector": torch.ones(16)}), "has a magnitude .DoRA., but use_dora is F"),
        (lambda s: [s.pop(n) for n in list(s)] and s.update(x=torch.ones(1)), "none of them of a LORA adapter"),
        (lambda s: s.update({n.replace("layers", "blocks"): s.pop(n) for n in list(s)}), "0 of its 4 modules fit"),
        (lambda s: s.update({"base_model.model.q_proj" + n[-14:]: s.pop(n) for n in list(s)}), "names 2 mod"),
    ],
    ids=["depth", "half", "columns", "rank", "nan", "left_over", "dora", "foreign", "other_model", "two"],
)  # fmt: skip
def test_tensors_that_do_not_fit(folder, change, message):
    rewritten(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    ("magnitude", "message"),
    [
        (None, "q_proj lacks its magnitude .DoRA., but use_dora is True"),
        (torch.ones(15), "q_proj: its magnitude is .15,., wanted .16,."),
        (torch.ones(4, 4), "q_proj: its magnitude .DoRA. is .4, 4.: no vector"),
        (torch.tensor(1.0), "no vector"),
        (torch.ones(0), "its magnitude is .0,."),
        (torch.full((16,), torch.nan), "not finite"),
    ],
)
def test_magnitudes_that_do_not_fit(tmp_path, magnitude, message):
    saved(text("llama")[1], peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True), tmp_path)
    name = FIRST + "magnitude_vector"
    rewritten(tmp_path, lambda s: s.pop(name) if magnitude is None else s.update({name: magnitude}))
    refused(tmp_path, message)


def test_a_magnitude_alone(tmp_path):
    saved(text("llama")[1], peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), tmp_path)
    rewritten(tmp_path, lambda s: [s.pop(n) for n in list(s) if n.startswith(FIRST) and "magnitude" not in n])
    refused(tmp_path, "q_proj holds a magnitude alone: no change of one kind")


def test_files_that_are_damaged_or_absent(folder):
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read as plain tensors")
    file.write_bytes(b"")
    refused(folder, "cannot be read as plain tensors")
    file.unlink()
    refused(folder, "it holds no adapter_model.safetensors")
    file.write_bytes(whole)
    refused(file, "give its folder")
    file.rename(folder / "other.safetensors")
    refused(folder / "other.safetensors", "a file of peft's: give its folder")
    (folder / "other.safetensors").rename(file)
    config.write_text("{")
    refused(folder, "not JSON")
    config.write_text("[]")
    refused(folder, "wants a mapping")
    config.write_text("{}")
    refused(folder, "neither peft's")
    config.unlink()
    refused(folder, "no adapter known here")
    refused(folder / "nowhere", "no such file")


def test_the_older_torch_file(folder):
    state = load_file(folder / "adapter_model.safetensors")
    whole, again = Adapted(text("llama")[0]), Adapted(text("llama")[0])
    import_adapter(whole, folder)
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    import_adapter(again, folder)
    assert torch.equal(states(again), states(whole))


def test_a_head_is_left_out_on_request(folder):
    rewritten(folder, lambda s: s.update({"base_model.model.score.weight": torch.ones(2, 16)}))
    model = Adapted(text("llama")[0])
    import_adapter(model, folder, skip=("score",))
    assert len(model.bank["default"]) == 4


def test_what_cannot_be_written(tmp_path):
    backbone = HOSTS["vit"]()[0]
    model = adapt(backbone, AdaptFormer(width=4))
    with pytest.raises(RequestError, match="acts on activations"):
        export_adapter(model, tmp_path / "x", format="peft")
    model.activate()
    with pytest.raises(RequestError, match="nothing to export"):
        export_adapter(model, tmp_path / "x", format="peft")
    model.remove()
    model.add(BitFit())
    with pytest.raises(RequestError, match="is replaced, which"):
        export_adapter(model, tmp_path / "x", format="peft")
    with pytest.raises(RequestError, match="format 'onnx': use one of peft, kohya, diffusers"):
        export_adapter(model, tmp_path / "x", format="onnx")
    convolutions, inputs, sites = HOSTS["convolutions"]()
    grouped = adapt(convolutions, LoRA(rank=2, roles="conv"), sites=sites, example=inputs)
    with pytest.raises(RequestError, match="grouped convolution"):
        export_adapter(grouped, tmp_path / "x", format="peft")
    assert not (tmp_path / "x").exists()
