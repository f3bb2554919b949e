"""Adapters on whole pipelines: attached and taken off without a trace, told by their keys, beside other settings."""

from __future__ import annotations

import copy
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.multi_view import mv_adapter
from modalities.diffusion.multi_view.mv_adapter import MVAdapter
from modalities.diffusion.pipelines import attach, attached, detach, recognise
from modalities.diffusion.res_adapter import LORA_FILES, NORM_FILES, ResAdapter, save_official
from modalities.diffusion.video import i2v_adapter
from modalities.diffusion.video.i2v_adapter import I2VAdapter
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import shake, tiny
from tests.modalities.diffusion.pipelines import save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


def load(folder) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, width=96, height=64, **more) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe(
        "a cat", width=width, height=height, num_inference_steps=1, generator=generator, output_type="np", **more
    )
    return torch.tensor(made.images)


def digest(pipe) -> str:
    whole = hashlib.sha256()
    for name, tensor in pipe.unet.state_dict().items():
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {xl: save_pipeline(tmp_path_factory.mktemp("models"), xl=xl) for xl in (False, True)}


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def whole(request, folders):
    return load(folders[request.param])


@pytest.fixture
def pipe(whole):
    """A pipeline without adapters, before and after."""
    before = digest(whole)
    yield whole
    if attached(whole):
        detach(whole)
    assert digest(whole) == before


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """A ResAdapter for each base as the authors save it and as we do, and what it makes."""
    found = {}
    for xl, folder in folders.items():
        pipe, out = load(folder), tmp_path_factory.mktemp("adapters")
        model = attach(pipe, ResAdapter(rank=4, alpha=2.0))
        shake(model, "default")
        with torch.no_grad():
            for parameter in model.bank.parameters():
                parameter.copy_(parameter.half())  # as the authors' files hold them
        save_official(model, out / "official")
        model.save(out / "own.safetensors")
        model.eval()
        found[xl] = SimpleNamespace(official=out / "official", own=out / "own.safetensors", image=image(pipe))
    return found


def is_xl(pipe) -> bool:
    return "XL" in type(pipe).__name__


def test_on_and_off_again_leaves_no_trace(pipe):
    base, kind, config = image(pipe), type(pipe), dict(pipe.config)
    types = [type(module) for module in pipe.unet.modules()]
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    model = attach(pipe, ResAdapter(rank=4))
    assert torch.equal(image(pipe), base)
    shake(model, "default")
    model.eval()
    changed = image(pipe)
    assert float((changed - base).abs().max()) > 1e-3
    assert (type(pipe), dict(pipe.config), attached(pipe)) == (kind, config, model)
    detach(pipe)
    assert attached(pipe) is None
    assert torch.equal(image(pipe), base)
    assert [type(module) for module in pipe.unet.modules()] == types
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert "_apply" not in pipe.unet.__dict__


@pytest.mark.parametrize("form", ["official", "own"])
def test_files_give_what_was_saved(pipe, files, form):
    mine = files[is_xl(pipe)]
    attach(pipe, getattr(mine, form))
    torch.testing.assert_close(image(pipe), mine.image, rtol=1e-5, atol=1e-5)


def test_one_official_file_alone_is_that_part(pipe, files):
    folder = files[is_xl(pipe)].official
    model = attach(pipe, str(folder / NORM_FILES[0]), norm_strength=0.0)
    assert model.methods["res_adapter"].arguments() == ResAdapter(convolutions=False, norm_strength=0.0).arguments()
    both = attach(pipe, folder / LORA_FILES[0], name="lora", strength=0.5)
    assert both is model
    assert model.state.active == (("res_adapter", 1.0), ("lora", 0.5))
    detach(pipe, "res_adapter")
    assert attached(pipe) is model
    assert list(model.methods) == ["lora"]


def test_files_for_another_base_are_named(pipe, files):
    other = files[not is_xl(pipe)]
    before = digest(pipe)
    bases = (
        "4 levels, as Stable Diffusion 1.5, where here are 3 levels, as SDXL",
        "3 levels, as SDXL, where here are 4",
    )
    with pytest.raises(RequestError, match=f"a base of {bases[not is_xl(pipe)]}"):
        attach(pipe, other.official)
    names = ("tiny_sd15", "tiny_sdxl")[:: 1 if is_xl(pipe) else -1]
    with pytest.raises(
        RequestError, match=f"made for backbone {names[0]} with fingerprint .*; this is {names[1]} with"
    ):
        attach(pipe, other.own)
    assert attached(pipe) is None
    assert digest(pipe) == before


def test_weights_of_the_same_shape_are_taken_on_request(folders, files):
    pipe = load(folders[False])
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.01)
    with pytest.raises(RequestError, match="pass other_backbone=True"):
        attach(pipe, files[False].own)
    attach(pipe, files[False].own, other_backbone=True)
    attach(pipe, files[False].official)


def test_adapters_follow_the_unet(pipe, files):
    mine = files[is_xl(pipe)]
    model = attach(pipe, mine.official)
    pipe.unet.to(torch.float64)
    assert {p.dtype for p in model.bank.parameters()} == {torch.float64}
    pipe.unet.to(torch.float32)
    twin = copy.deepcopy(pipe.unet).to(torch.float64)  # with adapters of its own
    assert {p.dtype for p in attached(twin).bank.parameters()} == {torch.float64}
    assert {p.dtype for p in model.bank.parameters()} == {torch.float32}
    torch.testing.assert_close(image(pipe), mine.image, rtol=1e-5, atol=1e-5)


def test_slicing_tiling_and_offloading_go_on_working(pipe, files):
    accelerate = pytest.importorskip("accelerate")
    mine = files[is_xl(pipe)]
    attach(pipe, mine.official)
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    torch.testing.assert_close(image(pipe), mine.image, rtol=1e-4, atol=1e-4)
    pipe.vae.enable_tiling()
    assert image(pipe).shape == mine.image.shape
    pipe.vae.disable_tiling()
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))  # as the pipeline does for a GPU
    try:
        assert pipe.unet.conv_in.weight.is_meta
        torch.testing.assert_close(image(pipe), mine.image, rtol=1e-4, atol=1e-4)
        for change in (detach, lambda pipe: attach(pipe, mine.official, name="more")):
            with pytest.raises(RequestError, match="the UNet is offloaded: attach before that starts"):
                change(pipe)
    finally:
        accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
        pipe.disable_attention_slicing()
        pipe.vae.disable_slicing()


def test_a_pipeline_saved_meanwhile_is_the_bare_one(pipe, files, tmp_path):
    before = pipe.unet.state_dict()
    attach(pipe, files[is_xl(pipe)].official)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is type(pipe)
    assert list(again.unet.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.unet.state_dict().items())


def test_image_to_image_and_a_bare_unet_see_the_same_adapter(folders, files):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

    pipe = load(folders[False])
    second = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    model = attach(second, files[False].official)
    assert attached(pipe) is attached(pipe.unet) is model
    torch.testing.assert_close(image(pipe), files[False].image, rtol=1e-5, atol=1e-5)
    detach(pipe.unet)
    assert attached(second) is None


def test_a_video_pipeline_takes_one_for_its_images(folders, files):
    pipe = animated(folders)
    base, before = frames(pipe), digest(pipe)
    model = attach(pipe, files[False].official)
    assert len(model.hosts()) == 6 + 44 // 2 + 22
    assert float((frames(pipe) - base).abs().max()) > 1e-4
    detach(pipe)
    assert torch.equal(frames(pipe), base)
    assert digest(pipe) == before


def test_a_lora_of_the_library_gives_what_the_library_gives(folders, tmp_path):
    pipe = load(folders[False])
    base = image(pipe)
    generator = torch.Generator().manual_seed(1)
    path, shape = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", (16, 16)
    state = {f"unet.{path}.lora_A.weight": torch.randn(2, shape[1], generator=generator)}
    state[f"unet.{path}.lora_B.weight"] = torch.randn(shape[0], 2, generator=generator)
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(state, adapter_name="theirs")
    expected = image(pipe)
    pipe.unload_lora_weights()
    assert float((expected - base).abs().max()) > 1e-4
    attach(pipe, tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(image(pipe), expected, rtol=1e-4, atol=1e-5)


def test_the_librarys_own_loading_of_a_released_folder_gives_the_same(folders, files):
    mine = files[False]
    pipe = load(folders[False])
    pipe.load_lora_weights(mine.official, weight_name=LORA_FILES[0], adapter_name="res_adapter")
    pipe.unet.load_state_dict(load_file(mine.official / NORM_FILES[0]), strict=False)
    torch.testing.assert_close(image(pipe), mine.image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("folder", "config"), [("v2_sd1.5", "sd15"), ("v1_sdxl_extrapolation", "sdxl")])
def test_released_files_are_read_by_the_library_whole(materials, folder, config):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    released = materials / "data/official_weights/res_adapter" / folder
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(released), weight_name=LORA_FILES[0])
    with torch.device("meta"):
        sites = unet_sites(DiffusersUNet(config=config).unet, "unet").select("conv", tags="resample")
    paths = {site.path for site in sites}
    assert {name.partition(".lora")[0] for name in state} == paths
    assert alphas == {f"{path}.alpha": 8.0 for path in paths}


@pytest.mark.parametrize(
    ("key", "system"),
    [
        ("lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight", "res_adapter"),
        ("mid_block.resnets.0.norm1.weight", "res_adapter"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_mv.weight", "mv_adapter"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q_ff.weight", "i2v_adapter"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_ff.bias", "i2v_adapter"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora"),
        ("unet.mid_block.attentions.0.proj_in.lora.up.weight", "lora"),
    ],
)
def test_systems_are_told_by_their_keys(tmp_path, key, system):
    save_file(
        {"adapter.conv_in.bias" if "_mv" in key else "other": torch.ones(1), key: torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    assert recognise(tmp_path / "a.safetensors") == recognise(tmp_path) == system
    torch.save({"state_dict": {key: torch.ones(1)}}, tmp_path / "a.pth")
    assert recognise(tmp_path / "a.pth") == system


def views(pipe, wanted=None) -> torch.Tensor:
    return image(pipe, 64, 64, num_images_per_prompt=3, cross_attention_kwargs=wanted)


@pytest.mark.parametrize("base", ["sd21", "sdxl"])
def test_a_multi_view_adapter_is_known_by_its_file(folders, tmp_path, base):
    pipe = load(folders[base == "sdxl"])
    if base == "sd21":
        pipe.register_modules(unet=tiny("tiny_sd21").unet)
    bare, before = views(pipe), digest(pipe)
    shake(attach(pipe, MVAdapter(reference=True)), "default")
    maps = torch.linspace(0, 1, 18).view(3, 6, 1, 1)
    wanted = {"num_views": 3, "control": maps, "ref_latents": torch.ones(1, 4, 8, 8)}
    expected, file = views(pipe, wanted), tmp_path / "mvadapter_i2mv.safetensors"
    assert float((expected - bare).abs().max()) > 1e-3
    mv_adapter.save_official(attached(pipe), file)
    detach(pipe)
    assert recognise(file) == "mv_adapter"
    model = attach(pipe, file)
    assert (model.active, model.methods["mv_adapter"].reference) == (("mv_adapter",), True)
    assert torch.equal(views(pipe, wanted), expected)
    detach(pipe)
    assert torch.equal(views(pipe), bare)
    assert digest(pipe) == before
    other = load(folders[base != "sdxl"])
    with pytest.raises(RequestError, match="made for another UNet .* self-attentions, .* wide.; this UNet is another"):
        attach(other, file)
    assert attached(other) is None


def animated(folders) -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    torch.manual_seed(0)
    motion = MotionAdapter(
        block_out_channels=(8, 16, 16, 16),
        motion_layers_per_block=2,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=32,
    )
    pipe: Any = AnimateDiffPipeline.from_pipe(load(folders[False]), motion_adapter=motion)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size: Any = {"num_frames": 2, "width": 64, "height": 64, "num_inference_steps": 1}
    return torch.tensor(pipe("a cat", **size, generator=generator, output_type="np").frames)


def test_an_image_to_video_adapter_is_known_by_its_file(folders, tmp_path):
    pipe = animated(folders)
    bare, before = frames(pipe), digest(pipe)
    shake(attach(pipe, I2VAdapter()), "default", 0.5)
    expected = frames(pipe)
    assert float((expected - bare).abs().max()) > 1e-4
    i2v_adapter.save_official(attached(pipe), tmp_path / "i2v.safetensors")
    detach(pipe)
    state = load_file(tmp_path / "i2v.safetensors")
    torch.save({k.replace(".attn1.", ".attn1.processor."): v for k, v in state.items()}, tmp_path / "i2v_module.pth")
    for file in (tmp_path / "i2v.safetensors", tmp_path / "i2v_module.pth"):
        assert recognise(file) == "i2v_adapter"
        assert attach(pipe, file).active == ("i2v_adapter",)
        assert torch.equal(frames(pipe), expected)
        detach(pipe)
        assert torch.equal(frames(pipe), bare)
        assert digest(pipe) == before
    other = load(folders[True])
    with pytest.raises(RequestError, match="made for another UNet than this UNet2DConditionModel: .* keys not used"):
        attach(other, file)
    assert attached(other) is None


def cases(folder):
    """What is given, and what is said of it."""

    def write(name, state):
        path = folder / name
        save_file(state, path)
        return path

    one, norm = torch.ones(1), "mid_block.resnets.0.norm1.weight"
    (folder / "empty").mkdir()
    (folder / "cut.safetensors").write_bytes(write("whole.safetensors", {norm: one}).read_bytes()[:-2])
    (folder / "text.bin").write_text("no weights")
    return [
        (folder / "gone", "gone: no such file"),
        (folder / "empty", "a folder without a weights file"),
        (folder / "cut.safetensors", "cut short or not a safetensors file"),
        (folder / "text.bin", "it holds more than tensors, or is no torch file|cannot be read as plain tensors"),
        (
            write("motion.safetensors", {"up.motion_modules.0.temporal_transformer.norm.bias": one}),
            "a motion module of Ani",
        ),
        (write("other.safetensors", {"conv.weight": one}), "of no system known here .*; its first key is conv.weight"),
        (write("extra.safetensors", {norm: torch.ones(16), "conv_in.bias": one}), "1 of its 2 keys not used"),
    ]


def test_what_is_no_adapter_is_refused_and_changes_nothing(pipe, tmp_path):
    before = digest(pipe)
    for given, message in cases(tmp_path):
        with pytest.raises(RequestError, match=message):
            attach(pipe, given)
        assert attached(pipe) is None
    with pytest.raises(RequestError, match="takes no norm_strength: it is no system's official file"):
        attach(pipe, ResAdapter(), norm_strength=0.5)
    with pytest.raises(RequestError, match="no adapter is attached to this UNet2DConditionModel"):
        detach(pipe)
    attach(pipe, ResAdapter(rank=4), name="one")
    with pytest.raises(RequestError, match="adapter name 'one': it is taken"):
        attach(pipe, ResAdapter(rank=4), name="one")
    with pytest.raises(RequestError, match="no adapter 'two'; loaded: one"):
        detach(pipe, "two")
    assert attached(pipe).active == ("one",)
    with pytest.raises(RequestError, match="SimpleNamespace has no UNet of Stable Diffusion's kind .it has vae"):
        attach(SimpleNamespace(components={"vae": None}), ResAdapter())
    assert digest(pipe) == before
