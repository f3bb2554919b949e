"""I2V-Adapter: what the publication says must hold, its files, and its company on a video UNet."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.video.i2v_adapter import I2VAdapter, I2VAttention, is_official, load_official, save_official
from shared import Adapted, adapt
from shared.errors import RequestError
from shared.taxonomy import count
from tests.modalities.diffusion.conftest import inputs, shake, tiny
from tests.modalities.diffusion.videos import moving

FRAMES = 4


@pytest.fixture(scope="module")
def frozen() -> Any:
    return moving()


@pytest.fixture(scope="module")
def attached(frozen) -> Adapted:
    """Away from the identity."""
    model = adapt(copy.deepcopy(frozen), I2VAdapter(), name="i2v")
    shake(model, "i2v")
    return model


def given(batch: int = 2, seed: int = 0, frames: int = FRAMES) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 4, frames, 8, 8, generator=generator)
    text = torch.randn(batch, 5, 32, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(321), "encoder_hidden_states": text}


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).sample


def rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """As a pipeline calls a UNet: one row of text a frame."""
    frames = inputs["sample"].shape[2]
    return {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].repeat_interleave(frames, 0)}


def layer(model: Adapted) -> tuple[I2VAttention, Any]:
    """One of its attentions, with the module it is beside."""
    site = next(s for s in model.sites() if s.role == "attention" and "self" in s.tags)
    return model.bank["i2v"][site.key], site.module  # type: ignore[index,return-value]


@torch.no_grad()
def attend(model: Adapted, x: Tensor, frames: int = FRAMES) -> Tensor:
    """One attention alone, called as the UNet calls it. x: (B * F, tokens, 8)."""
    model.context.frames = frames
    try:
        return layer(model)[1](x)
    finally:
        model.context.clear()


def states(videos: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.randn(videos * frames, 9, 8, generator=torch.Generator().manual_seed(3))


# -- what must hold ----------------------------------------------------------------------------------------------------


def test_without_the_new_output_projection_nothing_changes_exactly(frozen, attached):
    fresh = adapt(copy.deepcopy(frozen), I2VAdapter(), name="i2v")
    assert torch.equal(run(fresh, given()), run(frozen, given()))
    own, host = layer(fresh)
    assert torch.equal(own.to_q_ff.weight, host.to_q.weight)
    assert not any(t.any() for t in own.to_out_ff.parameters())
    moved, _ = layer(attached)
    moved_out = moved.to_out_ff.state_dict()
    kept = {name: t.clone() for name, t in moved_out.items()}
    with torch.no_grad():
        for t in moved.to_out_ff.parameters():
            t.zero_()
        ours = attend(attached, states())
        with attached.disabled():
            assert torch.equal(ours, attend(attached, states()))
    moved.to_out_ff.load_state_dict(kept)


def test_it_is_the_published_sum(attached):
    own, host = layer(attached)
    x, heads = states(), host.heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weight @ v).transpose(1, 2).flatten(2)

    first = x.unflatten(0, (-1, FRAMES))[:, :1].expand(-1, FRAMES, -1, -1).flatten(0, 1)
    with torch.no_grad():
        itself = host.to_out[0](attention(host.to_q(x), host.to_k(x), host.to_v(x)))
        to_first = own.to_out_ff(attention(own.to_q_ff(x), host.to_k(first), host.to_v(first)))
    torch.testing.assert_close(attend(attached, x), itself + to_first, rtol=1e-5, atol=1e-6)


def test_a_later_frame_changes_itself_alone_and_the_first_one_all_of_its_video(attached):
    before = attend(attached, states())
    for frame in range(2 * FRAMES):
        x = states()
        x[frame] += 1
        after = attend(attached, x)
        changed = [i for i in range(2 * FRAMES) if not torch.allclose(after[i], before[i], rtol=0, atol=1e-6)]
        start = frame - frame % FRAMES
        assert changed == ([frame] if frame % FRAMES else list(range(start, start + FRAMES)))


def test_counts_at_the_published_shape():
    with torch.device("meta"):
        model = adapt(DiffusersUNet(config="sd15"), I2VAdapter())
    assert model.count()["trainable"] == model.count()["adapter"] == 24_793_280
    assert len(model.trainable()) == 48
    linear = [m for m in model.bank.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 32
    method = I2VAdapter()
    assert count(method.record, method, method.sites(model.sites())) == 24_793_280


def test_gradients_reach_it_alone(attached):
    attached.train()
    attached(**given()).sample.square().mean().backward()
    trained = attached.trainable()
    assert len(trained) == 48
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for p in attached.backbone.parameters())
    attached.zero_grad()
    attached.eval()


def test_one_frame_looks_at_itself(attached):
    x = states(2, 1)
    own, _host = layer(attached)
    with torch.no_grad():
        attached.context.frames = 1
        beside = own.beside(x)
    with attached.disabled():
        itself = attend(attached, x, 1)
    torch.testing.assert_close(attend(attached, x, 1), itself + beside)
    assert float(beside.abs().max()) > 1e-3


def test_the_first_frame_of_one_sample_never_reaches_another(attached):
    """As in guidance: the same latents twice, other texts; and other latents in one of the two."""
    both = given()
    out = run(attached, both)
    for i in range(2):
        alone = {
            **both,
            "sample": both["sample"][i : i + 1],
            "encoder_hidden_states": both["encoder_hidden_states"][i : i + 1],
        }
        torch.testing.assert_close(out[i : i + 1], run(attached, alone), rtol=1e-4, atol=1e-5)


def test_it_stays_when_the_base_is_swapped(frozen, attached, tmp_path):
    """Only its own tensors are in its file, and any base of the shape takes them."""
    save_official(attached, tmp_path / "i2v.safetensors")
    other = moving(seed=7)
    with torch.no_grad():  # what was there, and a personalised model's weights in its place
        swapped = load_official(copy.deepcopy(frozen), tmp_path / "i2v.safetensors", name="i2v")
        swapped.backbone.load_state_dict(other.state_dict())
        fresh = load_official(other, tmp_path / "i2v.safetensors", name="i2v")
    ours, theirs = run(swapped, given()), run(fresh, given())
    assert torch.equal(ours, theirs)
    with swapped.disabled():
        assert float((ours - run(swapped, given())).abs().max()) > 1e-3
    attached.save(tmp_path / "own.safetensors")
    held = {key.replace("adapter.", "adapter.i2v.") for key in load_file(tmp_path / "own.safetensors")}
    assert held == set(attached.trainable())


# -- strength, frames, half precision ----------------------------------------------------------------------------------


def test_a_strength_is_that_part_of_the_branch(attached):
    whole, bare = attend(attached, states()), None
    with attached.disabled():
        bare = attend(attached, states())
    attached.activate("i2v", strength=0.25)
    try:
        part = attend(attached, states())
        assert torch.isfinite(run(attached, given())).all()
    finally:
        attached.activate("i2v")
    torch.testing.assert_close(part, bare + 0.25 * (whole - bare), rtol=1e-4, atol=1e-6)


def test_a_unet_of_single_frames_is_told_how_many_there_are():
    backbone = tiny("tiny_sd15")
    model = adapt(backbone, I2VAdapter(), name="i2v")
    shake(model, "i2v")
    call = inputs(backbone, batch=4)
    call["encoder_hidden_states"] = call["encoder_hidden_states"][:1].expand(4, -1, -1)
    two = run(model, {**call, "cross_attention_kwargs": {"num_frames": 2}})
    one, four = (run(model, {**call, "cross_attention_kwargs": {"num_frames": n}}) for n in (1, 4))
    torch.testing.assert_close(two[0], one[0])
    torch.testing.assert_close(two[2], one[2], rtol=1e-4, atol=1e-5)
    assert float((two[1] - one[1]).abs().max()) > 1e-4
    assert float((two[2] - four[2]).abs().max()) > 1e-4
    with torch.no_grad():
        assert torch.equal(model(**call, context={"frames": 2}).sample, two)
    with pytest.raises(RequestError, match="how many frames has a video: give cross_attention_kwargs"):
        run(model, call)
    with pytest.raises(RequestError, match="4 rows are no videos of 3 frames"):
        run(model, {**call, "cross_attention_kwargs": {"num_frames": 3}})


def test_each_sample_may_have_its_own_adapter(attached):
    model = copy.deepcopy(attached)
    model.add(I2VAdapter(), name="other")
    shake(model, "other", 0.3)
    call = given(3)
    with torch.no_grad():
        mixed = model(**call, adapters=["i2v", None, "other"]).sample
    for i, name in enumerate(["i2v", None, "other"]):
        model.activate(*([] if name is None else [name]))
        torch.testing.assert_close(mixed[i], run(model, call)[i], rtol=1e-4, atol=1e-5)


def test_recomputing_blocks_gives_the_same_gradients(attached):
    found = []
    for attached.recompute in (False, True):
        attached.train()
        attached(**given()).sample.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in attached.trainable().items()})  # type: ignore[union-attr]
        attached.zero_grad()
    attached.recompute = False
    attached.eval()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_frozen_weights_may_be_in_half_precision(attached):
    from shared.half import halve

    model = copy.deepcopy(attached)
    halve(model)
    ours, exact = run(model, given()), run(attached, given())
    assert float((ours - exact).abs().max()) < 0.05 * float(exact.abs().max())
    with model.disabled():
        assert float((ours - run(model, given())).abs().max()) > 1e-3


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [True, False])
def test_an_official_file_gives_its_numbers_back(frozen, attached, tmp_path, outer):
    save_official(attached, tmp_path / "i2v_module.safetensors")
    state = load_file(tmp_path / "i2v_module.safetensors")
    assert len(state) == 48
    assert is_official(state)
    for block in ("down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.3.attentions.2"):
        for part in ("to_q_ff.weight", "to_out_ff.weight", "to_out_ff.bias"):
            assert f"{block}.transformer_blocks.0.attn1.{part}" in state
    torch.save({"state_dict": state} if outer else state, tmp_path / "i2v_module.pth")
    for target in (copy.deepcopy(frozen), copy.deepcopy(frozen).unet):
        loaded = load_official(target, tmp_path / "i2v_module.pth")
        assert torch.equal(run(loaded, rows(given())), run(attached, given()))
        save_official(loaded, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "i2v_module.safetensors").read_bytes()


def test_other_files_are_refused_and_the_target_stays(frozen, attached, tmp_path):
    save_official(attached, tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q_ff.weight"
    target = copy.deepcopy(frozen)

    def refused(tensors: dict[str, Tensor], said: str) -> None:
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(RequestError, match=said):
            load_official(target, tmp_path / "bad.safetensors")
        assert torch.equal(run(target, given()), run(frozen, given()))
        assert not any("_port" in m.__dict__ for m in target.modules())

    refused(
        {n: t for n, t in state.items() if n != name},
        rf"another UNet than this UNetMotionModel: 1 missing \(first: {name}",
    )
    refused({**state, "mid_block.extra": torch.zeros(1)}, r"1 of its 49 keys not used \(first: mid_block.extra")
    refused({**state, name: torch.zeros(320, 320)}, r"1 of another shape .*\(320, 320\), here \(16, 16\)")
    refused({"down_blocks.0.x": torch.zeros(1)}, "no I2V-Adapter: no key ends in attn1.to_q_ff.weight")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:500])
    with pytest.raises(RequestError, match="cut.safetensors"):
        load_official(target, tmp_path / "cut.safetensors")
    torch.save({"state_dict": {"hook": print}}, tmp_path / "code.pth")
    with pytest.raises(RequestError, match="holds more than tensors"):
        load_official(target, tmp_path / "code.pth")
    with pytest.raises(RequestError, match="ends in .safetensors"):
        save_official(attached, tmp_path / "a.pth")
    with pytest.raises(RequestError, match="name one of the I2VAdapters to save; loaded: none"):
        save_official(Adapted(target), tmp_path / "b.safetensors")


# -- beside others -----------------------------------------------------------------------------------------------------


def test_beside_a_controlnet(attached):
    """Residuals for every row, as AnimateDiff's ControlNet pipeline gives them."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    torch.manual_seed(2)
    control = ControlNetModel.from_unet(tiny("tiny_sd15").unet, conditioning_channels=3).eval()
    with torch.no_grad():
        for parameter in (*control.controlnet_down_blocks.parameters(), *control.controlnet_mid_block.parameters()):
            parameter.add_(0.1)
        call = rows(given(1))
        flat = call["sample"].transpose(1, 2).flatten(0, 1)
        image = torch.rand(FRAMES, 3, 64, 64)
        down, mid = control(flat, call["timestep"], call["encoder_hidden_states"], image, return_dict=False)
    both = {**call, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    ours = run(attached, both)
    assert float((ours - run(attached, call)).abs().max()) > 1e-3
    with attached.disabled():
        assert float((ours - run(attached, both)).abs().max()) > 1e-3


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_a_style_lora_of_peft(attached, frozen, ours_first):
    """The branch reads the first frame through the styled key and value layers, wherever the LoRA came."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model = copy.deepcopy(attached)
    state, unet = model.trained_state(), model.backbone.unet
    merged = copy.deepcopy(model)
    if not ours_first:
        model.remove("i2v")
    torch.manual_seed(5)
    unet.add_adapter(config, "style")
    unet.requires_grad_(False)
    if not ours_first:
        model = adapt(model.backbone, I2VAdapter(), name="i2v", sites=unet_sites(unet, "unet"))
        model.load_trained_state(state)
    with torch.no_grad():
        for path, module in unet.named_modules():
            if hasattr(module, "get_delta_weight"):
                merged.backbone.unet.get_submodule(path).weight += module.get_delta_weight("style")
    ours = run(model, given())
    torch.testing.assert_close(ours, run(merged, given()), rtol=1e-4, atol=1e-5)
    unet.disable_adapters()
    assert float((ours - run(model, given())).abs().max()) > 1e-3


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_an_ip_adapter_loaded_before_or_after(attached, ours_first):
    """diffusers makes attention processors anew when it loads one; ours are none."""
    from modalities.diffusion.backbones.content import attach_content
    from tests.modalities.diffusion.test_motion import plus

    model = copy.deepcopy(attached)
    state, unet = model.trained_state(), model.backbone.unet
    if not ours_first:
        model.remove("i2v")
    attach_content(unet, plus(unet), {}, "in memory")
    if not ours_first:
        model.add(I2VAdapter(), name="i2v")
        model.load_trained_state(state)
    told = [{"image_embeds": [x]} for x in (torch.zeros(2, 1, 5, 12), torch.ones(2, 1, 5, 12))]
    blank, seen = (run(model, {**given(), "added_cond_kwargs": each}) for each in told)
    assert float((seen - blank).abs().max()) > 1e-4
    with model.disabled():
        assert float((seen - run(model, {**given(), "added_cond_kwargs": told[1]})).abs().max()) > 1e-3
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_v_ip"):
            processor.scale = [0.0]
    silent = run(model, {**given(), "added_cond_kwargs": told[1]})
    torch.testing.assert_close(silent, run(attached, given()), rtol=1e-5, atol=1e-6)


def test_beside_our_own_adapters_of_the_same_layers(attached):
    from shared import LoRA

    model = copy.deepcopy(attached)
    model.add(LoRA(rank=2, roles=("attention.key", "attention.value")), name="style")
    shake(model, "style")
    model.activate("i2v", "style")
    ours = run(model, given())
    model.activate("style", "i2v")
    torch.testing.assert_close(ours, run(model, given()), rtol=1e-4, atol=1e-5)
    model.activate("i2v")
    assert torch.equal(run(model, given()), run(attached, given()))
    model.activate("style")
    assert float((ours - run(model, given())).abs().max()) > 1e-3
