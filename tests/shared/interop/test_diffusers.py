"""LoRA files of diffusers: through its own loader and back, on a tiny UNet."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalities.diffusion.backbones.unet import DiffusersUNet
from shared.adapted import Adapted, adapt
from shared.errors import RequestError
from shared.interop import export_adapter, import_adapter
from shared.methods import DoRA, LoRA

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
FILE = "pytorch_lora_weights.safetensors"
Q = "mid_block.attentions.0.transformer_blocks.0.attn1"


def unet() -> DiffusersUNet:
    return DiffusersUNet(config="tiny_sd15").eval()


def out(model, backbone: DiffusersUNet) -> Tensor:
    with torch.no_grad():
        return model(*backbone.example()).sample


def perturbed(model: Adapted) -> Adapted:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.bank["default"].parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def loaded(folder) -> DiffusersUNet:
    """A fresh UNet with the file loaded as a pipeline loads it: its state first, then the UNet's part of it."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Pipeline

    backbone = unet()
    state, alphas, metadata = Pipeline.lora_state_dict(folder, return_lora_metadata=True, weight_name=FILE)
    Pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=backbone.unet, metadata=metadata)
    return backbone


ROLES = ("attention.query", "attention.value", "attention.output", "mlp.up", "conv")


def test_what_we_write_computes_the_same_in_diffusers(tmp_path):
    backbone = unet()
    bare = out(backbone, backbone)
    model = perturbed(adapt(backbone, LoRA(rank=2, alpha=3, roles=ROLES)))
    model.add(LoRA(rank=1, alpha=5, roles="attention.query", depth=1), name="more")
    model.activate("default", "more")
    with torch.no_grad():
        for p in model.bank["more"].parameters():
            p.add_(torch.randn_like(p))
    ours = out(model, backbone)
    export_adapter(model, tmp_path, format="diffusers")
    again = loaded(tmp_path)
    theirs = out(again, again)
    assert not torch.allclose(ours, bare, atol=1e-3)
    assert torch.allclose(theirs, ours, atol=2e-5)
    direct = unet()
    direct.unet.load_lora_adapter(tmp_path, prefix="unet", weight_name=FILE)
    assert torch.equal(out(direct, direct), theirs)


def test_a_round_trip_through_diffusers_is_exact(tmp_path):
    model = perturbed(adapt(unet(), LoRA(rank=2, alpha=3, roles=ROLES)))
    export_adapter(model, tmp_path / "a", format="diffusers")
    first = loaded(tmp_path / "a")
    first.unet.save_lora_adapter(tmp_path / "b", adapter_name="default_0")  # as they write it: no part in the names
    back = Adapted(unet())
    import_adapter(back, tmp_path / "b" / FILE)
    assert torch.equal(out(back, back.backbone), out(model, model.backbone))
    export_adapter(back, tmp_path / "c", format="diffusers")
    a, c = load_file(tmp_path / "a" / FILE), load_file(tmp_path / "c" / FILE)
    assert a.keys() == c.keys()
    assert all(torch.equal(a[name], c[name]) for name in a)


def test_kohyas_names_in_diffusers(tmp_path):
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Pipeline

    model = perturbed(adapt(unet(), LoRA(rank=2, alpha=3, roles=("attention.query", "attention.output", "mlp.up"))))
    export_adapter(model, tmp_path, format="kohya")
    backbone = unet()
    state, alphas = Pipeline.lora_state_dict(tmp_path, weight_name="lora.safetensors")
    Pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=backbone.unet)
    assert torch.allclose(out(backbone, backbone), out(model, model.backbone), atol=2e-5)
    back = Adapted(unet())
    import_adapter(back, tmp_path / "lora.safetensors")
    assert torch.equal(out(back, back.backbone), out(model, model.backbone))


def test_magnitudes_go_there_and_back(tmp_path):
    """Through diffusers' own loader, and as an older file without settings."""
    model = perturbed(adapt(unet(), DoRA(rank=2, alpha=3, roles=("attention.query", "conv"))))
    export_adapter(model, tmp_path, format="diffusers")
    backbone = loaded(tmp_path)
    assert torch.allclose(out(backbone, backbone), out(model, model.backbone), atol=2e-5)
    back, older = Adapted(unet()), Adapted(unet())
    import_adapter(back, tmp_path)
    assert torch.equal(out(back, back.backbone), out(model, model.backbone))
    state = load_file(tmp_path / FILE)
    assert any(name.endswith("lora_magnitude_vector") for name in state)
    save_file(state, tmp_path / "b.safetensors")
    import_adapter(older, tmp_path / "b.safetensors")
    assert [change["shapes"] for change in older.methods["default"].changes.values()] == [
        change["shapes"] for change in back.methods["default"].changes.values()
    ]


FORMS = {
    "peft": "unet.{path}.to_q.lora_{A|B}.weight unet.{path}.to_out.0.lora_{A|B}.weight",
    "old": "unet.{path}.to_q.lora.{down|up}.weight unet.{path}.to_out.0.lora.{down|up}.weight",
    "processors": "unet.{path}.processor.to_q_lora.{down|up}.weight unet.{path}.processor.to_out_lora.{down|up}.weight",
    "bare_processors": "{path}.processor.to_q_lora.{down|up}.weight {path}.processor.to_out_lora.{down|up}.weight",
}


@pytest.mark.parametrize("form", FORMS)
def test_older_names(form, tmp_path):
    state, values = {}, [torch.randn(2, 16), torch.randn(16, 2), torch.randn(2, 16), torch.randn(16, 2)]
    for index, name in enumerate(FORMS[form].split()):
        start, _, rest = name.replace("{path}", Q).partition("{")
        pair, _, end = rest.partition("}")
        for which, word in enumerate(pair.split("|")):
            state[start + word + end] = values[2 * index + which]
    save_file(state, tmp_path / FILE)
    model = Adapted(unet())
    import_adapter(model, tmp_path)
    query = model.bank["default"][f"unet/{Q.replace('.', '/')}/to_q"]
    output = model.bank["default"][f"unet/{Q.replace('.', '/')}/to_out/0"]
    assert torch.equal(query.delta(torch.empty(16, 16)), values[1] @ values[0])
    assert torch.equal(output.delta(torch.empty(16, 16)), values[3] @ values[2])
    assert query.scale == output.scale == 1.0


def test_what_does_not_fit(tmp_path):
    model = perturbed(adapt(unet(), LoRA(rank=2)))
    export_adapter(model, tmp_path, format="diffusers")
    state = load_file(tmp_path / FILE)

    def refused(state, message, metadata=None, **options):
        save_file(state, tmp_path / "x.safetensors", metadata=metadata)
        fresh = Adapted(unet())
        with pytest.raises(RequestError, match=message) as error:
            import_adapter(fresh, tmp_path / "x.safetensors", **options)
        assert "\n" not in str(error.value)
        assert not fresh.methods

    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    refused(state | {text: torch.ones(2, 4)}, "text_encoder.text_model.encoder.layers.0.mlp.fc1 names no module")
    refused(state | {text: torch.ones(2, 4)}, "nothing but what is skipped", skip=("unet", "text_encoder"))
    refused(state | {"unet.conv_in.weight": torch.ones(1)}, "of no kind read here: unet.conv_in.weight")
    refused(state, "no mapping", metadata={"lora_adapter_metadata": "[1]"})
    refused(state, "not JSON", metadata={"lora_adapter_metadata": "{"})
    refused(
        state,
        "lacks its magnitude .DoRA., but use_dora is True",
        metadata={"lora_adapter_metadata": json.dumps({"unet.use_dora": True})},
    )
    other = Adapted(DiffusersUNet(config={"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 2}).eval())  # fmt: skip
    with pytest.raises(RequestError, match="names no module"):
        import_adapter(other, tmp_path)
