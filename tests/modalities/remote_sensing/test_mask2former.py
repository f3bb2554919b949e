"""The Mask2Former head: its pyramid, its published size, its loss with ignored pixels, its prediction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from modalities.remote_sensing.heads import Mask2FormerHead
from modalities.remote_sensing.heads.mask2former import Queries, pyramid
from shared.backbone import Features
from shared.errors import RequestError

SMALL = {"queries": 6, "decoder_layers": 2, "encoder_layers": 1, "width": 32, "feedforward": 32, "points": 256}


def small(classes: int = 3, maps: int = 4, **more: Any) -> Mask2FormerHead:
    return Mask2FormerHead((16,) * maps, classes, **{**SMALL, "encoder_feedforward": 32, **more})


def features(batch: int = 2, maps: int = 4, grid: tuple[int, int] = (4, 4)) -> Features:
    return Features(tuple(torch.randn(batch, 16, *grid) for _ in range(maps)), torch.zeros(batch, 16))


def blocks(batch: int = 2) -> torch.Tensor:
    """Masks (batch, 64, 64) of three classes: left, right top, right bottom."""
    mask = torch.zeros(batch, 64, 64, dtype=torch.int64)
    mask[:, :32, 32:], mask[:, 32:, 32:] = 1, 2
    return mask


def said(mask: torch.Tensor, classes: int, sure: float = 20.0) -> Queries:
    """An output whose query c says class c and its mask, as surely as ``sure``."""
    cells = mask[:, ::4, ::4]
    masks = torch.stack([torch.where(cells == c, sure, -sure) for c in range(classes)], 1)
    logits = sure * torch.eye(classes, classes + 1).expand(len(mask), -1, -1)
    return Queries((logits.clone().requires_grad_(),), (masks.requires_grad_(),))


def test_pyramid_of_a_patch_16_transformer() -> None:
    maps = [torch.randn(1, 8, 32, 32) for _ in range(4)]
    levels = pyramid(maps, (512, 512))
    assert [tuple(level.shape) for level in levels] == [(1, 8, n, n) for n in (128, 64, 32, 16)]
    assert torch.equal(levels[2], maps[2])
    for level, source, factor in zip(levels, maps, (4, 2, 1, 0.5), strict=True):
        scaled = torch.nn.functional.interpolate(source, scale_factor=factor, mode="bilinear", align_corners=False)
        torch.testing.assert_close(level, scaled)
    assert [tuple(level.shape[2:]) for level in pyramid(maps[:1], (64, 96))] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_a_hierarchical_pyramid_is_taken_as_it_is() -> None:
    maps = [torch.randn(1, c, n, n) for c, n in ((4, 32), (8, 16), (16, 8), (32, 4))]
    assert all(level is source for level, source in zip(pyramid(maps, (128, 128)), maps, strict=True))


def test_published_size() -> None:
    """Counted by hand: pixel decoder (6 layers, 3 levels), FPN, 9 decoder layers, queries, predictors; 256 wide."""
    with torch.device("meta"):
        head = Mask2FormerHead((1024,) * 4, 4)
    e, f = 256, 2048
    attention = 4 * (e * e + e)
    encoder = 2 * (e * e + e) + (e * 192 + 192) + (e * 96 + 96) + 2 * e * 1024 + 1024 + e + 4 * e
    pixel = 3 * (1024 * e + 3 * e) + 6 * encoder + 3 * e + 1024 * e + 9 * e * e + 4 * e + (e * e + e)
    decoder = 9 * (2 * attention + 2 * e * f + f + e + 6 * e) + 2 * e + 3 * (e * e + e)
    assert sum(p.numel() for p in head.parameters()) == pixel + decoder + 2 * 100 * e + 3 * e + 5 * e + 5


def test_outputs_one_prediction_before_the_decoder_and_one_after_each_layer() -> None:
    head = small(decoder_layers=2)
    output = head(features(grid=(4, 6)), (64, 96))
    assert [tuple(c.shape) for c in output.classes] == [(2, 6, 4)] * 3
    assert [tuple(m.shape) for m in output.masks] == [(2, 6, 16, 24)] * 3
    assert head.predict(output, (64, 96)).shape == (2, 3, 64, 96)
    one = small(maps=1)
    assert one(features(maps=1), (64, 64)).masks[0].shape == (2, 6, 16, 16)


def test_every_parameter_trains() -> None:
    head = small()
    head.loss(head(features(), (64, 64)), blocks()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_loss_of_a_sure_answer_is_small_and_of_an_unsure_one_its_closed_form() -> None:
    one_class = torch.tensor([0, 2])[:, None, None].expand(2, 64, 64)
    sure = said(one_class, 3, sure=7.0)
    sure.classes[0].data[0, 1:] = sure.classes[0].data[1, :2] = torch.tensor([0.0, 0, 0, 7])  # the others: no object
    assert small().loss(sure, one_class) < 0.8  # not 0: the library samples zeros beyond the border of an image
    # All logits 0: class entropy log 4 at weight 2, mask entropy log 2 at weight 5; dice depends on the sampled points.
    zero = Queries((torch.zeros(2, 3, 4),), (torch.zeros(2, 3, 16, 16),))
    found = small(dice_weight=0.0).loss(zero, blocks()).item()
    assert found == pytest.approx(2 * math.log(4) + 5 * math.log(2), rel=1e-5)
    # A whole image of one class: the mask share is 1/2 at every one of 256 points.
    dice = 1 - (2 * 128 + 1) / (128 + 256 + 1)
    found = small(class_weight=0.0, mask_weight=0.0).loss(zero, one_class).item()
    assert found == pytest.approx(5 * dice, rel=0.02)  # the border again


def test_loss_weights_count_every_layer() -> None:
    zero = Queries((torch.zeros(1, 3, 4),) * 3, (torch.zeros(1, 3, 16, 16),) * 3)
    head = small(dice_weight=0.0, mask_weight=1.5, class_weight=7.0)
    assert head.loss(zero, blocks(1)).item() == pytest.approx(3 * (7 * math.log(4) + 1.5 * math.log(2)), rel=1e-5)


def test_everything_ignored_is_exactly_nothing_with_a_gradient() -> None:
    head = small()
    loss = head.loss(head(features(), (64, 64)), torch.full((2, 64, 64), 255))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_an_image_without_labels_takes_no_part() -> None:
    head, mask = small(), blocks()
    mask[1] = 255
    output = said(blocks(), 3, sure=1.0)
    loss = head.loss(output, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0.1
    assert output.classes[0].grad is not None
    assert output.masks[0].grad is not None
    for gradient in (output.classes[0].grad, output.masks[0].grad):
        assert not gradient[1].any()
        assert gradient[0].any()


def test_inside_an_ignored_region_no_mask_logit_matters() -> None:
    head, mask = small(points=2000), blocks()
    mask[:, :, 40:] = 255
    output = said(blocks(), 3, sure=1.0)
    head.loss(output, mask).backward()
    assert output.masks[0].grad is not None
    reached = output.masks[0].grad.abs().amax((0, 1, 2)) > 0  # by column of cells; labelled columns end at 40 / 4
    assert reached[:10].all()
    assert not reached[11:].any()


def test_an_ignored_class_index_is_never_taught() -> None:
    head, mask = small(), blocks()
    mask[:, :, :32] = 255  # class 0 lies wholly below
    output = said(blocks(), 3, sure=0.0)
    head.loss(output, mask).backward()
    assert output.classes[0].grad is not None
    toward = output.classes[0].grad.sum((0, 1))  # negative: the loss wants more of it
    assert toward[0] > 0
    assert (toward[1:3] < 0).all()


def test_prediction_is_the_sum_over_queries_of_class_times_mask() -> None:
    classes = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]])
    masks = torch.tensor([[[[1.0]], [[-2.0]]]])
    found = small(classes=2).predict(Queries((classes,), (masks,)), (2, 3))
    shares, inside = classes.softmax(-1), masks.sigmoid()
    for c in range(2):
        expected = shares[0, 0, c] * inside[0, 0] + shares[0, 1, c] * inside[0, 1]
        torch.testing.assert_close(found[0, c], expected.expand(2, 3))
    mask = blocks()
    assert torch.equal(small().predict(said(mask, 3), (64, 64)).argmax(1)[:, 2:62:4, 2:62:4], mask[:, 2:62:4, 2:62:4])


def test_it_learns() -> None:
    torch.manual_seed(1)
    head, maps, mask = small(decoder_layers=1), features(batch=1), blocks(1)
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = head.loss(head(maps, (64, 64)), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    with torch.no_grad():
        right = head.predict(head(maps, (64, 64)), (64, 64)).argmax(1) == mask
    assert right.float().mean() > 0.7


def test_mixed_precision() -> None:
    head = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(head(features(), (64, 64)), blocks())
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_refusals() -> None:
    with pytest.raises(RequestError, match="one feature map or four, not 2"):
        small(maps=2)
    with pytest.raises(RequestError, match=r"head.width 48"):
        small(width=48)
