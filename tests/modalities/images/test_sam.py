"""Segment Anything as a backbone: the library's own numbers, sites in place, weights by their published names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modalities.images.backbones import SAM, Prompts, SAMEncoder
from shared import LoRA, RequestError, adapt
from shared.methods.adapt_former import AdaptFormer
from shared.methods.bitfit import BitFit
from shared.methods.dora import DoRA
from shared.methods.llm_adapters import SeriesAdapter
from shared.methods.prompts import Prompt
from shared.methods.ssf import SSF


def tiny(bands: int = 3, **more) -> SAM:
    return SAM(bands, size="tiny", weights="random", **more)


def image(bands: int = 3, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, bands, height, width)


def two_objects(height: int = 64, width: int = 64) -> Prompts:
    """Two points and a box for each of two objects in two images."""
    size = torch.tensor([width, height])
    points, labels = torch.rand(2, 2, 2, 2) * size, torch.randint(0, 2, (2, 2, 2))
    corner = torch.rand(2, 2, 2) * size / 2
    return Prompts(points, labels, torch.cat([corner, corner + size / 3], -1), None)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_have_the_tensors_of_the_registry(size) -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours, theirs = SAM(3, size=size).sam.state_dict(), sam_model_registry[size]().state_dict()
        encoder = SAMEncoder(3, size=size).encoder.state_dict()
    shapes = {key: tensor.shape for key, tensor in theirs.items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == shapes
    assert encoder.keys() == {k.removeprefix("image_encoder.") for k in shapes if k.startswith("image_encoder.")}


def test_lora_on_vit_b_trains_what_the_formula_says() -> None:
    with torch.device("meta"):
        model = adapt(SAM(3, part="encoder"), LoRA(rank=8))
    assert model.count()["adapter"] == 12 * 2 * 8 * (768 + 768)


@torch.no_grad()
def test_at_its_own_size_it_is_the_library() -> None:
    model, picture, asked = tiny(), image(), two_objects()
    embedding = model.encode(picture)
    assert torch.equal(embedding, model.sam.image_encoder(picture))
    for multimask in (False, True):
        found = model(picture, asked, multimask)
        for i in range(2):
            sparse, dense = model.sam.prompt_encoder((asked.points[i], asked.labels[i]), asked.boxes[i], None)
            logits, iou = model.sam.mask_decoder(
                embedding[i : i + 1], model.sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask
            )
            assert torch.equal(found.logits[i], logits)
            assert torch.equal(found.iou[i], iou)
    assert found.logits.shape == (2, 2, 3, 32, 32)


@torch.no_grad()
def test_masks_are_prompts_and_no_prompts_ask_for_everything() -> None:
    model, picture = tiny(), image()
    masks = torch.randn(2, 1, 1, 32, 32)
    by_mask = model(picture, Prompts(masks=masks)).logits
    assert not torch.allclose(by_mask, model(picture, Prompts(masks=-masks)).logits, atol=1e-4)
    assert model(picture).logits.shape == (2, 1, 1, 32, 32)


@torch.no_grad()
def test_an_image_of_another_size_meets_resampled_positions() -> None:
    model = tiny()
    picture = image(3, 40, 96)
    assert model(picture, two_objects(40, 96)).logits.shape == (2, 2, 1, 20, 48)
    assert model.sam.prompt_encoder.input_image_size == (64, 64)  # as it was, for SamPredictor
    torch.nn.init.constant_(model.sam.image_encoder.pos_embed, 0.3)
    with_constant = model.encode(picture)
    torch.nn.init.zeros_(model.sam.image_encoder.pos_embed)
    model.sam.image_encoder.patch_embed.proj.bias.add_(0.3)
    assert torch.allclose(with_constant, model.encode(picture), atol=1e-5)


def test_what_does_not_fit_is_one_line() -> None:
    model = tiny()
    cases = {
        "image height 60 is no multiple of its patch": (image(3, 60, 64), None),
        "images must be .batch, 3 bands": (image(4), None),
        r"point \(70, 3\) lies outside the image, 64 pixels wide and 64 high": (
            image(),
            Prompts(torch.tensor([70.0, 3.0]).expand(2, 1, 1, 2), torch.ones(2, 1, 1)),
        ),
        r"box corner \(5, -1\) lies outside": (image(), Prompts(boxes=torch.tensor([5.0, -1, 9, 9]).expand(2, 1, 4))),
        "a box ends before it begins": (image(), Prompts(boxes=torch.tensor([9.0, 9, 5, 10]).expand(2, 1, 4))),
        "points need labels": (image(), Prompts(torch.ones(2, 1, 1, 2))),
        "want the batch of 2 images": (image(), Prompts(boxes=torch.tensor([5.0, 1, 9, 9]).expand(3, 1, 4))),
        "masks 1 x 64 x 64, for this image 1 x 32 x 32": (image(), Prompts(masks=torch.zeros(2, 1, 1, 64, 64))),
    }
    for message, arguments in cases.items():
        with pytest.raises(RequestError, match=message):
            model(*arguments)
    ignored = Prompts(torch.tensor([70.0, 3.0]).expand(2, 1, 1, 2), -torch.ones(2, 1, 1))
    assert model(image(), ignored).logits.isfinite().all()  # a point that says nothing may lie anywhere


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A file of the layout of the published ones, and its tensors."""
    state = {key: tensor + 0.01 for key, tensor in tiny(seed=3).sam.state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    return str(tmp_path / "sam.pth"), state


def test_published_files_load_whole_or_the_encoder_alone(published) -> None:
    file, state = published
    model = SAM(3, size="tiny", checkpoint=file)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.sam.state_dict().items())
    assert model.source == f"file: {file}"
    encoder = SAMEncoder(3, size="tiny", checkpoint=file)
    picture = image()
    with torch.no_grad():
        assert torch.equal(encoder(picture).maps[-1], model.encode(picture))


@torch.no_grad()
def test_six_bands_start_as_two_rgb_images(published) -> None:
    file, _ = published
    rgb, six = SAM(3, size="tiny", checkpoint=file), SAM(6, size="tiny", checkpoint=file)
    picture = image()
    assert torch.allclose(six.encode(torch.cat([picture, picture], 1)), rgb.encode(picture), atol=1e-5)
    assert six.statistics is None
    assert rgb.statistics == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def test_another_image_size_resamples_stored_positions(published) -> None:
    file, state = published
    larger = SAM(3, size="tiny", image_size=96, checkpoint=file).sam.image_encoder
    assert larger.pos_embed.shape == (1, 12, 12, 32)
    assert larger.blocks[1].attn.rel_pos_h.shape == (23, 16)
    assert torch.equal(larger.blocks[0].attn.rel_pos_h, state["image_encoder.blocks.0.attn.rel_pos_h"])  # a window's
    table = state["image_encoder.pos_embed"]
    assert torch.allclose(
        larger.pos_embed.detach()[0, 4:8, 4:8].mean((0, 1)), table[0, 3:5, 3:5].mean((0, 1)), atol=0.02
    )


def test_wrong_weights_are_one_line(published, tmp_path) -> None:
    file, state = published
    torch.save({k: t for k, t in state.items() if "iou_token" not in k}, tmp_path / "short.pth")
    cases = [
        ("give checkpoint=FILE", {"size": "tiny"}),
        ("exclude each other", {"size": "tiny", "weights": "random", "checkpoint": file}),
        ("1 missing .mask_decoder.iou_token.weight", {"size": "tiny", "checkpoint": str(tmp_path / "short.pth")}),
        ("no SAM of ours; there are vit_b", {"size": "vit_x"}),
        ("image height 60 is no multiple", {"size": "tiny", "image_size": 60, "weights": "random"}),
    ]
    for message, arguments in cases:
        with pytest.raises(RequestError, match=message):
            SAM(3, **arguments)


def test_a_published_size_without_weights_says_where_they_are(monkeypatch) -> None:
    from modalities.images.backbones.sam import building

    small = building.SHAPES["tiny"]._replace(url=building.SHAPES["vit_b"].url)
    monkeypatch.setitem(building.SHAPES, "vit_b", small)
    with pytest.raises(RequestError, match="download https://.*/sam_vit_b_01ec64.pth and give it as checkpoint=FILE"):
        SAM(3)


# -- sites -------------------------------------------------------------------------------------------------------------


def test_sites_of_each_part() -> None:
    encoder, decoder, both = (tiny(part=part).sites() for part in ("encoder", "decoder", "both"))
    assert len(both) == len(encoder) + len(decoder) - 1  # the model itself is in both
    assert (encoder.depth, decoder.depth, both.depth) == (4, 2, 6)
    assert all("encoder" in site.tags for site in encoder if site.role != "model")
    assert {site.layout for site in encoder.select(["block", "attention", "mlp"])} == {"BHWC"}
    assert [s.tags[0] for s in encoder.select("attention")] == ["window", "global", "window", "global"]
    assert [site.rows for site in encoder.select("attention.value", 0)] == [(64, 96)]
    assert len(decoder.select("attention")) == 2 * 3 + 1
    assert len(decoder.select("attention.query", tags="token_to_image")) == 3
    assert len(decoder.select("norm")) == 2 * (2 * 4 + 1)
    assert decoder.select("attention.value", tags="self")[0].width == 32
    assert decoder.select("attention.value", tags="image_to_token")[0].width == 16
    assert len({site.key for site in both}) == len(both)
    modules = dict(tiny().named_modules())
    assert all(site.path in modules for site in both)


def test_an_adapter_of_a_windowed_attention_sees_windows_with_their_padding() -> None:
    model, shapes = adapt(tiny(part="encoder"), SeriesAdapter(width=4, roles=("attention.output",))), []
    for module in model.bank["default"].values():
        module.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    model(image())
    assert shapes[0] == (2 * 9, 3, 3, 32)  # 8 x 8 tokens, filled up to 9 x 9, in nine windows
    assert shapes[1] == (2, 8, 8, 32)


METHODS = {
    "LoRA": LoRA(rank=2),
    "LoRA on all": LoRA(rank=2, roles=("attention.query", "attention.key", "attention.output", "mlp.up", "mlp.down")),
    "DoRA": DoRA(rank=2),
    "AdaptFormer": AdaptFormer(width=4, dropout=0.0),
    "SSF": SSF(),
    "BitFit": BitFit(),
}


@pytest.mark.parametrize("part", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_attach_to_either_part(name, part) -> None:
    backbone, picture, asked = tiny(part=part), image(), two_objects()
    with torch.no_grad():
        bare = backbone(picture, asked, True)
    model = adapt(backbone, METHODS[name])
    ours = model(picture, asked, True)
    assert torch.allclose(ours.logits, bare.logits, atol=1e-5)  # the identity at the start
    for parameter in model.bank["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moved = model(picture, asked, True)
    assert not torch.allclose(moved.logits, bare.logits, atol=1e-3)
    (moved.logits.square().mean() + moved.iou.square().mean()).backward()
    assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in model.trainable().values())
    assert all(p.grad is None for p in backbone.parameters())
    paths = {key.split("/")[1] for key in model.bank["default"]}
    assert paths == {"encoder": {"image_encoder"}, "decoder": {"mask_decoder"}}.get(
        part, {"image_encoder", "mask_decoder"}
    )


def test_prompt_tokens_find_no_place_in_windows() -> None:
    with pytest.raises(RequestError, match="has layout BHWC: prompts go between tokens"):
        adapt(tiny(), Prompt())


@torch.no_grad()
def test_the_encoder_alone_gives_maps() -> None:
    backbone, picture = SAMEncoder(4, size="tiny", weights="random"), image(4, 48, 64)
    found = backbone(picture)
    assert [tuple(m.shape) for m in found.maps] == [(2, 32, 6, 8)] * 3
    assert backbone.channels == (32, 32, 32)
    assert backbone.depths == (1, 3)
    assert torch.equal(found.summary, found.maps[-1].mean((2, 3)))
    picture = image(4)
    assert torch.equal(backbone(picture).maps[-1], backbone.encoder(picture))
    chosen = SAMEncoder(4, size="tiny", weights="random", depths=[-1, 0])
    assert chosen.depths == (0, 3)
    with pytest.raises(RequestError, match="blocks 0 to 3"):
        SAMEncoder(4, size="tiny", weights="random", depths=[4])
    bare = SAMEncoder(4, size="tiny", weights="random", neck=False)
    assert bare.channels == (32, 32)
    assert all(torch.equal(a, b) for a, b in zip(bare(picture).maps, backbone(picture).maps[:2], strict=True))
    assert torch.equal(bare(picture).summary, backbone(picture).summary)
    with pytest.raises(RequestError, match="no map is left: name a block in depths, or keep the neck"):
        SAMEncoder(4, size="tiny", weights="random", depths=[], neck=False)


@torch.no_grad()
def test_samples_may_use_different_adapters() -> None:
    model, picture, asked = adapt(tiny(), LoRA(rank=2)), image(), two_objects()
    for parameter in model.bank["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mixed, whole = model(picture, asked, adapters=[None, "default"]), model(picture, asked)
    with model.disabled():
        bare = model(picture, asked)
    assert torch.allclose(mixed.logits[0], bare.logits[0], atol=1e-5)
    assert torch.allclose(mixed.logits[1], whole.logits[1], atol=1e-5)
