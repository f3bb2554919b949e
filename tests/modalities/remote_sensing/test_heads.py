"""The light heads: shapes for any strides, few parameters, and a loss with closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modalities.remote_sensing.heads import LightDecoder, LinearDecoder, PixelDecoder, SemanticFPN
from modalities.remote_sensing.heads.light import dark_objects
from modalities.remote_sensing.losses import cross_entropy_dice
from shared.backbone import Features
from shared.errors import RequestError


def features(*shapes: tuple[int, int, int], batch: int = 2) -> Features:
    return Features(tuple(torch.randn(batch, *shape) for shape in shapes), torch.zeros(batch, 1))


def test_maps_of_any_strides_give_logits_at_the_asked_size() -> None:
    maps = features((16, 20, 12), (24, 10, 6), (8, 5, 3))
    for head in (LightDecoder((16, 24, 8), 4, width=16), LinearDecoder((16, 24, 8), 4)):
        output = head(maps, (80, 48))
        assert output.shape == (2, 4, 80, 48)
        shares = head.predict(output, (33, 17))
        assert shares.shape == (2, 4, 33, 17)
        torch.testing.assert_close(shares.sum(1), torch.ones(2, 33, 17))
    assert LightDecoder((8,), 3)(features((8, 1, 1), batch=1), (16, 16)).shape == (1, 3, 16, 16)


def test_few_parameters() -> None:
    count = sum(p.numel() for p in LightDecoder((384,) * 4, 4).parameters())
    separable = 9 * 64 + 64 * 64 + 2 * 64
    assert count == 4 * (384 * 64 + 64 + 2 * 64) + 2 * separable + 64 * 4 + 4 == 108_932
    assert sum(p.numel() for p in LinearDecoder((384,) * 4, 4).parameters()) == 2 * 1536 + 1536 * 4 + 4


def test_every_parameter_trains() -> None:
    for head in (LightDecoder((16, 8), 4, width=16), LinearDecoder((16, 8), 4)):
        head.loss(head(features((16, 8, 8), (8, 4, 4)), (32, 32)), torch.randint(0, 4, (2, 32, 32))).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_the_linear_head_is_linear_once_its_norm_is_fixed() -> None:
    head = LinearDecoder((6,), 3).eval()
    x, y = features((6, 4, 4)), features((6, 4, 4))
    mixed = Features((0.3 * x.maps[0] + 0.7 * y.maps[0],), x.summary)
    expected = 0.3 * head(x, (16, 16)) + 0.7 * head(y, (16, 16))
    torch.testing.assert_close(head(mixed, (16, 16)), expected)


def test_refusals() -> None:
    with pytest.raises(RequestError, match="built for 2 feature maps, the backbone gives 1"):
        LightDecoder((8, 8), 3)(features((8, 4, 4)), (16, 16))
    with pytest.raises(RequestError, match="class_weights"):
        LinearDecoder((8,), 3, class_weights=(1.0, 2.0))
    with pytest.raises(RequestError, match=r"head.width 0"):
        LightDecoder((8,), 3, width=0)


# -- the loss ------------------------------------------------------------------------------------------------------


def uniform(classes: int, *shape: int) -> Tensor:
    return torch.zeros(shape[0], classes, *shape[1:], requires_grad=True)


def test_closed_form_of_uniform_logits() -> None:
    mask = torch.tensor([[[0, 0, 0, 1]]])
    # Every share is 1/2: dice of class 0 is 2 * 1.5 / (2 + 3), of class 1 2 * 0.5 / (2 + 1).
    expected = math.log(2) + 1 - (3 / 5 + 1 / 3) / 2
    assert cross_entropy_dice(uniform(2, 1, 1, 4), mask).item() == pytest.approx(expected, rel=1e-6)


def test_closed_form_with_class_weights_and_an_absent_class() -> None:
    logits = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]])
    mask = torch.tensor([[[0, 1, 255]]])
    share = math.exp(2) / (math.exp(2) + 2)
    rest = (1 - share) / 2
    entropy = (4 * -math.log(share) + 1 * math.log(3)) / 5
    dice = (2 * share / (share + 1 / 3 + 1) + 2 / 3 / (rest + 1 / 3 + 1)) / 2
    found = cross_entropy_dice(logits, mask, class_weights=torch.tensor([4.0, 1.0, 9.0]))
    assert found.item() == pytest.approx(entropy + 1 - dice, rel=1e-6)
    head = LinearDecoder((1,), 3, class_weights=(4.0, 1.0, 9.0))
    assert head.loss(logits, mask).item() == pytest.approx(entropy + 1 - dice, rel=1e-6)


def test_a_sure_and_right_answer_costs_nothing() -> None:
    mask = torch.randint(0, 3, (2, 5, 5))
    logits = 100 * torch.nn.functional.one_hot(mask, 3).movedim(-1, 1).float()
    assert cross_entropy_dice(logits, mask).item() == pytest.approx(0, abs=1e-6)


def test_everything_ignored_is_exactly_nothing_with_a_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = cross_entropy_dice(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0, 1))
def test_ignored_pixels_do_not_matter(seed: int, classes: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 6, 5, generator=generator, requires_grad=True)
    mask = torch.randint(0, classes, (2, 6, 5), generator=generator)
    ignored = torch.rand(2, 6, 5, generator=generator) < share
    mask[ignored] = 255
    loss = cross_entropy_dice(logits, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert logits.grad.movedim(1, -1)[ignored].abs().sum() == 0
    noisy = torch.where(ignored[:, None], torch.randn(2, classes, 6, 5, generator=generator), logits.detach())
    assert cross_entropy_dice(noisy, mask).item() == pytest.approx(loss.item(), rel=1e-6)
    assert ignored.all() or loss > 0


# -- pixels and tokens ---------------------------------------------------------------------------------------------


def test_a_pixel_is_scored_by_its_bands_their_height_over_the_dark_and_the_tokens_around_it() -> None:
    head = PixelDecoder((3, 6, 6), 4, width=8).eval()
    maps = features((3, 32, 32), (6, 4, 4), (6, 4, 4))
    assert torch.equal(head(maps, (32, 32)), torch.zeros(2, 4, 32, 32))  # both parts start at zero
    weight, bias = torch.randn(4, 6), torch.randn(4)
    head.spectrum.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    image = maps.maps[0]
    described = torch.cat([image, image - dark_objects(image)], 1)
    expected = 10 * torch.einsum("kc,bchw->bkhw", weight, described) + 10 * bias[:, None, None]
    torch.testing.assert_close(head(maps, (32, 32)), expected)
    torch.nn.init.normal_(head.classify.weight)
    assert (head(maps, (32, 32)) - expected).abs().max() > 0.01
    alone = PixelDecoder((3, 6, 6), 4, width=0)
    alone.load_state_dict({n: t for n, t in head.state_dict().items() if n.startswith("spectrum.")})
    torch.testing.assert_close(alone(maps, (32, 32)), expected)
    changed = Features((image, *(m.roll(1, 3) for m in maps.maps[1:])), maps.summary)
    assert (head(changed, (32, 32)) - head(maps, (32, 32))).abs().max() > 0.01


def test_dark_objects_are_the_darkest_tenth_and_shift_with_the_band() -> None:
    image = torch.arange(100.0).repeat_interleave(16).view(1, 1, 100, 4, 4).permute(0, 1, 3, 2, 4).reshape(1, 1, 4, 400)
    assert dark_objects(image).item() == pytest.approx(9.9)  # a tenth of the way from 0 to 99
    torch.testing.assert_close(dark_objects(image + 5), dark_objects(image) + 5)
    assert dark_objects(torch.full((1, 2, 3, 3), 7.0)).tolist() == [[[[7.0]], [[7.0]]]]


def test_pixel_decoder_trains_every_parameter_once_it_has_begun_and_refuses_maps_without_the_image() -> None:
    head = PixelDecoder((3, 6), 4, width=8)
    maps = features((3, 16, 16), (6, 2, 2))
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        head.loss(head(maps, (16, 16)), torch.randint(0, 4, (2, 16, 16))).backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    with pytest.raises(RequestError, match="the first map is 2 x 2 pixels, not the image; set backbone.pixels"):
        PixelDecoder((6, 6), 4)(features((6, 2, 2), (6, 2, 2)), (16, 16))
    with pytest.raises(RequestError, match="a backbone with pixels: true"):
        PixelDecoder((6,), 4)
    with pytest.raises(RequestError, match="dropout 1"):
        PixelDecoder((3, 6), 4, dropout=1.0)


def test_semantic_fpn_sums_levels_of_any_sizes_and_every_parameter_trains() -> None:
    head = SemanticFPN((16, 24, 8, 8), 4, width=16, inner=8)
    maps = features((16, 25, 41), (24, 13, 21), (8, 7, 11), (8, 4, 6))
    output = head(maps, (100, 161))
    assert output.shape == (2, 4, 100, 161)
    head.loss(output, torch.randint(0, 4, (2, 100, 161))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert [len(steps) for steps in head.levels] == [1, 1, 2, 3]  # strides 4 to 32: doublings 0 to 3
    with pytest.raises(RequestError, match="fine to coarse"):
        head(features((16, 4, 6), (24, 13, 21), (8, 7, 11), (8, 4, 6)), (100, 161))


def test_semantic_fpn_has_the_published_size() -> None:
    head = SemanticFPN((32, 64, 144, 312), 150)
    pyramid = sum((c + 1) * 256 for c in (32, 64, 144, 312)) + 4 * (9 * 256 * 256 + 256)
    levels = 4 * (9 * 256 * 128 + 256) + 3 * (9 * 128 * 128 + 256)
    assert sum(p.numel() for p in head.parameters()) == pyramid + levels + 128 * 150 + 150
