"""What must hold of Cloud-Adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modalities.images.backbones import SAMEncoder, TimmResNet, TimmViT
from modalities.remote_sensing.cloud_adapter import CloudAdapter, Interact, SpatialPerception, load_official
from modalities.remote_sensing.heads import LightDecoder
from shared import RequestError, adapt, store, trainable
from shared.adapted import Adapted

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2}
SMALL_VIT = {"name": "vit_tiny_patch16_224", "weights": "random", "normed": False, "model_args": SMALL}


def small(bands: int = 3, image_size: int = 64, method: CloudAdapter | None = None, head=None, **more) -> Adapted:
    backbone = TimmViT(bands, image_size=image_size, **SMALL_VIT, **more)
    return adapt(backbone, method or CloudAdapter(width=6, rank=3), head=head)


def parts(model: Adapted) -> tuple[SpatialPerception, list[Interact]]:
    whole, *blocks = model.bank["default"].values()
    return whole.cnn, blocks


def noisy(model: Adapted) -> Adapted:
    with torch.no_grad():
        for name, tensor in model.trained_state().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * (0.3 if "running_var" in name else 0.1))
    return model


@pytest.mark.parametrize(
    ("name", "total", "per_block"),
    [
        ("vit_large_patch14_dinov2", 1_828_425, 67_584),
        ("vit_base_patch14_dinov2", 919_113, 59_392),
        ("vit_small_patch14_dinov2", 771_657, 47_104),
    ],
)
def test_published_counts(name, total, per_block) -> None:
    with torch.device("meta"):
        model = adapt(TimmViT(3, name=name, image_size=512, patch_size=16), CloudAdapter())
    cnn, blocks = parts(model)
    assert model.count()["adapter"] == total
    assert sum(p.numel() for p in cnn.parameters()) == 206_409
    assert {sum(p.numel() for p in block.parameters()) for block in blocks} == {per_block}


def test_the_class_token_passes_unchanged() -> None:
    model = noisy(small()).eval()
    _, blocks = parts(model)
    tokens = torch.randn(2, 1 + 16, 24)
    read = blocks[0].read(tokens, torch.randn(2, 6, 4, 4), (4, 4))
    assert torch.equal(read[:, 0], tokens[:, 0])
    assert not torch.allclose(read[:, 1:], tokens[:, 1:], atol=1e-3)


def test_zero_output_projections_give_the_frozen_model() -> None:
    model, image = small().eval(), torch.randn(2, 3, 64, 64)
    for block in parts(model)[1]:
        torch.nn.init.zeros_(block.attn.to_out.loramlp[1].weight)
    ours = model(image)
    with model.disabled():
        frozen = model(image)
    assert all(torch.equal(a, b) for a, b in zip(ours.maps, frozen.maps, strict=True))


def test_the_host_is_frozen_and_in_eval_mode_beside_training_norms() -> None:
    model = small().train()
    cnn, _ = parts(model)
    before = cnn.spp_dw[2].bn1.running_mean.clone()
    model(torch.randn(2, 3, 64, 64)).maps[-1].sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert not any(m.training for m in model.backbone.modules())
    assert all(m.training for m in cnn.modules())
    assert not torch.equal(cnn.spp_dw[2].bn1.running_mean, before)
    assert all(p.grad is not None for p in trainable(model).values())


def test_the_side_network_runs_once_an_image_at_a_sixteenth() -> None:
    model, shapes = small().eval(), []
    cnn, _ = parts(model)
    cnn.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model(torch.randn(2, 3, 96, 64))
    assert shapes == [(2, 6, 6, 4)]


def test_released_shapes() -> None:
    cnn = SpatialPerception(3, 64, 4, "sum", False)
    assert cnn.proj_1x1.conv_dw.weight.shape == (3, 1, 1, 1)
    assert [stage.conv_dw.weight.shape for stage in cnn.spp_dw] == [(64, 64, 3, 3)] * 5
    assert [stage.conv_dw.stride for stage in cnn.spp_dw] == [(1, 1)] + [(2, 2)] * 4
    assert [stage.skip for stage in cnn.spp_dw] == [True, False, False, False, False]


def test_in_eval_mode_the_side_network_is_affine_and_with_relu_it_is_not() -> None:
    x, y = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64).unbind()
    for relu in (False, True):
        cnn = SpatialPerception(3, 6, 3, "sum", relu).double().eval()
        mixed, apart = cnn(0.3 * x + 0.7 * y), 0.3 * cnn(x) + 0.7 * cnn(y)
        assert torch.allclose(mixed, apart, atol=1e-9) is not relu


def test_the_sum_pools_every_stage_to_the_last() -> None:
    image = torch.randn(1, 3, 32, 32)
    torch.manual_seed(0)
    cnn = SpatialPerception(3, 6, 2, "multi", False).eval()
    stages = cnn(image)
    stem = cnn.spp_dw[0](cnn.proj_1x1(image))
    expected = F.adaptive_avg_pool2d(stem, 8) + F.adaptive_avg_pool2d(stages[0], 8) + stages[1]
    cnn.aggregate = "sum"
    assert torch.allclose(cnn(image), expected, atol=1e-5)
    cnn.aggregate = "last"
    assert torch.equal(cnn(image), stages[1])


def test_on_the_same_grid_nothing_is_resized() -> None:
    _, blocks = parts(noisy(small()))
    tokens, cloud = torch.randn(2, 17, 24), torch.randn(2, 6, 4, 4)
    resized = F.interpolate(cloud, (4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(blocks[0].read(tokens, cloud, (4, 4)), blocks[0].read(tokens, resized, (4, 4)))
    assert blocks[0].read(tokens, torch.randn(2, 6, 8, 8), (4, 4)).shape == tokens.shape


def test_multi_gives_each_quarter_of_the_blocks_its_stage() -> None:
    backbone = TimmViT(3, image_size=64, **SMALL_VIT | {"model_args": SMALL | {"depth": 8}})
    model = adapt(backbone, CloudAdapter(width=6, rank=3, aggregate="multi"))
    assert [block.stage for block in parts(model)[1]] == [0, 0, 1, 1, 2, 2, 3, 3]
    model(torch.randn(2, 3, 64, 64)).maps[-1].sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_the_file_holds_the_adapter_and_the_head_alone(tmp_path) -> None:
    class Head(torch.nn.Linear):
        """A linear head on the summary."""

        def forward(self, features, size) -> Tensor:
            return super().forward(features.summary)

    model = noisy(small(head=Head(24, 2)))
    model.save(tmp_path / "a.safetensors")
    tensors = store.read_header(tmp_path / "a.safetensors")["tensors"]
    assert {name.partition(".")[0] for name in tensors} == {"adapter", "head"}
    assert len(tensors) == 2 + len(model.bank.state_dict())
    other = small(head=Head(24, 2))
    other.load(tmp_path / "a.safetensors")
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(other.eval()(image), model.eval()(image))


@pytest.mark.parametrize("bands", [1, 8])
def test_any_number_of_bands(bands) -> None:
    model = small(bands)
    assert parts(model)[0].proj_1x1.conv_dw.weight.shape == (bands, 1, 1, 1)
    assert model(torch.randn(2, bands, 64, 64)).maps[-1].shape == (2, 24, 4, 4)


def released(model: Adapted) -> dict[str, Tensor]:
    """A checkpoint of the released layout: adapter, a frozen weight, a head weight."""
    cnn, blocks = parts(model)
    named = [("cnn", cnn), *((f"net.{j}", block) for j, block in enumerate(blocks))]
    state = {
        f"backbone.cloud_adapter.{at}.{name}": torch.rand_like(tensor.float()).to(tensor)
        for at, module in named
        for name, tensor in module.state_dict().items()
    }
    return state | {"decode_head.query_embed.weight": torch.zeros(2, 2), "backbone.cls_token": torch.zeros(1, 1, 24)}


@pytest.mark.parametrize("wrap", [False, True])
def test_released_weights_load_by_their_names(tmp_path, wrap) -> None:
    model = small()
    state = released(model)
    torch.save({"state_dict": state, "meta": {"epoch": 1}} if wrap else state, tmp_path / "released.pth")
    left = load_official(model, tmp_path / "released.pth")
    assert sorted(left) == ["backbone.cls_token", "decode_head.query_embed.weight"]
    cnn, blocks = parts(model)
    assert torch.equal(cnn.spp_dw[3].conv_pw.weight, state["backbone.cloud_adapter.cnn.spp_dw.3.conv_pw.weight"])
    name = "backbone.cloud_adapter.net.2.attn.to_k.loramlp.1.weight"
    assert torch.equal(blocks[2].attn.to_k.loramlp[1].weight, state[name])


def test_released_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    model = small()
    state = released(model)
    cases = {
        "1 missing": {n: t for n, t in state.items() if n != "backbone.cloud_adapter.cnn.proj_1x1.bn1.weight"},
        "no Cloud-Adapter tensor for a model with 4 adapted blocks": state
        | {"backbone.cloud_adapter.net.4.x": torch.ones(1)},
        "none of its 1 tensors is a Cloud-Adapter's": {"backbone.cls_token": torch.ones(1)},
        "1 unknown tensors": state | {"optimizer.step": torch.ones(1)},
    }
    before = {n: t.clone() for n, t in model.trained_state().items()}
    for message, bad in cases.items():
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path / "bad.pth")
    (tmp_path / "noise.pth").write_bytes(b"0" * 100)
    with pytest.raises(RequestError, match="not a readable checkpoint"):
        load_official(model, tmp_path / "noise.pth")
    with pytest.raises(RequestError, match="no such file; the weights are on the hub"):
        load_official(model, tmp_path / "absent.pth")
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())


@pytest.mark.parametrize("bad", [{"rank": -1}, {"width": 0}, {"stages": 0}])
def test_impossible_settings(bad) -> None:
    with pytest.raises(RequestError, match="use at least 1"):
        CloudAdapter(**bad)


def test_blocks_of_maps_are_refused_in_words() -> None:
    with pytest.raises(RequestError, match=r"CloudAdapter acts on tokens \(BNC or BHWC\); .* has BCHW"):
        adapt(TimmResNet(3, name="resnet18", weights="random"), CloudAdapter())


def sam(bands: int = 3, head=None, **more) -> Adapted:
    settings = {"size": "tiny", "weights": "random", "depths": [0, 1, 2, 3], "neck": False} | more
    return adapt(SAMEncoder(bands, **settings), CloudAdapter(width=6, stages=3, rank=3), head=head)


@pytest.mark.parametrize(
    ("size", "total", "per_block"),
    [("vit_b", 919_113, 59_392), ("vit_l", 1_828_425, 67_584), ("vit_h", 2_631_241, 75_776)],
)
def test_counts_on_segment_anything(size, total, per_block) -> None:
    """Of its widths and depths by the published formula: those of DINOv2-B and -L, and 1280 wide with 32 blocks."""
    with torch.device("meta"):
        model = adapt(SAMEncoder(3, size=size, image_size=512, neck=False), CloudAdapter())
    cnn, blocks = parts(model)
    assert model.count()["adapter"] == total == sum(p.numel() for p in cnn.parameters()) + len(blocks) * per_block
    assert {sum(p.numel() for p in block.parameters()) for block in blocks} == {per_block}
    assert len(model.backbone.channels) == 4


@torch.no_grad()
def test_on_segment_anything_each_whole_block_is_followed_by_a_reading_of_the_map() -> None:
    """Windows are the block's own business: tokens (B, h, w, E) of any grid are read as h * w without a prefix."""
    model, image = noisy(sam()).eval(), torch.randn(2, 3, 48, 80)
    (cnn, blocks), bare = parts(model), SAMEncoder(3, size="tiny", weights="random")
    cloud, tokens = cnn(image), bare.embed(image).tokens
    assert cloud.shape == (2, 6, 6, 10)
    assert tokens.shape == (2, 6, 10, 32)
    ours = model(image).maps
    for block, adapter, found in zip(bare.blocks, blocks, ours, strict=True):
        tokens = block(tokens)
        read = adapter.attn(tokens.reshape(2, 60, 32), cloud.reshape(2, 6, 60).transpose(1, 2))
        tokens = tokens + read.reshape(2, 6, 10, 32)
        assert torch.allclose(found, tokens.permute(0, 3, 1, 2), atol=1e-5)
    assert [tuple(m.shape) for m in ours] == [(2, 32, 6, 10)] * 4


def test_on_segment_anything_zero_output_projections_give_the_frozen_encoder_and_others_do_not() -> None:
    model, image = sam().eval(), torch.randn(2, 3, 64, 64)
    bare = SAMEncoder(3, size="tiny", weights="random", depths=[0, 1, 2, 3], neck=False)(image)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(model(image).maps, bare.maps, strict=True))
    for block in parts(model)[1]:
        torch.nn.init.zeros_(block.attn.to_out.loramlp[1].weight)
    assert all(torch.equal(a, b) for a, b in zip(model(image).maps, bare.maps, strict=True))


@pytest.mark.parametrize("bands", [3, 8])
def test_on_segment_anything_adapter_and_head_alone_train(bands) -> None:
    backbone = SAMEncoder(bands, size="tiny", weights="random", neck=False)
    model = adapt(backbone, CloudAdapter(width=6, stages=3, rank=3), head=LightDecoder(backbone.channels, 4, width=8))
    model.train()
    mask = torch.randint(2, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    image = torch.randn(2, bands, 64, 64) + 2 * mask[:, None]
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=0.02)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        losses.append(model.head.loss(model(image), mask))
        losses[-1].backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    own = {id(p) for p in model.trainable().values()}
    assert moved == {name for name, p in model.named_parameters() if id(p) in own}
    assert all(p.grad is None for p in model.backbone.parameters() if id(p) not in own)
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.trainable().values())
    assert losses[-1] < 0.7 * losses[0]


def test_on_segment_anything_released_names_load_and_multi_gives_quarters(tmp_path) -> None:
    model = sam()
    state = released(model)
    torch.save(state, tmp_path / "released.pth")
    load_official(model, tmp_path / "released.pth")
    name = "backbone.cloud_adapter.net.3.attn.to_v.loramlp.0.weight"
    assert torch.equal(parts(model)[1][3].attn.to_v.loramlp[0].weight, state[name])
    encoder = SAMEncoder(3, size="tiny", weights="random")
    several = adapt(encoder, CloudAdapter(width=6, stages=4, rank=3, aggregate="multi"))
    assert [block.stage for block in parts(several)[1]] == [0, 1, 2, 3]
    assert [tuple(m.shape) for m in several(torch.randn(1, 3, 64, 64)).maps] == [(1, 32, 8, 8)] * 3
