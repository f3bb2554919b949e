"""OpenClipTower: open_clip's own numbers, sites of its attention, weights by tag or file, strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modalities.images.backbones import OpenClipTower
from shared import adapt
from shared.errors import RequestError
from shared.methods import LoRA

VISION = {"width": 48, "layers": 4, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"width": 16, "layers": 1, "heads": 1, "vocab_size": 9, "context_length": 4}
TINY = {"embed_dim": 24} | {key: value for key, value in VISION.items() if key != "image_size"}
NAMES = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-bigG-14-CLIPA", "coca_ViT-B-32")
LINEAR = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    """A folder with the configuration of a small CLIP model, known to open_clip as "tiny-clip", and its weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(5)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "clip.pth")
    return folder


def tower(name: str = NAMES[0], bands: int = 3, **options) -> OpenClipTower:
    arguments: dict[str, Any] = {"image_size": 32, "pretrained": "random", "model_args": TINY} | options
    return OpenClipTower(bands, name=name, **arguments).eval()


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_library_bit_for_bit_on_a_grid_that_is_not_square(name):
    backbone, image = tower(name, image_size=(24, 40), depths=(1, 3)), torch.randn(2, 3, 24, 40)
    pools_by_attention = backbone.tower.attn_pool is not None
    with torch.no_grad():
        maps, summary = backbone(image)
        expected = backbone.tower.forward_intermediates(
            image, indices=[1, 3], normalize_intermediates=not pools_by_attention
        )
        raw = backbone.tower.forward_intermediates(image, indices=[1, 3])["image_intermediates"]
        backbone.normed = False
        plain = backbone(image).maps
    assert [m.shape for m in maps] == [(2, 48, 3, 5)] * 2
    assert all(torch.equal(a, b) for a, b in zip(maps, expected["image_intermediates"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, raw, strict=True))
    assert torch.equal(summary, expected["image_features"])
    assert summary.shape == (2, backbone.summary_width) == (2, 24)


@pytest.mark.parametrize("size", [32, 48, (24, 40)])
def test_a_checkpoint_gives_what_encode_image_gives_at_any_size(size, tiny_clip):
    file = str(tiny_clip / "clip.pth")
    clip: Any = open_clip.create_model("tiny-clip", pretrained=file, force_image_size=size).eval()
    backbone = OpenClipTower(3, name="tiny-clip", checkpoint=file, image_size=size).eval()
    image = torch.randn(2, 3, *backbone.image_size)
    with torch.no_grad():
        assert torch.equal(backbone(image).summary, clip.encode_image(image))
    assert backbone.source == f"file: {file}"


def test_positions_of_a_square_grid_are_resampled_to_another_shape_of_equal_length(tiny_clip):
    state = torch.load(tiny_clip / "clip.pth")["visual.positional_embedding"]
    backbone = OpenClipTower(3, name="tiny-clip", checkpoint=str(tiny_clip / "clip.pth"), image_size=(16, 64))
    grid = state[1:].T.reshape(1, 48, 4, 4)
    resampled = nn.functional.interpolate(grid, size=(2, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(backbone.tower.positional_embedding[1:].T.reshape(1, 48, 2, 8), resampled)
    assert torch.equal(backbone.tower.positional_embedding[0], state[0])


def test_a_file_of_the_tower_alone_and_one_of_an_oblong_grid(tmp_path):
    backbone = tower(image_size=(16, 40), seed=9)
    save_file({f"module.{n}": t for n, t in backbone.tower.state_dict().items()}, tmp_path / "tower.safetensors")
    again = tower(image_size=(16, 40), pretrained=None, checkpoint=str(tmp_path / "tower.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))
    with pytest.raises(RequestError, match="10 positions, which form no square grid"):
        tower(image_size=32, pretrained=None, checkpoint=str(tmp_path / "tower.safetensors"))


def test_other_bands_than_rgb(tiny_clip):
    file = tiny_clip / "clip.pth"
    rgb = torch.load(file)["visual.conv1.weight"]
    backbone = OpenClipTower(6, name="tiny-clip", checkpoint=str(file)).eval()
    torch.testing.assert_close(backbone.tower.conv1.weight.detach(), rgb.repeat(1, 2, 1, 1) / 2)
    assert backbone(torch.randn(1, 6, 32, 32)).summary.shape == (1, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if "visual.proj" not in n}, r"1 missing \(proj\)"),
        (lambda s: s | {"visual.more": torch.ones(1)}, r"1 unexpected \(more\)"),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("visual.")}, "0 of the 56 tensors of tiny-clip"),
    ],
)
def test_a_file_that_does_not_fit_says_what_is_wrong(change, message, tiny_clip, tmp_path):
    torch.save(change(torch.load(tiny_clip / "clip.pth")), tmp_path / "wrong.pth")
    with pytest.raises(RequestError, match=message):
        OpenClipTower(3, name="tiny-clip", checkpoint=str(tmp_path / "wrong.pth"))


def test_a_tag_comes_from_the_hub_cache_with_the_activation_it_was_trained_with(tiny_clip, monkeypatch):
    asked: list[tuple] = []
    file = str(tiny_clip / "clip.pth")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: asked.append(args) or file)
    openai, laion = (tower(pretrained=tag) for tag in ("openai", "laion2b_s34b_b79k"))
    assert asked[0] == ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    assert (openai.source, laion.source) == ("open_clip: openai", "open_clip: laion2b_s34b_b79k")
    local = tower(pretrained="openai", checkpoint=file)
    assert local.source == f"file: {file}"
    kinds = [type(backbone.tower.transformer.resblocks[0].mlp.gelu).__name__ for backbone in (openai, laion, local)]
    assert kinds == ["QuickGELU", "GELU", "QuickGELU"]


def test_without_a_network_the_error_says_how_to_get_the_weights(monkeypatch):
    def offline():
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("huggingface_hub.get_session", offline)
    command = "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K open_clip_model.safetensors"
    with pytest.raises(RequestError, match=f"`{command}` and add checkpoint=FILE with the path it prints"):
        tower(pretrained="laion2b_s34b_b79k")


@pytest.mark.parametrize(
    ("name", "bands", "parameters"),
    [("ViT-B-32", 3, 87_849_216), ("ViT-L-14", 3, 303_966_208), ("ViT-B-16", 4, 86_192_640 + 768 * 16 * 16)],
)
def test_published_sizes_on_the_meta_device(name, bands, parameters):
    with torch.device("meta"):
        backbone = OpenClipTower(bands, name=name, pretrained="random")
    assert sum(p.numel() for p in backbone.parameters()) == parameters


def test_random_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    first, again, other = tower(seed=3), tower(seed=3), tower(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.tower.conv1.weight, other.tower.conv1.weight)
    line = "OpenClipTower(ViT-B-32, 3 bands, image 32 x 32, patch 8 x 8, maps after blocks (0, 1, 2, 3), weights: "
    assert repr(first) == line + "random (seed 3))"


@pytest.mark.parametrize("name", NAMES)
def test_sites(name):
    backbone = tower(name)
    sites = backbone.sites()
    assert all(backbone.get_submodule(site.path) is site.module for site in sites)
    assert len({site.key for site in sites}) == len(sites)
    assert all(sum(site.role == role for site in sites) == 4 for role in ("block", "attention", "mlp", *LINEAR))
    assert {site.prefix for site in sites if site.role in LINEAR} == {1}
    rows = [site.rows for role in LINEAR[:3] for site in sites.select(role, 2)]
    assert rows == [(0, 48), (48, 96), (96, 144)]
    assert [site.path for site in sites.select("norm", tags="final")] == ["tower.ln_post"] * 2
    model = adapt(backbone, LoRA(rank=2, roles=LINEAR))  # ends with the proof that every adapter acts
    assert len(list(model.bank["default"].children())) == 24


def test_query_key_and_value_sites_change_just_that(monkeypatch):
    backbone, image = tower(model_args=TINY | {"layers": 1}), torch.randn(1, 3, 32, 32)
    seen: list[tuple] = []
    attend = nn.functional.scaled_dot_product_attention
    spy = lambda q, k, v, *more, **named: seen.append((q, k, v)) or attend(q, k, v, *more, **named)  # noqa: E731
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)

    def first_attention() -> tuple:
        seen.clear()
        backbone(image)  # with gradients, so that torch takes no fused kernel
        return tuple(t.detach().clone() for t in seen[0])

    before = first_attention()
    for index, role in enumerate(LINEAR[:3]):
        weight = backbone.sites().select(role)[0].weight.detach()
        kept = weight.clone()
        weight.mul_(1.5)
        assert [not torch.equal(a, b) for a, b in zip(first_attention(), before, strict=True)] == [
            index == i for i in range(3)
        ]
        weight.copy_(kept)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ViT-B-33", {}, "no model of open_clip; nearest: ViT-B-32"),
        ("RN50", {}, "not open_clip's VisionTransformer"),
        ("ViT-B-16-SigLIP", {}, r"try TimmViT\(name='vit_base_patch16_siglip_224'\)"),
        ("ViT-B-32", {"pretrained": "laion"}, "no weights 'laion'; open_clip has openai, "),
        ("ViT-B-32", {"pretrained": None}, r"give a checkpoint, a tag as pretrained \(openai, "),
        ("ViT-B-32", {"checkpoint": "x.pth"}, "or pretrained='random' alone"),
        ("ViT-B-32", {"image_size": (32, 50)}, "width 50 is no multiple of its patch of 8 pixels; 48 and 56 are"),
        ("ViT-B-32", {"model_args": {"widht": 4}}, "model_args has no 'widht'; nearest: width"),
        ("ViT-B-32", {"model_args": {"timm_model_name": "x"}}, "model_args has no 'timm_model_name'"),
        (
            "ViT-B-32",
            {"image_size": None, "model_args": {"layers": [1, 1, 1, 1], "width": 32}},
            "no vision transformer; use one number",
        ),
        ("ViT-B-32", {"model_args": TINY | {"qk_norm": True}}, "only open_clip's default blocks"),
        ("ViT-B-32", {"depths": [4]}, r"depths \[4\] of ViT-B-32: it has blocks 0 to 3"),
    ],
)
def test_wrong_requests_say_what_would_be_right(name, options, message):
    with pytest.raises(RequestError, match=message):
        tower(name, **options)


def test_wrong_images_are_refused():
    with pytest.raises(RequestError, match=r"image 32 x 40, but the tower is made for 32 x 32; give image_size"):
        tower()(torch.randn(1, 3, 32, 40))
    with pytest.raises(RequestError, match="4 bands"):
        tower(bands=4)(torch.randn(1, 3, 32, 32))
