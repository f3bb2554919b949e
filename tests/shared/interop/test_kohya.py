"""Files of kohya's scripts and of LyCORIS: the weights that the lycoris library makes of its modules are ours."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modalities.diffusion.backbones import unet as unets
from shared.adapted import Adapted, adapt
from shared.errors import RequestError, WorkError
from shared.interop import export_adapter, import_adapter
from shared.methods import LoRA


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 12, 3, padding=1)
        self.mid_block = nn.Sequential(nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.mid_block(self.conv_in(x).flatten(2).mT)


X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
LAYERS = {"conv_in": "conv_in", "mid_block_0": "mid_block.0", "mid_block_2": "mid_block.2"}
MODULES = {
    "locon": (LoConModule, {"lora_dim": 3, "alpha": 2}),
    "locon_rank_above": (LoConModule, {"lora_dim": 10, "alpha": 2}),
    "locon_rslora": (LoConModule, {"lora_dim": 3, "alpha": 2, "rs_lora": True}),
    "locon_core": (LoConModule, {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "loha": (LohaModule, {"lora_dim": 3, "alpha": 2}),
    "loha_core": (LohaModule, {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "lokr": (LokrModule, {"lora_dim": 1, "alpha": 2}),
    "lokr_whole": (LokrModule, {"lora_dim": 50, "alpha": 2, "full_matrix": True}),
    "lokr_factor": (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 2}),
    "lokr_core": (LokrModule, {"lora_dim": 1, "alpha": 2, "use_tucker": True, "factor": 2}),
    "dora": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "dora_columns": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "dora_core": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "use_tucker": True}),
    "dora_loha": (LohaModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "dora_lokr_columns": (LokrModule, {"lora_dim": 1, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "lokr_both": (LokrModule, {"lora_dim": 1, "alpha": 3, "decompose_both": True, "factor": 4}),
}


def small() -> Small:
    torch.manual_seed(5)
    return Small().eval()


def theirs(case: str) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """The file of lycoris's modules, and these, by the path of the layer they adapt."""
    kind, options = MODULES[case]
    model, state, modules = small(), {}, {}
    for name, path in LAYERS.items():
        module = modules[path] = kind(name, model.get_submodule(path), **options).eval()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) * 0.4)
        state |= {f"lora_unet_{name}.{n}": t.detach().clone() for n, t in module.custom_state_dict().items()}
    return state, modules


@pytest.mark.parametrize("case", MODULES)
def test_layers_compute_what_those_of_lycoris_do(case, tmp_path):
    """By their forward: in 4.1.3 ``get_merged_weight`` of LoHa and LoKr takes the scale twice."""
    state, modules = theirs(case)
    save_file(state, tmp_path / "a.safetensors")
    model = Adapted(small())
    import_adapter(model, tmp_path / "a.safetensors", example=(X,))
    with torch.no_grad():
        for path, module in modules.items():
            layer = model.backbone.get_submodule(path)
            x = torch.randn(2, 4, 5, 5) if path == "conv_in" else torch.randn(3, layer.weight.shape[1])
            bare = small().get_submodule(path)(x)
            assert torch.allclose(layer(x), module(x), atol=1e-5), path
            assert not torch.allclose(bare, module(x), atol=1e-2)
    export_adapter(model, tmp_path, format="kohya", prefix="lora_unet_")
    again = load_file(tmp_path / "lora.safetensors")
    assert again.keys() == state.keys()
    whole = case == "lokr_whole"  # its alpha means nothing
    assert all(torch.equal(again[n], t) for n, t in state.items() if not (whole and n.endswith("alpha")))


def test_a_file_of_ours_holds_what_was_imported(tmp_path):
    state = theirs("loha")[0] | {
        n.replace("conv_in", "mid_block_2"): t for n, t in theirs("lokr")[0].items() if "mid_block_2" in n
    }
    state = {n: t for n, t in state.items() if not ("mid_block_2" in n and "hada" in n)}
    save_file(state, tmp_path / "a.safetensors")
    model = Adapted(small())
    import_adapter(model, tmp_path / "a.safetensors", example=(X,))
    kinds = [change["kind"] for change in model.methods["default"].changes.values()]
    assert sorted(kinds) == ["hadamard", "hadamard", "kronecker"]
    model.save(tmp_path / "ours.safetensors")
    again = Adapted(small())
    import_adapter(again, tmp_path / "ours.safetensors", example=(X,))
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    again.merge()
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    with pytest.raises(RequestError, match="hadamard change with w1_a"):
        export_adapter(model, tmp_path / "x", format="peft")


def test_no_alpha_is_scale_one_and_halves_are_read(tmp_path):
    state, _ = theirs("locon")
    state = {n: t.half() for n, t in state.items() if not n.endswith("alpha")}
    save_file(state, tmp_path / "a.safetensors")
    model = Adapted(small())
    import_adapter(model, tmp_path / "a.safetensors", example=(X,))
    assert {change["scale"] for change in model.methods["default"].changes.values()} == {1.0}
    down = model.bank["default"]["mid_block/0"].down
    assert torch.equal(down, state["lora_unet_mid_block_0.lora_down.weight"].float())


# -- a UNet of diffusers -----------------------------------------------------------------------------------------------


def unet(config: str = "tiny_sdxl") -> unets.DiffusersUNet:
    return unets.DiffusersUNet(config=config).eval()


def test_names_of_stable_diffusions_own_unet(tmp_path):
    """The file as kohya's scripts write it for SDXL; the map is spelled out for one layer of each kind."""
    names = {
        "input_blocks_4_1_transformer_blocks_0_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_1_0_out_layers_3": "down_blocks.0.resnets.0.conv2",
        "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "middle_block_1_transformer_blocks_1_attn1_to_q": "mid_block.attentions.0.transformer_blocks.1.attn1.to_q",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0": (
            "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0"
        ),
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_0_in_layers_2": "up_blocks.1.resnets.0.conv1",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
        "time_embed_0": "time_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
    }  # fmt: skip
    backbone, state = unet(), {}
    for name, path in names.items():
        rows, *rest = backbone.unet.get_submodule(path).weight.shape
        ones = [1] * len(rest[1:])
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, *rest)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 2, *ones)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "a.safetensors")
    model = Adapted(backbone)
    import_adapter(model, tmp_path / "a.safetensors")
    keys = {key.replace("/", ".").removeprefix("unet."): key for key in model.bank["default"]}
    assert set(keys) == set(names.values())
    for name, path in names.items():
        adapter = model.bank["default"][keys[path]]
        assert torch.equal(adapter.down, state[f"lora_unet_{name}.lora_down.weight"].flatten(1))
        assert adapter.scale == 0.5


def test_text_encoders_are_left_out_on_request(tmp_path):
    model = perturbed(adapt(unet(), LoRA(rank=2)))
    export_adapter(model, tmp_path, format="kohya")
    state = load_file(tmp_path / "lora.safetensors")
    state |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 3)}
    save_file(state, tmp_path / "b.safetensors")
    again = Adapted(unet())
    with pytest.raises(RequestError, match="lora_te1_text_model_encoder_layers_0_mlp_fc1 names no module"):
        import_adapter(again, tmp_path / "b.safetensors")
    import_adapter(again, tmp_path / "b.safetensors", skip=("lora_te",))
    assert list(again.bank["default"]) == list(model.bank["default"])


def perturbed(model: Adapted) -> Adapted:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.bank["default"].parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"lora_unet_conv_in.dora_scale": torch.ones(11, 1, 1, 1)}),
            "magnitude is .11,., wanted .12,",
        ),
        (lambda s: s.update({"lora_unet_conv_in.dora_scale": torch.ones(1, 5, 1, 1)}), "is .1, 5., wanted .1, 4."),
        (lambda s: s.update({"lora_unet_conv_in.dora_scale": torch.ones(12, 1, 3, 3)}), "no vector"),
        (lambda s: s.update({"lora_unet_conv_in.diff": torch.ones(12, 4, 3, 3)}), "of no kind read here: .*diff"),
        (lambda s: s.update({"lora_unet_conv_in.oft_blocks": torch.ones(3)}), "of no kind read here: .*oft_blocks"),
        (lambda s: s.pop("lora_unet_conv_in.lora_up.weight"), "conv_in lacks up"),
        (lambda s: s.update({"lora_unet_conv_in.hada_w1_a": torch.ones(3)}), "conv_in holds hadamard and low_rank"),
        (lambda s: s.update({"lora_unet_conv_in.alpha": torch.ones(2)}), "conv_in.alpha is no number"),
        (lambda s: s.update({"lora_unet_conv_in.lora_up.weight": torch.ones(11, 3, 1, 1)}), "up .3, 11. do not make"),
        (lambda s: s.update({"lora_unet_conv_in.lora_up.weight": torch.ones(0, 3, 1, 1)}), "empty tensor"),
        (lambda s: s.update({"lora_unet_conv_on.alpha": torch.ones(1)}), "2 of its 3|3 of its 4 modules fit"),
        (lambda s: s.update({"lora_unet_input_blocks_1_0_op.alpha": torch.ones(1)}), "this backbone is none"),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    state, _ = theirs("locon")
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    model = Adapted(small())
    bare = copy.deepcopy(model.backbone.state_dict())
    with pytest.raises(RequestError, match=message) as error:
        import_adapter(model, tmp_path / "a.safetensors", example=(X,))
    assert "\n" not in str(error.value)
    assert not model.methods
    assert all(torch.equal(bare[name], t) for name, t in model.backbone.state_dict().items())


def test_a_kronecker_product_that_does_not_fit(tmp_path):
    state, _ = theirs("lokr")
    broken = state | {"lora_unet_mid_block_0.lokr_w1": torch.ones(2, 5)}
    save_file(broken, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="mid_block/0.*do not make its matrix"):
        import_adapter(Adapted(small()), tmp_path / "a.safetensors", example=(X,))
    broken = {n: t for n, t in state.items() if n != "lora_unet_mid_block_0.lokr_w1"}
    save_file(broken, tmp_path / "b.safetensors")
    with pytest.raises(RequestError, match="lacks w1"):
        import_adapter(Adapted(small()), tmp_path / "b.safetensors", example=(X,))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_with_any_byte_changed_is_read_or_refused_in_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file(theirs(data.draw(st.sampled_from(["locon_core", "loha", "lokr", "dora_columns"])))[0], path)
        whole = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(whole[:8], "little")
        whole[data.draw(st.integers(0, header + 40))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole[: data.draw(st.sampled_from([None, header, -3]))])
        model, said = Adapted(small()), ""
        try:
            import_adapter(model, path, example=(X,))
        except (RequestError, WorkError) as error:
            said = str(error)
        assert "\n" not in said
        assert bool(said) != bool(model.methods)


def test_other_peoples_files(tmp_path):
    save_file({"model.layers.0.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="no adapter format known here has names such as"):
        import_adapter(Adapted(small()), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(RequestError, match="cannot be read as plain tensors"):
        import_adapter(Adapted(small()), tmp_path / "b.safetensors")
    torch.save({"a": object()}, tmp_path / "c.pt")
    with pytest.raises(RequestError, match="more than tensors"):
        import_adapter(Adapted(small()), tmp_path / "c.pt")
    with pytest.raises(RequestError, match="no such file"):
        import_adapter(Adapted(small()), tmp_path / "d.safetensors")
    with pytest.raises(RequestError, match="format 'onnx'"):
        import_adapter(Adapted(small()), tmp_path / "c.pt", format="onnx")
