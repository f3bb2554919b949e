"""The released ResAdapter folders: every key used, written back as they were, and wrong folders refused."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modalities.diffusion.backbones.unet import CONFIGS, DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.res_adapter import (
    LORA_FILES,
    NORM_FILES,
    ResAdapter,
    load_official,
    official_names,
    save_official,
)
from shared import adapt
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import inputs, shake, tiny

RELEASED = [("v2_sd1.5", "sd15"), ("v1_sdxl_extrapolation", "sdxl")]


@pytest.fixture(scope="module")
def released(materials):
    return materials / "data/official_weights/res_adapter"


@pytest.fixture
def saved(tmp_path):
    """A small adapter in the official layout, and the UNet it is for."""
    backbone = tiny("tiny_sd15")
    model = adapt(backbone, ResAdapter(rank=4, alpha=2.0))
    shake(model, "default")
    save_official(model, tmp_path / "small")
    model.remove()
    return backbone, tmp_path / "small"


def meta(config):
    with torch.device("meta"):
        return DiffusersUNet(config=config)


def bits(state):
    return {name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()) for name, t in state.items()}


@pytest.mark.parametrize(
    ("folder", "config", "rank", "convolutions", "norms"),
    [("v2_sd1.5", "sd15", 16, 870_400, 99_840), ("v1_sdxl_extrapolation", "sdxl", 32, 921_600, 66_560)],
)
def test_every_key_of_a_released_folder_is_used(released, folder, config, rank, convolutions, norms):
    model = load_official(meta(config), released / folder)
    method = model.methods["res_adapter"]
    assert (method.rank, method.alpha, method.alpha / method.rank) == (rank, 8.0, 0.5 if rank == 16 else 0.25)
    assert model.count()["adapter"] == convolutions + norms
    keys = {*load_file(released / folder / LORA_FILES[0]), *load_file(released / folder / NORM_FILES[0])}
    assert official_names(method.sites(model.sites())).keys() == keys


def filled(config):
    """A UNet of a released shape with quick weights in half precision; SDXL's with one transformer layer a block."""
    arguments = CONFIGS[config] | ({"transformer_layers_per_block": 1} if config == "sdxl" else {})
    unet = meta(arguments).unet.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for index, parameter in enumerate(unet.parameters()):
            parameter.fill_(0.01 + index / 1000)
    return unet


def digest(unet):
    whole = hashlib.sha1()
    for name, tensor in unet.state_dict().items():
        whole.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize(("folder", "config"), RELEASED)
def test_a_released_folder_loads_saves_back_the_same_and_comes_off_without_a_trace(released, tmp_path, folder, config):
    unet = filled(config)
    before = digest(unet)
    model = load_official(unet, released / folder)
    with torch.no_grad():
        new = unet.mid_block.resnets[1].norm2.weight
        stored = load_file(released / folder / NORM_FILES[0])["mid_block.resnets.1.norm2.weight"]
        assert torch.equal(new, stored.to(new.dtype))
    save_official(model, tmp_path / "again")
    for file in (LORA_FILES[0], NORM_FILES[0]):
        assert bits(load_file(tmp_path / "again" / file)) == bits(load_file(released / folder / file))
    model.merge()
    assert torch.equal(unet.state_dict()["mid_block.resnets.1.norm2.weight"], stored.to(new.dtype))
    model.remove("res_adapter")
    assert digest(unet) == before


def test_the_strength_of_a_released_file_is_half(released):
    unet = filled("sdxl")
    lora = load_file(released / "v1_sdxl_extrapolation" / LORA_FILES[0])
    model = load_official(unet, released / "v1_sdxl_extrapolation")
    stem, conv = "lora_unet_down_blocks_0_downsamplers_0_conv", unet.down_blocks[0].downsamplers[0].conv
    down, up = (lora[f"{stem}.lora_{part}.weight"].float() for part in ("down", "up"))
    expected = 0.25 * torch.einsum("okab,kihw->oihw", up, down)
    adapter = model.bank["res_adapter"]["down_blocks/0/downsamplers/0/conv"]
    torch.testing.assert_close(adapter.delta(conv._parameters["weight"]), expected)


@pytest.mark.parametrize(("wrong", "config"), [("v1_sdxl_extrapolation", "sd15"), ("v2_sd1.5", "sdxl")])
def test_a_file_for_another_unet_is_refused_and_named(released, wrong, config):
    backbone = meta(config)
    with pytest.raises(RequestError) as error:
        load_official(backbone, released / wrong)
    message = str(error.value)
    assert "made for another UNet than this UNet2DConditionModel" in message
    assert "of another shape (first: " in message
    assert ("missing (first: " if config == "sd15" else "keys not used (first: ") in message
    assert not any("_port" in m.__dict__ for m in backbone.modules())


def test_small_round_trip(saved, tmp_path):
    backbone, folder = saved
    given = inputs(backbone)
    model = load_official(backbone, folder, name="again")
    with torch.no_grad():
        output = model(**given).sample
    save_official(model, tmp_path / "twice")
    for file in (LORA_FILES[0], NORM_FILES[0]):
        assert bits(load_file(tmp_path / "twice" / file)) == bits(load_file(folder / file))
    dtypes = {file: {t.dtype for t in load_file(folder / file).values()} for file in (LORA_FILES[0], NORM_FILES[0])}
    assert dtypes == {LORA_FILES[0]: {torch.float16}, NORM_FILES[0]: {torch.float32}}
    model.remove("again")
    reference = load_into_copy(backbone, folder)
    with torch.no_grad():
        torch.testing.assert_close(reference(**given).sample, output, rtol=1e-5, atol=1e-6)


def load_into_copy(backbone, folder):
    """The official way: norms by ``load_state_dict``, convolutions by adding their product to the weights."""
    unet = tiny("tiny_sd15").unet
    unet.load_state_dict(load_file(folder / NORM_FILES[0]), strict=False)
    lora = load_file(folder / LORA_FILES[0])
    for name, module in unet.named_modules():
        stem = "lora_unet_" + name.replace(".", "_")
        if f"{stem}.alpha" in lora:
            down, up = lora[f"{stem}.lora_down.weight"].float(), lora[f"{stem}.lora_up.weight"].float()
            scale = float(lora[f"{stem}.alpha"]) / down.shape[0]
            with torch.no_grad():
                module.weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    return unet


@pytest.mark.parametrize(("keep", "count"), [(LORA_FILES[0], 0), (NORM_FILES[0], 1)])
def test_one_file_is_enough(saved, keep, count):
    backbone, folder = saved
    for file in (LORA_FILES[0], NORM_FILES[0]):
        if file != keep:
            (folder / file).unlink()
    method = load_official(backbone, folder).methods["res_adapter"]
    assert (method.convolutions, method.norms) == (not count, bool(count))


@pytest.mark.parametrize("names", [(LORA_FILES[1], NORM_FILES[1]), ("a.safetensors", "b.safetensors")])
def test_old_names_and_other_names_are_found(saved, names):
    backbone, folder = saved
    for old, new in zip((LORA_FILES[0], NORM_FILES[0]), names, strict=True):
        (folder / old).rename(folder / new)
    method = load_official(backbone, folder).methods["res_adapter"]
    assert (method.rank, method.alpha, method.norms) == (4, 2.0, True)


def test_the_order_of_loading_makes_no_difference(saved, tmp_path):
    backbone, folder = saved
    given, outputs = inputs(backbone), []
    for name, file in (("lora", LORA_FILES[0]), ("norm", NORM_FILES[0])):
        (tmp_path / name).mkdir()
        shutil.copy(folder / file, tmp_path / name)
    for order in (("norm", "lora"), ("lora", "norm")):
        model = load_official(backbone, tmp_path / order[0], name=order[0])
        assert load_official(model, tmp_path / order[1], name=order[1]) is model
        model.activate(*order)
        with torch.no_grad():
            outputs.append(model(**given).sample)
        for name in order:
            model.remove(name)
    whole = load_official(backbone, folder)
    with torch.no_grad():
        outputs.append(whole(**given).sample)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def wrong_folders():
    stem = "lora_unet_down_blocks_0_downsamplers_0_conv"
    norm = "mid_block.resnets.0.norm1.weight"

    def on(file, change):
        return lambda folder: rewrite(folder / file, change)

    lora, norms = LORA_FILES[0], NORM_FILES[0]
    return {
        "empty": (lambda f: [p.unlink() for p in f.iterdir()], "no ResAdapter here: looked for pytorch_lora_weights"),
        "gone": (shutil.rmtree, "no such folder"),
        "cut": (lambda f: (f / lora).write_bytes((f / lora).read_bytes()[:-9]), f"{lora}: cut short or not a safe"),
        "zero": (lambda f: (f / norms).write_bytes(b""), f"{norms}: cut short or not a safe"),
        "nan": (on(norms, lambda t: t[norm].fill_(float("nan"))), f"{norm} holds a value that is not a finite number"),
        "extra": (
            on(norms, lambda t: t.update({"conv_in.bias": torch.ones(8)})),
            "1 of its 107 keys not used .first: c",
        ),
        "lacks": (on(norms, lambda t: t.pop(norm)), f"1 missing .first: {norm}"),
        "shape": (
            on(norms, lambda t: t.update({norm: torch.ones(3)})),
            rf"1 of another shape .first: {norm} \(3,\), here \(16,\)",
        ),
        "ranks": (
            on(lora, lambda t: t.update({f"{stem}.lora_down.weight": torch.ones(2, 8, 3, 3)})),
            "its convolutions differ in rank: 2, 4",
        ),
        "alphas": (on(lora, lambda t: t[f"{stem}.alpha"].fill_(1.0)), r"differ in alpha: 1.0, 2.0"),
        "other": (
            lambda f: save_file({"conv_in.weight": torch.ones(1)}, f / lora),
            "neither resampling convolutions nor resnet norms",
        ),
        "both": (lambda f: shutil.copy(f / lora, f / LORA_FILES[1]), "hold the same part; keep one of them"),
    }


@pytest.mark.parametrize("case", wrong_folders())
def test_wrong_folders_are_refused_and_change_nothing(saved, case):
    backbone, folder = saved
    spoil, message = wrong_folders()[case]
    spoil(folder)
    with pytest.raises(RequestError, match=message):
        load_official(backbone, folder)
    assert not any("_port" in m.__dict__ for m in backbone.modules())


def test_an_alpha_that_is_not_given_is_the_rank(saved):
    backbone, folder = saved
    rewrite(folder / LORA_FILES[0], lambda t: [t.pop(key) for key in list(t) if key.endswith(".alpha")])
    method = load_official(backbone, folder).methods["res_adapter"]
    assert (method.rank, method.alpha) == (4, 4.0)


def test_saving_refuses_what_would_not_be_read_back(saved, tmp_path):
    backbone, folder = saved
    model = adapt(backbone, ResAdapter(rank=4, norms=False))
    with pytest.raises(RequestError, match="belongs to another adapter; save to an empty folder"):
        save_official(model, folder)
    with torch.no_grad():
        next(model.bank["default"].parameters()).fill_(1e6)
    with pytest.raises(
        RequestError, match=r"lora_down.weight holds a value that torch.float16 cannot: nothing written"
    ):
        save_official(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_paths_below_a_prefix_have_the_same_official_names(saved):
    backbone, _ = saved
    method = ResAdapter()
    inside, bare = method.sites(backbone.sites()), method.sites(unet_sites(backbone.unet))
    assert list(official_names(inside)) == list(official_names(bare))
