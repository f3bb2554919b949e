"""What must hold of PeftCD: its adapter, the exchange, both decoders, published counts and files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modalities.images.backbones import TimmHiera, TimmViT
from modalities.remote_sensing.heads import ResidualPyramidDecoder, SSBiFPNDecoder, change
from modalities.remote_sensing.peftcd import PeftCD, load_official
from shared import RequestError, adapt, trainable
from shared.adapted import Adapted
from shared.backbone import Features
from shared.methods import IA3, LoRA

LORA = LoRA(rank=8, alpha=32, dropout=0.1, roles=("attention.qkv",))
DINO: dict[str, Any] = {
    "name": "vit_small_patch16_dinov3", "weights": "random",
    "model_args": {"embed_dim": 24, "depth": 4, "num_heads": 2},
}  # fmt: skip
SAM: dict[str, Any] = {
    "name": "sam2_hiera_tiny", "weights": "random",
    "model_args": {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)},
}  # fmt: skip


def dino(method: Any) -> Adapted:
    backbone = TimmViT(3, image_size=64, depths=[0, 1, 2, 3], **DINO)
    return adapt(backbone, method, head=SSBiFPNDecoder(backbone.channels, 2, width=8))


def sam(method: Any) -> Adapted:
    backbone = TimmHiera(3, **SAM)
    return adapt(backbone, method, head=ResidualPyramidDecoder(backbone.channels, 2, width=8))


VARIANTS = pytest.mark.parametrize(
    "model",
    [lambda: dino(PeftCD(width=4)), lambda: sam(PeftCD(width=4)), lambda: dino(LoRA(rank=2, roles=("attention.qkv",)))],
    ids=["dino", "sam", "lora"],
)


def drawn(model: Adapted) -> Adapted:
    """In eval mode, with trained tensors that are not those of the start, and batch norms that have seen images."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.rand(4, 3, 64, 64, generator=generator))
    return model.eval()


# -- both dates --------------------------------------------------------------------------------------------------------


@VARIANTS
def test_swapped_dates_swap_the_outputs_and_leave_the_prediction(model) -> None:
    """In 64-bit: a batch in another order may be summed in another order."""
    model = drawn(model()).double()
    before, after = torch.rand(2, 2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        one, other = (model(torch.cat(pair)) for pair in ((before, after), (after, before)))
        head: Any = model.head
        predicted = [head.predict(output, (64, 64)) for output in (one, other)]
    assert one.shape == (4, 2, 64, 64)
    torch.testing.assert_close(one.roll(2, 0), other, rtol=0, atol=1e-12)
    torch.testing.assert_close(predicted[0], predicted[1], rtol=0, atol=1e-7)
    assert (one[:2] - one[2:]).abs().max() > 1e-4  # and the two are not the same


@VARIANTS
def test_one_date_twice_gives_one_output_twice(model) -> None:
    model, image = drawn(model()).double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before, after = model(torch.cat([image, image])).chunk(2)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_every_other_level_is_exchanged() -> None:
    before, after = ([torch.full((1, 1), 10.0 * date + level) for level in range(4)] for date in (0, 1))
    one, other = change.exchange(before, after)
    assert [float(x) for x in one] == [10, 1, 12, 3]
    assert [float(x) for x in other] == [0, 11, 2, 13]


def test_the_loss_is_the_mean_of_both_cross_entropies_on_labelled_pixels() -> None:
    head = SSBiFPNDecoder([4], 2, width=4)
    output, mask = torch.randn(4, 2, 6, 6, requires_grad=True), torch.randint(0, 2, (2, 6, 6))
    mask[0, :3] = 255
    each = [nn.functional.cross_entropy(part, mask, ignore_index=255) for part in output.chunk(2)]
    torch.testing.assert_close(head.loss(output, mask), sum(each) / 2)
    head.loss(output, torch.full_like(mask, 255)).backward()
    assert torch.equal(output.grad, torch.zeros_like(output))  # type: ignore[arg-type]


def test_the_prediction_is_of_the_mean_logits() -> None:
    head, output = SSBiFPNDecoder([4], 2, width=4), torch.randn(4, 2, 6, 6)
    expected = ((output[:2] + output[2:]) / 2).softmax(1)
    torch.testing.assert_close(head.predict(output, (6, 6)), expected)


def test_an_odd_number_of_images_is_refused() -> None:
    with pytest.raises(RequestError, match="3 images are no pairs of two dates"):
        SSBiFPNDecoder([4], 2, width=4)(Features((torch.rand(3, 4, 2, 2),), torch.rand(3, 4)), (32, 32))


# -- start and gradients -----------------------------------------------------------------------------------------------


def test_lora_starts_as_the_frozen_encoder_and_the_adapter_does_not() -> None:
    image = torch.rand(1, 3, 64, 64)
    for method, same in ((LORA, True), (PeftCD(width=4), False)):
        model = adapt(TimmViT(3, image_size=64, **DINO), method).eval()
        with torch.no_grad():
            start = model(image)
            with model.disabled():
                frozen = model(image)
        assert [torch.equal(a, b) for a, b in zip(start.maps, frozen.maps, strict=True)] == [same] * 4


@VARIANTS
def test_gradients_are_in_what_was_added_alone(model) -> None:
    model = model().train()
    with torch.no_grad():  # away from LoRA's zero start, where half of it has no gradient
        for parameter in model.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.head.loss(model(torch.rand(4, 3, 64, 64)), torch.randint(0, 2, (2, 64, 64))).backward()
    trained = trainable(model)
    assert {name.partition(".")[0] for name in trained} == {"adapter", "head"}
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in trained.items() if "adapter" in n)
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("width", [0, -3])
def test_impossible_widths(width) -> None:
    for make in (lambda: PeftCD(width=width), *(
        lambda kind=kind: kind([4, 8], 2, width=width) for kind in (SSBiFPNDecoder, ResidualPyramidDecoder)
    )):  # fmt: skip
        with pytest.raises(RequestError, match=f"width {width}: use"):
            make()


# -- the decoders ------------------------------------------------------------------------------------------------------


def test_fusion_weights_sum_to_one_and_keep_every_level() -> None:
    fuse = change.Fusion([6] * 4, 8)
    with torch.no_grad():
        for score in fuse.score:
            score.weight.mul_(200)  # type: ignore[union-attr, operator]
    levels = [f(torch.randn(3, 6, 16, 16)) for f in fuse.proj]
    shares = fuse.weights(levels).detach()
    torch.testing.assert_close(shares.sum(1), torch.ones(3, 16, 16))
    low, high = 1 / (1 + 3 * math.e), math.e / (math.e + 3)
    assert low - 1e-6 <= float(shares.min()) < 0.15
    assert 0.4 < float(shares.max()) <= high + 1e-6
    assert (round(low, 3), round(high, 3)) == (0.109, 0.475)


def test_the_pyramid_is_summed_from_coarse_to_fine() -> None:
    """The published steps, written out."""
    head = ResidualPyramidDecoder([4, 6, 8], 2, width=8).eval()
    maps = [torch.randn(2, c, 32 >> i, 32 >> i) for i, c in enumerate((4, 6, 8))]
    lateral = [block(m) for block, m in zip(head.pyramid.inner_blocks, maps, strict=True)]
    up = nn.Upsample(scale_factor=2, mode="nearest")
    lateral[1] = lateral[1] + up(lateral[2])
    lateral[0] = lateral[0] + up(lateral[1])
    fine, middle, coarse = (block(x) for block, x in zip(head.pyramid.layer_blocks, lateral, strict=True))
    x = head.blocks[0](coarse)
    x = head.blocks[1](change.doubled(x) + middle)
    x = head.blocks[2](change.doubled(x) + fine)
    x = head.classify(change.doubled(head.smooth(change.doubled(x))))
    torch.testing.assert_close(head.decode(maps, (128, 128)), x)
    with pytest.raises(RequestError, match="they must come fine to coarse"):
        head.decode(maps[::-1], (128, 128))


# -- published numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "method", "adapter", "head"),
    [
        ("dino", PeftCD(), 1_598_208, 2_076_038 - 141_440),  # without the published decoder's idle branch
        ("dino", LORA, 786_432, 2_076_038 - 141_440),
        ("sam", PeftCD(), 1_714_416, 9_284_866),
        ("sam", LORA, 867_456, 9_284_866),
    ],
)
def test_published_counts(encoder, method, adapter, head) -> None:
    with torch.device("meta"):
        if encoder == "dino":
            backbone: Any = TimmViT(3, name="vit_large_patch16_dinov3", image_size=256, depths=[5, 11, 17, 23])
            decoder: Any = SSBiFPNDecoder(backbone.channels, 2)
        else:
            backbone = TimmHiera(3, name="sam2_hiera_large")
            decoder = ResidualPyramidDecoder(backbone.channels, 2)
        found = adapt(backbone, method, head=decoder).count()
    assert (found["adapter"], found["head"]) == (adapter, head)


def test_ia3_attaches_to_the_fused_projection() -> None:
    """The third published variant: 3 D scales a block."""
    model = adapt(TimmViT(3, image_size=64, **DINO), IA3(roles=("attention.qkv",)))
    assert model.count()["adapter"] == 4 * 72


# -- files of the official code ----------------------------------------------------------------------------------------


def released(model: Adapted, kind: str) -> dict[str, Tensor]:
    """Random tensors of the official names for such a model."""
    head = {f"decoder.{n}": torch.randn_like(t.float()) for n, t in model.head.state_dict().items()}  # type: ignore[union-attr]
    head |= {"decoder.detail_in.0.weight": torch.randn(2, 2), "decoder.detail_gate.weight": torch.randn(2)}
    encoder: dict[str, Tensor] = {}
    for block in range(4):
        if kind == "adapter":
            start = f"encoder.blocks.{block}"
            encoder |= {
                f"{start}.prompt_learn.0.weight": torch.randn(4, 24), f"{start}.prompt_learn.0.bias": torch.randn(4),
                f"{start}.prompt_learn.2.weight": torch.randn(24, 4), f"{start}.prompt_learn.2.bias": torch.randn(24),
                f"{start}.block.norm1.weight": torch.randn(24),
            }  # fmt: skip
        else:
            start = f"encoder.base_model.model.blocks.{block}.attn.qkv"
            encoder |= {
                f"{start}.lora_A.default.weight": torch.randn(2, 24),
                f"{start}.lora_B.default.weight": torch.randn(72, 2),
                f"{start}.base_layer.weight": torch.randn(72, 24),
            }
    return {f"change_detection.{name}": tensor for name, tensor in (encoder | head).items()}


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_released_names_load_strictly(kind, tmp_path) -> None:
    model = dino(PeftCD(width=4) if kind == "adapter" else LoRA(rank=2, roles=("attention.qkv",)))
    state = {n: t for n, t in released(model, kind).items() if not n.endswith("num_batches_tracked")}
    torch.save({"state_dict": state}, tmp_path / "released.pth")
    left = load_official(model, tmp_path / "released.pth")
    assert [name for name in left if name.startswith("decoder.")] == [
        "decoder.detail_gate.weight", "decoder.detail_in.0.weight",
    ]  # fmt: skip
    assert len(left) == 2 + 4
    mine = {n: t for n, t in model.trained_state().items() if not n.endswith("num_batches_tracked")}
    start = "change_detection."
    assert torch.equal(mine["head.head.1.weight"], state[f"{start}decoder.head.1.weight"])
    (first, *_) = (n for n in mine if n.startswith("adapter") and "blocks/2" in n and n.endswith(("up", "up.weight")))
    name = "blocks.2.prompt_learn.2" if kind == "adapter" else "base_model.model.blocks.2.attn.qkv.lora_B.default"
    theirs = state[f"{start}encoder.{name}.weight"]
    assert torch.equal(mine[first], theirs if kind == "adapter" else theirs.t())

    before = {n: t.clone() for n, t in model.trained_state().items()}
    short = {n: t for n, t in state.items() if "context.proj.0.weight" not in n}
    block = next(n for n in state if "blocks.2." in n)
    for message, bad in (
        ("1 missing", short),
        ("adapts block 9", state | {block.replace("blocks.2.", "blocks.9."): state[block]} | _lone(kind)),
        ("optimizer.step is no tensor", state | {"change_detection.optimizer.step": torch.ones(1)}),
    ):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path / "bad.pth")
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())


def _lone(kind: str) -> dict[str, Tensor]:
    """A tensor of a block that the small encoder has not."""
    if kind == "adapter":
        return {"change_detection.encoder.blocks.9.prompt_learn.0.bias": torch.ones(4)}
    return {"change_detection.encoder.base_model.model.blocks.9.attn.qkv.lora_A.default.weight": torch.ones(2, 24)}
