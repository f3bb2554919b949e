"""What must hold of Earth-Adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modalities.images.backbones import TimmViT
from modalities.remote_sensing.earth_adapter import Adaptation, EarthAdapter, load_official
from modalities.remote_sensing.heads import LightDecoder
from shared import RequestError, adapt, trainable
from shared.adapted import Adapted
from tests.shared.blocks.test_frequency import literal

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "weights": "random", "normed": False,
    "model_args": {"embed_dim": 24, "depth": 4, "num_heads": 2},
}  # fmt: skip


def small(head: Any = None, **settings: Any) -> Adapted:
    backbone = TimmViT(3, image_size=64, patch_size=8, **VIT)
    return adapt(backbone, EarthAdapter(**{"width": 5, "split": (0, 2), **settings}), head=head)


def blocks(model: Adapted) -> list[Any]:
    bank: Any = model.bank["default"]
    return list(bank.values())


# -- the adapter -------------------------------------------------------------------------------------------------------


def formula(module: Any, patches: Tensor, grid: tuple[int, int], cutoff: float) -> Tensor:
    """P + s (g_0 MLP_1(P) + g_1 MLP_2(low) + g_2 MLP_3(high)), written out."""
    low, high = literal(patches.transpose(1, 2).unflatten(2, grid), cutoff)
    gates = (patches @ module.router.weight.t() + module.router.bias).softmax(-1)
    total = patches.clone()
    for i, part in enumerate((patches, low.flatten(2).transpose(1, 2), high.flatten(2).transpose(1, 2))):
        down, up = module.experts[i].down, module.experts[i].up
        hidden = (part @ down.weight.t() + down.bias).clamp(min=0)
        total = total + module.scale * gates[..., i : i + 1] * (hidden @ up.weight.t() + up.bias)
    return total


def test_a_split_block_computes_the_formula_and_leaves_the_class_token() -> None:
    module = Adaptation(12, 4, 1, 0.6, 0.1).double()
    module.context.grid = (4, 6)
    tokens = torch.randn(2, 25, 12, dtype=torch.float64)
    found = module(lambda x: x, tokens)
    assert torch.equal(found[:, 0], tokens[:, 0])
    torch.testing.assert_close(found[:, 1:], formula(module, tokens[:, 1:], (4, 6), 0.6))


def test_a_block_that_is_not_split_has_one_expert_and_no_router() -> None:
    module = blocks(small())[1]
    assert module.router is None
    assert len(module.experts) == 1
    tokens = torch.randn(2, 65, 24)
    branch, patches = module.experts[0], tokens[:, 1:]
    hidden = torch.relu(patches @ branch.down.weight.t() + branch.down.bias)
    expected = patches + module.scale * (hidden @ branch.up.weight.t() + branch.up.bias)
    torch.testing.assert_close(module(lambda x: x, tokens)[:, 1:], expected)


def test_router_weights_sum_to_one_for_every_token() -> None:
    module = blocks(small())[0]
    shares = module.weights(torch.randn(2, 64, 24))
    assert shares.shape == (2, 64, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 64))
    assert shares.std() > 0.01


def test_blocks_that_are_not_adapted_give_the_same_tokens() -> None:
    model = small(depth=[2, 3], split=[2])
    backbone: Any = model.backbone
    assert set(dict(model.bank["default"].named_children())) == {"model/blocks/2", "model/blocks/3"}
    found: list[Tensor] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, __, out: found.append(out))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(image)
        adapted = found[:]
        found.clear()
        with model.disabled():
            model(image)
    assert [torch.equal(a, b) for a, b in zip(adapted, found, strict=True)] == [True, True, False, False]


def test_a_scale_of_zero_gives_the_frozen_model_and_the_start_does_not() -> None:
    model, image = small().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        with model.disabled():
            frozen = model(image)
        start = model(image)
        assert [round(float(block.scale), 6) for block in blocks(model)] == [0.1] * 4
        for block in blocks(model):
            block.scale.zero_()
        ours = model(image)
    assert all(torch.equal(a, b) for a, b in zip(ours.maps, frozen.maps, strict=True))
    assert not torch.allclose(start.maps[-1], frozen.maps[-1], atol=1e-3)


def test_gradients_are_in_the_adapter_and_the_head_alone() -> None:
    backbone = TimmViT(3, image_size=64, patch_size=8, **VIT)
    model = adapt(backbone, EarthAdapter(width=5, split=(0, 2)), head=LightDecoder(backbone.channels, 3, width=8))
    model.train()
    model.head.loss(model(torch.randn(2, 3, 64, 64)), torch.randint(0, 3, (2, 64, 64))).backward()  # type: ignore[union-attr]
    trained = trainable(model)
    assert {name.partition(".")[0] for name in trained} == {"adapter", "head"}
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in model.backbone.parameters())
    assert not any(m.training for m in model.backbone.modules())


@pytest.mark.parametrize(
    ("width", "split", "official"),
    [(16, 24, 2_508_000), (24, 24, 3_688_224), (32, 24, 4_868_448), (64, 24, 9_589_344), (64, 0, 3_171_864)],
)
def test_published_counts(width, split, official) -> None:
    with torch.device("meta"):
        backbone = TimmViT(3, name="vit_large_patch14_dinov2", image_size=512, patch_size=16)
        model = adapt(backbone, EarthAdapter(width=width, split=tuple(range(split))))
    assert model.count()["adapter"] == official


@pytest.mark.parametrize(
    ("width", "split"), [(64, (0, 1, 2)), (32, (21, 22, 23)), (16, (21, 22, 23)), (32, tuple(range(18, 24)))]
)
def test_what_no_forward_runs_is_not_there(width, split) -> None:
    with torch.device("meta"):
        backbone = TimmViT(3, name="vit_large_patch14_dinov2", image_size=512, patch_size=16)
        model = adapt(backbone, EarthAdapter(width=width, split=split))
    one = 2 * 1024 * width + width + 1024
    assert model.count()["adapter"] == 24 * (one + 1) + len(split) * (2 * one + 3 * 1024 + 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width 0 is at least 1"),
        ({"cutoff": 1.5}, "cutoff 1.5 from 0 to 1"),
        ({"split": (0, 7)}, r"split \[7\]: the adapted blocks of vit_tiny_patch16_224 are 0, 1, 2, 3"),
        ({"depth": [1, 2]}, r"split \[0\]: the adapted blocks of vit_tiny_patch16_224 are 1, 2"),
    ],
)
def test_impossible_settings(settings, message) -> None:
    with pytest.raises(RequestError, match=message):
        small(**settings)


# -- released weights --------------------------------------------------------------------------------------------------


def released(width: int = 24, inner: int = 5, layers: int = 4) -> dict[str, Tensor]:
    """A checkpoint of the released layout: all experts and routers of all blocks, a frozen weight, a head weight."""
    state = {"scale": torch.rand(layers)}
    for layer in range(layers):
        for i in (1, 2, 3):
            state |= {
                f"mlp_list{i}.{layer}.0.weight": torch.randn(inner, width),
                f"mlp_list{i}.{layer}.0.bias": torch.randn(inner),
                f"mlp_list{i}.{layer}.2.weight": torch.randn(width, inner),
                f"mlp_list{i}.{layer}.2.bias": torch.randn(width),
            }
        state |= {f"router.{layer}.weight": torch.randn(3, width), f"router.{layer}.bias": torch.randn(3)}
    frozen = {"backbone.cls_token": torch.zeros(1, 1, width), "decode_head.query_embed.weight": torch.zeros(2, 2)}
    return {f"backbone.refine_feat.{name}": tensor for name, tensor in state.items()} | frozen


def test_released_weights_load_by_their_names_without_what_never_runs(tmp_path) -> None:
    model, state = small(), released()
    torch.save({"state_dict": state, "meta": {"iter": 1}}, tmp_path / "released.pth")
    assert load_official(model, tmp_path / "released.pth") == ["backbone.cls_token", "decode_head.query_embed.weight"]
    found = blocks(model)
    name = "backbone.refine_feat."
    assert [block.scale.item() for block in found] == state[name + "scale"].tolist()
    assert torch.equal(found[2].experts[1].down.weight, state[name + "mlp_list2.2.0.weight"])
    assert torch.equal(found[2].router.weight, state[name + "router.2.weight"])
    assert torch.equal(found[3].experts[0].up.bias, state[name + "mlp_list1.3.2.bias"])


def test_an_adapter_alone_and_blocks_that_are_not_adapted(tmp_path) -> None:
    model = small(depth=[1, 3], split=[3])
    state = {n: t for n, t in released().items() if "refine_feat" in n}
    torch.save(state, tmp_path / "released.pth")
    assert load_official(model, tmp_path / "released.pth") == []
    assert torch.equal(blocks(model)[1].router.bias, state["backbone.refine_feat.router.3.bias"])


def test_released_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    model, state = small(), released()
    start = "backbone.refine_feat."
    cases = {
        "1 missing": {n: t for n, t in state.items() if n != f"{start}mlp_list3.2.0.bias"},
        "of another shape": released(inner=6),
        "no tensor of the official Earth-Adapter": state | {f"{start}tokens": torch.ones(1)},
        "is the adapter's": {"backbone.cls_token": torch.ones(1), "decode_head.a": torch.ones(1)},
        "1 unknown tensors": state | {"optimizer.step": torch.ones(1)},
    }
    before = {n: t.clone() for n, t in model.trained_state().items()}
    for message, bad in cases.items():
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path / "bad.pth")
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())


# -- the toy ranking ---------------------------------------------------------------------------------------------------


class Striped(nn.Module):
    """Tokens of smooth maps plus one strong stripe of alternating sign, whose strength differs from image to image."""

    stripe: Tensor

    def __init__(self, width: int, side: int):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(width), requires_grad=False)
        sign = 1 - 2 * (torch.arange(side * side) // side % 2)
        self.register_buffer("stripe", sign[:, None].float())

    def forward(self, smooth: Tensor, strength: Tensor) -> Tensor:
        return smooth + 3 * strength[:, None, None] * self.stripe * self.direction


def test_an_artifact_of_high_frequency_is_removed_better_by_the_experts() -> None:
    """Inferred from the paper: of equal width, the split adapter reaches a lower loss than the single one."""
    torch.manual_seed(0)
    side, width, inner = 8, 12, 6
    host = Striped(width, side)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        coarse = torch.randn(count, width, 2, 2)
        maps = nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)
        return maps.flatten(2).transpose(1, 2), torch.randn(count)

    losses = {}
    for cutoff in (None, 0.5):
        torch.manual_seed(1)
        module = Adaptation(width, inner, 0, cutoff, 0.1)
        module.context.grid = (side, side)
        optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(200):
            smooth, strength = draw(16)
            loss = nn.functional.mse_loss(module(lambda x: x, host(smooth, strength)), smooth)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        smooth, strength = draw(256)
        with torch.no_grad():
            losses[cutoff] = nn.functional.mse_loss(module(lambda x: x, host(smooth, strength)), smooth).item()
    assert losses[0.5] < 0.8 * losses[None]
