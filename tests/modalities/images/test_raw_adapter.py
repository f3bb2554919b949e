"""What must hold of RAW-Adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modalities.images.backbones import EfficientMod, LowFormer, TimmResNet, TimmViT
from modalities.images.raw_adapter import Develop, Merge, RAWAdapter, load_official
from modalities.images.raw_isp import Blur, InputAdapter, colour, gaussian, sharpen, white_balance
from shared import RequestError, adapt
from shared.adapted import Adapted
from shared.errors import WorkError
from tests.parity.raw_adapter import Given

SMALL = {"width": 4, "middle": (5, 6, 7), "predictor": 16, "lut": 8}
SMALL_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}


def small(**changes: Any) -> Adapted:
    backbone = TimmResNet(3, name="resnet18", weights="random", model_args=SMALL_RESNET)
    return adapt(backbone, RAWAdapter(**{**SMALL, **changes}))


def parts(model: Adapted) -> tuple[Any, list[Any]]:
    develop, *merges = model.bank["default"].values()
    return develop, merges


def isp(**changes: Any) -> InputAdapter:
    """With numbers far from where they start, in eval mode."""
    given: dict[str, Any] = {"width": 16, "kernel": 3, "lut": 8, "gain": 1.0, "train_gain": True, **changes}
    made = InputAdapter(**given).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def size(module: torch.nn.Module) -> int:
    """Parameters and the constants that published checkpoints count as such."""
    kept = [b for n, b in module.named_buffers() if n.endswith("_base")]
    return sum(t.numel() for t in [*module.parameters(), *kept])


# -- counts ------------------------------------------------------------------------------------------------------------


def test_published_counts_on_resnet_50() -> None:
    with torch.device("meta"):
        model = adapt(TimmResNet(3), RAWAdapter())
    develop, merges = parts(model)
    encoder = develop.pre_encoder
    assert size(encoder.Predictor_K) == 37_572
    assert size(encoder.Predictor_M) == 37_962
    assert size(encoder.LUT) == 3_395
    assert size(encoder) == 78_929
    assert size(develop.model_adapter) == 35_364
    assert sum(map(size, merges)) == 460_288
    assert size(model.bank) == 574_581
    assert model.count()["adapter"] == 574_581 - 11  # bases that do not train: two deviations, nine of the matrix


@pytest.mark.parametrize(("train_gain", "trained"), [(False, 78_917), (True, 78_918)])
def test_the_gain_trains_or_not(train_gain, trained) -> None:
    encoder = InputAdapter(width=64, kernel=3, lut=32, gain=3.0, train_gain=train_gain)
    assert sum(p.numel() for p in encoder.parameters()) == trained
    assert size(encoder) == 78_929


@pytest.mark.parametrize("head_sees", ["merged", "plain"])
def test_published_counts_on_the_widths_of_mit_b5(head_sees) -> None:
    with torch.device("meta"):
        backbone = Given([torch.zeros(1, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate((64, 128, 320, 512))])
        model = adapt(backbone, RAWAdapter(width=16, middle=(64, 96, 128), head_sees=head_sees))
    develop, merges = parts(model)
    assert size(develop.model_adapter) == 19_076
    assert sum(map(size, merges)) == 200_704
    assert size(model.bank) == 298_709


# -- the stages --------------------------------------------------------------------------------------------------------


def test_images_stay_in_range() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        _, sharpened, balanced, coloured, looked = isp()(torch.rand(3, 3, 48, 40))
        for image in (sharpened, coloured):
            assert image.min() >= 1e-5
            assert image.max() <= 1
        assert looked.min() >= 0
        assert looked.max() <= 1
        assert balanced.isfinite().all()


def test_gain_and_sharpening_of_one_give_the_image_back() -> None:
    image, one = torch.rand(2, 3, 16, 12) * 1.4 - 0.2, torch.ones(2)
    given = sharpen(image, Blur(3 * one, 2 * one, one, one), 5)
    assert torch.allclose(given, image.clamp(1e-5, 1), atol=1e-6)


def test_the_unit_matrix_clamps_alone() -> None:
    image = torch.rand(2, 3, 8, 8) * 1.5
    assert torch.equal(colour(image, torch.eye(3).expand(2, 3, 3)), image.clamp(1e-5, 1))


def test_the_colour_matrix_mixes_bands_by_rows() -> None:
    image = torch.rand(1, 3, 4, 4) / 3
    matrix = torch.tensor([[[0, 1.0, 0], [1, 0, 0], [0.5, 0, 0.5]]])
    mixed = colour(image, matrix)[0]
    red, green, blue = image[0].clamp_min(1e-5)
    assert torch.allclose(mixed, torch.stack([green, red, (red + blue) / 2]))


def test_a_look_up_of_zero_gives_the_image_back() -> None:
    encoder = isp()
    assert encoder.LUT is not None
    torch.nn.init.zeros_(encoder.LUT.net[-1].weight)
    torch.nn.init.zeros_(encoder.LUT.net[-1].bias)
    *_, coloured, looked = encoder(torch.rand(2, 3, 32, 32))
    assert torch.equal(looked, coloured)


def test_with_an_exponent_of_one_the_world_is_grey() -> None:
    image = torch.rand(2, 3, 16, 16) * torch.tensor([0.9, 0.5, 0.2]).view(1, 3, 1, 1) + 0.01
    means = white_balance(image, torch.ones(2)).mean((2, 3))
    assert torch.allclose(means, image.mean((1, 2, 3))[:, None].expand(2, 3), atol=1e-6)


def test_a_greater_exponent_balances_power_means_of_each_image() -> None:
    image, rho = torch.rand(2, 3, 16, 16, dtype=torch.float64) + 0.01, torch.tensor([2.0, 5.0], dtype=torch.float64)
    balanced = white_balance(image, rho)
    for i, exponent in enumerate((2, 5)):
        powers = (balanced[i] ** exponent).mean((1, 2)) ** (1 / exponent)
        assert torch.allclose(powers, ((image[i] ** exponent).mean() ** (1 / exponent)).expand(3))


def test_the_darkest_image_and_a_great_exponent_are_balanced_still() -> None:
    dark = torch.full((1, 3, 8, 8), 1e-5).requires_grad_()
    balanced = white_balance(dark, torch.tensor([30.0]))
    assert torch.allclose(balanced, dark)
    balanced.sum().backward()
    assert dark.grad is not None
    assert dark.grad.isfinite().all()


def test_predicted_numbers_keep_their_bounds() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        encoder, image = isp(), torch.rand(4, 3, 32, 32)
        _, rho = encoder.Predictor_M.predict(image)
        assert (rho >= 1).all()
        found = encoder.Predictor_K.predict(image)
        assert ((found.sigma >= 0) & (found.sigma <= 1)).all()
        raw = encoder.Predictor_K(image)
        assert torch.allclose(found.r1, 0.1 * raw[:, 0] + 3)
        assert torch.allclose(found.r2, 0.1 * raw[:, 1] + 2)
        far = encoder.Predictor_K
        torch.nn.init.zeros_(far.down.weight)
        torch.nn.init.constant_(far.down.bias, -19.99)
        found = far.predict(image)
        assert min(found.r1.min(), found.r2.min()) > 0


def test_the_kernel_of_a_deviation_of_two() -> None:
    weights = gaussian(torch.tensor([2.0]), 3)
    assert torch.allclose(weights, torch.tensor([[0.3192, 0.3617, 0.3192]]), atol=5e-5)


def test_the_blur_goes_across_by_r1_and_down_by_r2_of_each_image() -> None:
    image = torch.zeros(2, 3, 9, 9)
    image[:, :, 4, 4] = 0.5
    r1, r2, one, none = torch.tensor([3.0, 0.6]), torch.tensor([0.5, 2.0]), torch.ones(2), torch.zeros(2)
    blur = sharpen(image, Blur(r1, r2, one, none), 3)
    for i in range(2):
        expected = 0.5 * gaussian(r2[i : i + 1], 3)[0][:, None] * gaussian(r1[i : i + 1], 3)[0]
        assert torch.allclose(blur[i, 1, 3:6, 3:6], expected.clamp_min(1e-5), atol=1e-6)


def test_a_batch_is_its_images() -> None:
    encoder, image = isp(kernel=5).double(), torch.rand(3, 3, 40, 32, dtype=torch.float64)
    together = encoder(image)
    for i in range(3):
        alone = encoder(image[i : i + 1])
        assert all(torch.allclose(a[i : i + 1], b, atol=1e-9) for a, b in zip(together, alone, strict=True))


# -- the model ---------------------------------------------------------------------------------------------------------


def test_a_ratio_of_zero_leaves_the_stages_while_side_features_flow() -> None:
    model, image = small(lut=None).eval(), torch.rand(2, 3, 64, 96)
    develop, merges = parts(model)
    for merge in merges:
        merge.ratio = 0.0
    sides: list[Tensor] = []
    for merge in merges[:2]:
        merge.conv_3.register_forward_hook(lambda _, __, out: sides.append(out))
    with torch.no_grad():
        maps = model(image).maps
        developed = develop.pre_encoder(image)[-1]
        with model.disabled():
            bare = model(developed).maps
    assert all(torch.equal(a, b) for a, b in zip(maps, bare, strict=True))
    assert [tuple(side.shape) for side in sides] == [(2, 8, 8, 12), (2, 16, 4, 6)]
    assert all(side.abs().sum() > 0 for side in sides)


def test_merges_that_add_nothing_have_no_effect_and_are_refused() -> None:
    with pytest.raises(WorkError, match="received no gradient"):
        small(ratio=0.0)


def test_without_a_look_up_three_images_feed_the_side_and_the_fourth_the_network() -> None:
    develop, _ = parts(small(lut=None))
    images = develop.pre_encoder(torch.rand(1, 3, 32, 32))
    assert len(images) == 4
    assert develop.model_adapter.uni_conv.in_channels == 9
    assert torch.equal(develop.model_adapter.eval()(images), develop.model_adapter(images[:3]))


def test_what_is_merged_feeds_the_next_stage_and_the_head_sees_it_or_not() -> None:
    image = torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)
    merged = small().eval()
    plain = small(head_sees="plain").eval()
    for ours, theirs in zip(parts(plain)[1], parts(merged)[1], strict=True):
        ours.load_state_dict(theirs.state_dict())
    parts(plain)[0].load_state_dict(parts(merged)[0].state_dict())
    assert [site.path for site in plain.methods["default"].sites(plain.sites())][1:] == [
        "model.layer2.0", "model.layer3.0", "model.layer4.0",
    ]  # fmt: skip
    with torch.no_grad():
        with_merged, with_plain = merged(image).maps, plain(image).maps
        bare = merged.backbone
        developed = parts(merged)[0].pre_encoder(image)[-1]
        with merged.disabled():
            first = bare(developed).maps[0]
    assert torch.equal(with_plain[0], first)
    assert not torch.allclose(with_merged[0], first, atol=1e-3)
    assert torch.allclose(with_plain[3], with_merged[3], atol=1e-6)  # no merge after the last stage
    assert not torch.allclose(with_plain[1], with_merged[1], atol=1e-3)


@pytest.mark.parametrize("sides", [(50, 70), (37, 101), (64, 32)])
def test_odd_sizes_round_up_alike_beside_and_in_the_network(sides) -> None:
    model = small().eval()
    maps = model(torch.rand(1, 3, *sides)).maps
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-s // 2**k) for s in sides) for k in (2, 3, 4, 5)]


def test_grids_that_differ_are_named() -> None:
    merge = Merge(6, 4, 5, ratio=1.0, last=False, layout="BCHW")
    with pytest.raises(RequestError, match="a stage's grid is 7 x 8, the side features' 8 x 8"):
        merge.merge(torch.zeros(1, 6, 7, 8), torch.zeros(1, 4, 8, 8))


def test_channels_last_and_first_networks_take_it() -> None:
    widths: dict[str, Any] = {"widths": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    lowformer = {"width_list": [4, 8, 8, 12, 16], "depth_list": [0, 1, 1, 1, 2]}
    for backbone in (
        EfficientMod(3, name="efficientmod_xxs", weights="random", shape=widths),
        LowFormer(3, weights="random", model_args=lowformer),
    ):
        model = adapt(backbone, RAWAdapter(**SMALL)).train()
        model(torch.rand(2, 3, 64, 64)).maps[-1].square().sum().backward()
        assert all(p.grad is not None for p in model.trainable().values())


# -- frozen or full ----------------------------------------------------------------------------------------------------


def test_frozen_by_default() -> None:
    model = small().train()
    assert set(model.trainable()) == {f"adapter.{n}" for n, _ in model.bank.named_parameters()}
    assert not any(m.training for m in model.backbone.modules())
    assert all(m.training for m in parts(model)[0].modules())


@pytest.mark.parametrize("norm_eval", [True, False])
def test_full_trains_every_weight_and_norms_may_keep_their_statistics(norm_eval) -> None:
    backbone = TimmResNet(3, name="resnet18", weights="random", norm_eval=norm_eval, model_args=SMALL_RESNET)
    model = adapt(backbone, RAWAdapter(**SMALL, freeze_backbone=False)).train()
    before = backbone.model.bn1.running_mean.clone()
    model(torch.rand(2, 3, 64, 64)).maps[-1].square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert all(p.grad is not None for p in model.bank.parameters())
    assert torch.equal(backbone.model.bn1.running_mean, before) is norm_eval


def test_full_is_saved_whole(tmp_path) -> None:
    model, image = small(freeze_backbone=False), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        model.backbone.model.layer4[0].conv2.weight.add_(0.1)
    model.save(tmp_path / "a.safetensors")
    other = small(freeze_backbone=False)
    other.load(tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(image).summary, model.eval()(image).summary)


# -- published files ---------------------------------------------------------------------------------------------------


def official(model: Adapted) -> dict[str, Tensor]:
    develop, merges = parts(model)
    state = {f"backbone.{n}": t + 0.25 for n, t in develop.state_dict().items() if t.is_floating_point()}
    state |= {f"backbone.{n}": t for n, t in develop.state_dict().items() if not t.is_floating_point()}
    for i, merge in enumerate(merges):
        state |= {f"backbone.merge_{i + 1}.{n}": t + 0.25 for n, t in merge.state_dict().items()}
    return state | {"backbone.conv1.weight": torch.zeros(1), "bbox_head.bias": torch.zeros(1)}


@pytest.mark.parametrize("freeze", [True, False])
def test_a_released_checkpoint_loads_by_its_names(freeze, tmp_path) -> None:
    model = small(freeze_backbone=freeze)
    state = official(model)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "raw.pth")
    assert load_official(model, tmp_path / "raw.pth") == ["backbone.conv1.weight", "bbox_head.bias"]
    develop, merges = parts(model)
    name = "pre_encoder.Predictor_M.kv_downsample.10.running_var"
    assert torch.equal(develop.state_dict()[name], state[f"backbone.{name}"])
    assert torch.equal(merges[1].conv_3.weight, state["backbone.merge_2.conv_3.weight"])
    assert develop.pre_encoder.Predictor_K.gain_base.item() == 1.25


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "none"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(spoil, tmp_path) -> None:
    model = small()
    before = {n: t.clone() for n, t in model.trained_state().items()}
    state = official(model)
    if spoil == "missing":
        del state["backbone.merge_1.conv_2.weight"]
    elif spoil == "unknown":
        state["backbone.merge_4.conv_1.weight"] = torch.zeros(1)
    elif spoil == "shape":
        state["backbone.model_adapter.uni_conv.weight"] = torch.zeros(2, 2)
    else:
        state = {"backbone.conv1.weight": torch.zeros(1), "bbox_head.bias": torch.zeros(1)}
    torch.save(state, tmp_path / "raw.pth")
    with pytest.raises(RequestError):
        load_official(model, tmp_path / "raw.pth")
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel": 4}, "kernel 4: use an odd"),
        ({"middle": (64, 64)}, "a number above 0 for each of 3 stages"),
        ({"predictor": 20}, "use a multiple of 8"),
        ({"width": 0}, "width 0: use at least 1"),
        ({"lut": 0}, "lut 0: use at least 1"),
    ],
)
def test_settings_that_make_no_sense(changes, words) -> None:
    with pytest.raises(RequestError, match=words):
        RAWAdapter(**changes)


def test_networks_it_cannot_take() -> None:
    vit = TimmViT(3, name="vit_tiny_patch16_224", weights="random", image_size=32,
                  model_args={"embed_dim": 24, "depth": 2, "num_heads": 2})  # fmt: skip
    with pytest.raises(RequestError, match="needs a network of 4 stages"):
        adapt(vit, RAWAdapter(**SMALL))
    efficientmod = EfficientMod(3, name="efficientmod_xxs", weights="random", shape={"depths": [1, 1, 1, 1]})
    with pytest.raises(RequestError, match="a stage's grid is"):  # its downsampling stands between the stages
        adapt(efficientmod, RAWAdapter(**SMALL, head_sees="plain"))
    four = TimmResNet(4, name="resnet18", weights="random", model_args=SMALL_RESNET)
    with pytest.raises(RequestError, match="takes images of 3 bands"):
        adapt(four, RAWAdapter(**SMALL))


def test_images_smaller_than_the_blur_are_refused() -> None:
    with pytest.raises(RequestError, match="images of 4 x 40 under a blur of 9 pixels"):
        isp(kernel=9)(torch.rand(1, 3, 4, 40))


def test_the_side_starts_from_the_images_before_the_look_up() -> None:
    model, image = small().eval(), torch.rand(1, 3, 32, 32)
    develop, _ = parts(model)
    assert isinstance(develop, Develop)
    with torch.no_grad():
        images = develop.pre_encoder(image)
        whole = develop.model_adapter(images)
        assert torch.equal(whole, develop.model_adapter([*images[:4], torch.zeros_like(images[4])]))
        assert not torch.equal(whole, develop.model_adapter([*images[:3], torch.zeros_like(images[3])]))


# -- the range of the input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 2 * x, r"the image holds values from \S+ to (1|2)\S*; it takes linear values from 0 .* to 1"),
        (
            lambda x: x - 0.5,
            r"values from -0\.\d+ to 0\.\d+; .* use the data RawFolders with the sensor's black and white",
        ),
        (lambda x: 255 * x, r"to 25\d\S*; .* or normalisation .mean: .0, 0, 0., std: .255, 255, 255.."),
        (lambda x: x.where(x < 0.9, torch.nan), "the image holds NaN; it takes"),
        (lambda x: x.where(x < 0.9, torch.inf), "to inf; it takes"),
    ],
)
def test_an_image_that_is_not_linear_from_0_to_1_is_one_line(change, message) -> None:
    model, image = small(), torch.rand(2, 3, 64, 64)
    model(image)
    model(image * 1.0009)  # rounding of a resampled image
    with pytest.raises(RequestError, match=message) as refused:
        model(change(image))
    assert "\n" not in str(refused.value)
    with model.disabled():
        model(255 * image)  # the network itself takes anything
