"""What must hold of AdapterShadow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modalities.images.adapter_shadow import (
    AdapterShadow,
    focal_loss,
    grid_points,
    load_official,
    weighted_cross_entropy,
)
from modalities.images.backbones import SAM, SAMEncoder
from modalities.images.shadow_detector import ShadowDetector
from shared import RequestError, adapt, taxonomy
from shared.adapted import Adapted

SMALL = {"grid": 4, "subsample": 2, "detector": "test_efficientnet", "detector_weights": "random"}


def small(**more) -> Adapted:
    return adapt(SAM(3, size="tiny", weights="random"), AdapterShadow(**{**SMALL, **more}))


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width)


def bottlenecks(model: Adapted) -> dict[str, torch.nn.Module]:
    return {key: m.branch for key, m in model.bank["default"].items() if hasattr(m, "branch")}


# -- the blocks --------------------------------------------------------------------------------------------------------


def test_published_count_and_where_the_rest_trains() -> None:
    with torch.device("meta"):
        model = adapt(SAM(3), AdapterShadow())
    assert sum(p.numel() for branch in bottlenecks(model).values() for p in branch.parameters()) == 7_100_928
    assert len(bottlenecks(model)) == 24
    assert all(name.startswith("adapter.") for name in model.trainable())
    method = model.methods["default"]
    assert model.count()["adapter"] == taxonomy.count(method.record, method, method.sites(model.sites()))
    # Of the mask decoder's 4,058,340 all but three of four mask heads and the head that guesses the IoU.
    decoder = {key for key in model.bank["default"] if key.startswith("sam/mask_decoder")}
    assert not any("iou_prediction_head" in key or "mlps/1" in key for key in decoder)


@pytest.mark.parametrize("depth", [0, 1])  # in windows, and global
def test_without_the_second_layers_the_block_is_the_original(depth) -> None:
    model = small().eval()
    for branch in bottlenecks(model).values():
        torch.nn.init.zeros_(branch.up.weight)
        torch.nn.init.zeros_(branch.up.bias)
    block, tokens = model.backbone.sam.image_encoder.blocks[depth], torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        ours = block(tokens)
        with model.disabled():
            assert torch.equal(ours, block(tokens))


def test_the_adapted_block_is_what_the_paper_writes() -> None:
    model = small().eval()
    block, x = model.backbone.sam.image_encoder.blocks[1], torch.randn(2, 8, 8, 32)
    space, beside = (bottlenecks(model)[f"sam/image_encoder/blocks/1/{name}"] for name in ("attn", "mlp"))

    def bottleneck(branch, x: Tensor) -> Tensor:
        return branch.up(torch.nn.functional.gelu(branch.down(x)))

    with torch.no_grad():
        ours = block(x)
        with model.disabled():
            y = block.attn(block.norm1(x))
            x = x + y + bottleneck(space, y)
            n = block.norm2(x)
            theirs = x + block.mlp(n) + 0.5 * bottleneck(beside, n)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert space.down.weight.shape == (8, 32)


def test_the_adapter_of_a_windowed_block_sees_windows_with_their_padding() -> None:
    model, shapes = small().eval(), {}
    for key, branch in bottlenecks(model).items():

        def note(_, inputs, key=key):
            shapes[key] = tuple(inputs[0].shape)

        branch.register_forward_pre_hook(note)
    model(image())
    assert shapes["sam/image_encoder/blocks/0/attn"] == (2 * 9, 3, 3, 32)
    assert shapes["sam/image_encoder/blocks/1/attn"] == (2, 8, 8, 32)
    assert shapes["sam/image_encoder/blocks/0/mlp"] == (2, 8, 8, 32)


def test_published_padding_normalises_within_the_windows() -> None:
    from segment_anything.modeling.image_encoder import window_partition, window_unpartition

    model = small(padding="norm").eval()
    block, x = model.backbone.sam.image_encoder.blocks[0], torch.randn(2, 8, 8, 32)
    torch.nn.init.normal_(block.norm1.bias)
    space = bottlenecks(model)["sam/image_encoder/blocks/0/attn"]
    model.context.grid = (8, 8)
    with torch.no_grad():
        ours = block.attn(window_partition(block.norm1(x), 3)[0])
        with model.disabled():
            windows, padded = window_partition(x, 3)
            y = block.attn(block.norm1(windows))
            y = y + space(y)
    back = (window_unpartition(t, 3, padded, (8, 8)) for t in (ours, y))
    assert torch.allclose(*back, atol=1e-5)
    kinds = [type(m).__name__ for m in model.bank["default"].values() if hasattr(m, "branch")]
    assert kinds[:4] == [
        "NormedPadding", "Beside", "After", "Beside",
    ]  # fmt: skip


# -- points ------------------------------------------------------------------------------------------------------------


def test_one_point_in_each_cell_at_its_highest_pixel() -> None:
    coarse = torch.randn(3, 1, 32, 48)
    places, labels, values = grid_points(coarse, 4, 0.9)
    assert places.shape == (3, 16, 2)
    for one in range(3):
        for cell, ((row, column), value) in enumerate(zip(places[one].tolist(), values[one].tolist(), strict=True)):
            top, left = cell // 4 * 8, cell % 4 * 12
            assert top <= row < top + 8
            assert left <= column < left + 12
            assert value == coarse[one, 0, top : top + 8, left : left + 12].max() == coarse[one, 0, row, column]
    assert torch.equal(labels, (values > 0.9).float())


def test_on_a_constant_map_the_first_pixel_of_each_cell() -> None:
    places, labels, _ = grid_points(torch.ones(1, 1, 8, 8), 2, 0.9)
    assert places[0].tolist() == [[0, 0], [0, 4], [4, 0], [4, 4]]
    assert labels[0].tolist() == [1, 1, 1, 1]


def test_the_worked_example() -> None:
    coarse = torch.tensor([[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 0, 0.5]])[None, None]
    places, labels, _ = grid_points(coarse, 2, 0.9)
    assert places[0].tolist() == [[0, 1], [1, 2], [3, 0], [3, 3]]
    assert labels[0].tolist() == [1, 1, 1, 0]


def test_points_are_sent_as_x_and_y_or_as_the_released_weights_want() -> None:
    picture = image()
    for order, swap in (("xy", True), ("rc", False)):
        model = small(order=order).eval()
        with torch.no_grad():
            found = model(picture)
            places, labels, _ = grid_points(found.coarse, 4, 0.9)
        assert torch.equal(found.points, (places.flip(-1) if swap else places).float())
        assert torch.equal(found.labels, labels)
    with pytest.raises(RequestError, match="'rc', rows sent as x, is for square images alone"):
        model(image(64, 48))
    assert small()(image(64, 48)).logits.shape == (2, 1, 32, 24)


# -- the prompting network ---------------------------------------------------------------------------------------------


def test_the_prompting_network_reads_the_published_maps() -> None:
    with torch.device("meta"):
        network = ShadowDetector("tf_efficientnet_b1.ap_in1k", "pretrained", None, 0, False)
        assert network.stages == (0, 1, 2, 4)
        maps, last = network._encode(torch.zeros(1, 3, 256, 256))
        assert [tuple(m.shape[1:]) for m in maps] == [(16, 128, 128), (24, 64, 64), (40, 32, 32), (112, 16, 16)]
        assert tuple(last.shape[1:]) == (1280, 8, 8)
        assert [up._net[0].weight.shape[:2] for up in (network.up1, network.up2, network.up3, network.up4)] == [
            (64, 128 + 112), (32, 64 + 40), (16, 32 + 24), (8, 16 + 16),
        ]  # fmt: skip
        assert network(torch.zeros(2, 3, 256, 256), (1024, 1024)).shape == (2, 1, 1024, 1024)


def test_it_learns_from_its_own_loss_alone() -> None:
    model, truth = small().train(), torch.randint(0, 2, (2, 1, 128, 128)).float()
    trained = {n: p for n, p in model.trainable().items() if ".detector." in n}
    assert trained
    assert not any(".encoder." in n for n in trained)  # frozen, as in the released command
    found = model(image(128, 128))
    focal_loss(found.logits, truth).backward(retain_graph=True)
    assert all(p.grad is None for p in trained.values())
    focal_loss(found.coarse, truth).backward()
    moved = {n for n, p in trained.items() if p.grad is not None and bool(p.grad.count_nonzero())}
    assert moved >= {n for n in trained if n.endswith("weight")}  # a bias in front of a batch norm has none


def test_frozen_means_frozen_also_in_the_prompting_network() -> None:
    model = small().train()
    network = model.bank["default"]["model"].detector
    before = {n: t.clone() for n, t in network.encoder.state_dict().items()}
    moving = network.up1._net[1].running_mean.clone()
    sum(t.sum() for t in model(image())).backward()
    assert all(torch.equal(before[n], t) for n, t in network.encoder.state_dict().items())
    assert not torch.equal(moving, network.up1._net[1].running_mean)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for n, p in model.trainable().items())
    unfrozen = small(train_detector=True).train()
    assert any(".detector.encoder." in n for n in unfrozen.trainable())
    assert unfrozen.bank["default"]["model"].detector.encoder.training
    sum(t.sum() for t in unfrozen(image())).backward()
    assert all(p.grad is not None for p in unfrozen.trainable().values())


def test_it_sees_every_nth_pixel_in_training_and_where_wanted_afterwards() -> None:
    for in_eval, sizes in ((True, [32, 32]), (False, [32, 64])):
        model, seen = small(subsample_in_eval=in_eval), []
        network = model.bank["default"]["model"].detector
        network.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[2]))
        model.train()(image())
        model.eval()(image())
        assert seen == sizes


# -- losses ------------------------------------------------------------------------------------------------------------


def test_focal_loss_by_hand() -> None:
    even = torch.zeros(1, 1, 2, 2)
    assert focal_loss(even, torch.ones(1, 1, 2, 2)).item() == pytest.approx(8 / 9 * 0.25 * math.log(2), abs=1e-6)
    assert focal_loss(even, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(1 / 9 * 0.25 * math.log(2), abs=1e-6)
    assert focal_loss(even, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(0.01925, abs=1e-5)
    sure = torch.full((1, 1, 1, 1), 50.0, requires_grad=True)
    focal_loss(sure, torch.zeros(1, 1, 1, 1)).backward()
    assert sure.grad.item() == 0  # beyond the published clip


def test_weighted_cross_entropy_by_hand() -> None:
    truth = torch.tensor([[1.0, 0], [0, 0]])[None, None]
    # one shadow pixel of weight 3 and three lit ones of weight 1, all at log 2, times the share of shadows
    assert weighted_cross_entropy(torch.zeros(1, 1, 2, 2), truth).item() == pytest.approx(0.25 * 1.5 * math.log(2))


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    model, picture = small().eval(), image()
    for parameter in model.bank["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before = model(picture)
    model.save(tmp_path / "a.safetensors")
    other = small(detector_seed=3)
    other.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(before, other.eval()(picture), strict=True))
    model.remove()
    bare = SAM(3, size="tiny", weights="random").state_dict()
    assert all(torch.equal(tensor, bare[n]) for n, tensor in model.backbone.state_dict().items())


def released(model: Adapted) -> dict[str, Tensor]:
    """A checkpoint of the released layout: all of SAM, bottlenecks in its blocks, the prompting network."""
    state = {f"model.{name}": tensor + 0.01 for name, tensor in model.backbone.sam.state_dict().items()}
    for key, branch in bottlenecks(model).items():
        at, _, kind = key.replace("/", ".").removeprefix("sam.").rpartition(".")
        part = {"attn": "Space_Adapter", "mlp": "MLP_Adapter"}[kind]
        for layer, name in ((branch.down, "D_fc1"), (branch.up, "D_fc2")):
            state |= {f"model.{at}.{part}.{name}.{n}": torch.rand_like(t) for n, t in layer.state_dict().items()}
    for name, tensor in model.bank["default"]["model"].detector.state_dict().items():
        name = name.replace("encoder.", "efficient_encoder.original_model.", 1)
        state[f"model.mask_generator.{name}"] = torch.rand_like(tensor.float()).to(tensor)
    return state | {"model.mask_generator.align2.0.weight": torch.zeros(2, 2)}


def test_released_weights_load_by_their_names(tmp_path) -> None:
    model = small(order="rc", padding="norm")
    state = released(model)
    torch.save({"state_dict": state, "epoch": 39}, tmp_path / "released.ckpt")
    aside = load_official(model, tmp_path / "released.ckpt")
    assert "image_encoder.blocks.0.attn.qkv.weight" in aside
    assert "mask_decoder.iou_prediction_head.layers.0.weight" in aside
    assert "mask_generator.align2.0.weight" in aside
    branch = bottlenecks(model)["sam/image_encoder/blocks/2/mlp"]
    assert torch.equal(branch.up.weight, state["model.image_encoder.blocks.2.MLP_Adapter.D_fc2.weight"])
    trained = model.trained_state()
    own = "adapter.default.sam/mask_decoder/transformer/layers/0/self_attn/q_proj{}.value"
    for parameter, suffix in (("weight", ""), ("bias", ":bias")):
        theirs = state[f"model.mask_decoder.transformer.layers.0.self_attn.q_proj.{parameter}"]
        assert torch.equal(trained[own.format(suffix)], theirs)
    network = model.bank["default"]["model"].detector
    assert torch.equal(network.up3._net[3].weight, state["model.mask_generator.up3._net.3.weight"])
    stem = "model.mask_generator.efficient_encoder.original_model.conv_stem.weight"
    assert torch.equal(network.encoder.conv_stem.weight, state[stem])


def test_released_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    model = small()
    state = released(model)
    cases = {
        "1 missing": {n: t for n, t in state.items() if n != "model.mask_generator.conv.weight"},
        "image_encoder.blocks.9.attn.new is no tensor of AdapterShadow": state
        | {"model.image_encoder.blocks.9.attn.new": torch.ones(1)},
        "1 unexpected": state | {"model.image_encoder.blocks.9.Space_Adapter.D_fc1.weight": torch.ones(1)},
    }
    for message, bad in cases.items():
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path / "bad.pt")


def test_impossible_settings_are_one_line() -> None:
    cases = [
        ("neither space nor mlp", {"space": False, "mlp": False}),
        ("above 0, at least 1 and 1", {"grid": 0}),
        ("order 'yx': use xy, rc", {"order": "yx"}),
        ("of 32 channels none is left", {"ratio": 0.01}),
        ("no EfficientNet of timm; nearest", {"detector": "tf_efficientnet_b99"}),
        ("five stages and a last convolution are needed", {"detector": "efficientnet_x_b3"}),
    ]
    for message, arguments in cases:
        with pytest.raises(RequestError, match=message):
            small(**arguments)
    with pytest.raises(RequestError, match="is for the backbone SAM"):
        adapt(SAMEncoder(3, size="tiny", weights="random"), AdapterShadow(**SMALL))
    only = small(mlp=False)
    assert {key.rpartition("/")[2] for key in bottlenecks(only)} == {"attn"}
