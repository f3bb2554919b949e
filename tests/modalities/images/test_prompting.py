"""Prompts drawn from the truth: on the object, around it, like it, and the same for the same random state."""

from __future__ import annotations

import numpy as np
import torch

from modalities.images.backbones import Prompts
from modalities.images.prompting import (
    Objects,
    bounds,
    central_prompts,
    clicked,
    draw_prompts,
    drawn,
    found,
    passes,
    rough,
)


def labelled() -> np.ndarray:
    """A square of class 1 and a bar of it, a block of class 2, an ignored corner."""
    mask = np.zeros((32, 40), np.int64)
    mask[4:12, 4:12] = 1
    mask[20:22, 4:30] = 1
    mask[6:10, 20:38] = 2
    mask[30:, 36:] = 255
    return mask


def objects(count: int = 3) -> Objects:
    mask = labelled()
    lists = [found(mask, 3, 0, "component", 4), []]
    return drawn(lists, count, torch.from_numpy(np.stack([mask, np.zeros_like(mask)])), 255)


def test_objects_are_connected_parts_or_whole_classes() -> None:
    mask = labelled()
    parts = found(mask, 3, 0, "component", 4)
    assert [int(one.sum()) for one in parts] == [72, 64, 52]  # the largest first
    assert [int(one.sum()) for one in found(mask, 3, 0, "component", 60)] == [72, 64]
    assert [int(one.sum()) for one in found(mask, 3, 0, "class", 4)] == [116, 72]
    assert len(found(mask, 3, 1, "class", 4)) == 2  # another background: classes 0 and 2
    diagonal = np.eye(5, dtype=np.int64)
    assert len(found(diagonal, 2, 0, "component", 1)) == 1
    assert found(np.full((4, 4), 255), 3, 0, "component", 1) == []


def test_an_image_without_objects_has_none_that_is_valid() -> None:
    chosen = objects()
    assert chosen.valid.tolist() == [[True] * 3, [False] * 3]
    assert not chosen.masks[1].any()
    assert not chosen.counts[0, 31, 39]
    assert chosen.counts[0, 0, 0]
    asked = draw_prompts(chosen, "points", 2, 4)
    assert (asked.labels[1, :, 0] == -1).all()  # nothing to point at
    assert (draw_prompts(chosen, "box", 1, 4).boxes[1] >= 0).all()


def test_points_lie_on_their_object_or_off_it() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = objects()
        asked = draw_prompts(chosen, "points", 3, 4)
        assert (asked.labels[0, :, 0] == 1).all()
        columns, rows = asked.points[0].long().unbind(-1)
        for one in range(3):
            on = chosen.masks[0, one][rows[one], columns[one]]
            assert torch.equal(on, asked.labels[0, one] == 1)
            assert chosen.counts[0][rows[one], columns[one]].all()
    assert set(draw_prompts(objects(), "points", 12, 4).labels[0].flatten().tolist()) == {0, 1}


def test_points_reach_every_pixel_of_an_object() -> None:
    mask = torch.zeros(1, 1, 6, 7, dtype=torch.bool)
    mask[0, 0, 2, 3] = mask[0, 0, 5, 6] = True
    torch.manual_seed(0)
    seen = {
        tuple(draw_prompts(Objects(mask, torch.ones(1, 1), mask[:, 0] | True), "points", 1, 1).points[0, 0, 0].tolist())
        for _ in range(40)
    }
    assert seen == {(3.0, 2.0), (6.0, 5.0)}


def test_boxes_are_near_the_true_ones_and_inside_the_image() -> None:
    chosen = objects()
    true = bounds(chosen.masks)[0]
    assert bounds(torch.from_numpy(labelled() == 2)[None, None]).tolist() == [[[20, 6, 37, 9]]]
    off = []
    for seed in range(50):
        torch.manual_seed(seed)
        boxes = draw_prompts(chosen, "box", 1, 4).boxes[0]
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([40.0, 32, 40, 32])).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        off.append((boxes - true)[:, 0] / (true[:, 2] - true[:, 0]))
    spread = torch.cat(off)
    assert 0.06 < float(spread.std()) < 0.14


def test_rough_masks_are_the_truth_at_a_lower_resolution() -> None:
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :16] = True
    fine, coarse = rough(mask, 4, 1), rough(mask, 4, 8)
    assert fine.shape == coarse.shape == (1, 1, 1, 8, 8)
    assert fine[0, 0, 0, 3].tolist() == [10] * 4 + [-10] * 4
    assert coarse.unique().tolist() == [0]  # half of the one cell that is left
    assert draw_prompts(objects(), "mask", 3, 4).labels.shape == (2, 3, 1)  # one point comes with it


def test_what_is_measured_by_is_always_the_same() -> None:
    masks = objects().masks[:1]
    torch.manual_seed(1)
    first = central_prompts(masks, "points", 4)
    torch.manual_seed(2)
    assert torch.equal(first.points, central_prompts(masks, "points", 4).points)
    square = torch.from_numpy(labelled() == 1)[None, None]
    square[:, :, 15:] = False
    (x, y), *_ = central_prompts(square, "points", 4).points[0, 0].tolist()
    assert 7 <= x <= 8
    assert 7 <= y <= 8
    assert central_prompts(square, "box", 4).boxes.tolist() == [[[4, 4, 11, 11]]]
    assert central_prompts(square, "mask", 4).masks.shape == (1, 1, 1, 8, 10)
    edge = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    assert central_prompts(edge, "points", 1).points.flatten().tolist() == [4, 4]  # the border of the image is outside


def test_the_random_state_alone_decides() -> None:
    for kind in ("points", "box", "mask"):
        torch.manual_seed(5)
        first = draw_prompts(objects(), kind, 3, 4)
        torch.manual_seed(5)
        again = draw_prompts(objects(), kind, 3, 4)
        assert all(a is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))
        other = draw_prompts(objects(), kind, 3, 4)
        assert any(a is not None and not torch.equal(a, b) for a, b in zip(first, other, strict=True))


# -- clicks ------------------------------------------------------------------------------------------------------------


def answered(truth: torch.Tensor, said: torch.Tensor) -> tuple[Objects, torch.Tensor]:
    """Objects bool (H, W) that count everywhere, and the logits (B, P, H, W) of answers at their size."""
    whole = torch.ones(1, *truth.shape, dtype=torch.bool)
    return Objects(truth[None, None], torch.ones(1, 1, dtype=torch.bool), whole), torch.where(said, 5.0, -5.0)[
        None, None
    ]


def test_a_click_lies_where_the_answer_is_wrong_and_says_how() -> None:
    truth, said = torch.zeros(8, 10, dtype=torch.bool), torch.zeros(8, 10, dtype=torch.bool)
    truth[2:5, 2:6], said[2:5, 3:8] = True, True  # column 2 is missed, columns 6 and 7 are too much
    given, logits = answered(truth, said)
    drawn_points = set()
    for seed in range(120):
        torch.manual_seed(seed)
        asked = clicked(Prompts(), logits, given)
        assert asked.points is not None
        assert asked.labels is not None
        drawn_points.add((*asked.points[0, 0, 0].int().tolist(), int(asked.labels[0, 0, 0])))
    assert drawn_points == {(x, y, int(x == 2)) for x in (2, 6, 7) for y in (2, 3, 4)}


def test_clicks_are_drawn_uniformly_from_the_error() -> None:
    truth, said = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    truth[0, :2], said[3, :6] = True, True  # two pixels are missed, six too much
    given, logits = answered(truth, said)
    many = Objects(given.masks.expand(1, 4000, 4, 8), given.valid.expand(1, 4000), given.counts)
    torch.manual_seed(0)
    asked = clicked(Prompts(), logits.expand(1, 4000, 4, 8), many)
    assert asked.labels is not None
    assert abs(float(asked.labels.float().mean()) - 0.25) < 0.03  # four standard deviations


def test_clicks_join_earlier_prompts_and_say_nothing_where_all_is_right() -> None:
    truth = torch.zeros(8, 10, dtype=torch.bool)
    truth[2:5, 2:6] = True
    given, right = answered(truth, truth)
    box = Prompts(boxes=torch.tensor([[[2.0, 2, 5, 4]]]))
    once = clicked(box, right, given)
    assert once.boxes is box.boxes
    assert once.labels is not None
    assert once.labels.tolist() == [[[-1]]]
    twice = clicked(once, -right, given)
    assert twice.points is not None
    assert twice.labels is not None
    assert twice.points.shape == (1, 1, 2, 2)
    x, y = twice.points[0, 0, 1].int().tolist()
    assert twice.labels[0, 0].tolist() == [-1, int(truth[y, x])]
    unlabelled = given._replace(counts=torch.zeros(1, 8, 10, dtype=torch.bool))
    assert clicked(Prompts(), -right, unlabelled).labels.tolist() == [[[-1]]]  # type: ignore[union-attr]


def test_an_answer_of_a_quarter_of_the_size_is_compared_at_the_full_one() -> None:
    truth = torch.zeros(16, 16, dtype=torch.bool)
    truth[:, :8] = True
    given, _ = answered(truth, truth)
    logits = torch.full((1, 1, 4, 4), -5.0)
    logits[..., :3] = 5.0  # up to column 11 or so
    for seed in range(20):
        torch.manual_seed(seed)
        asked = clicked(Prompts(), logits, given)
        assert asked.points is not None
        assert 8 <= float(asked.points[0, 0, 0, 0]) <= 12
        assert asked.labels is not None
        assert asked.labels.item() == 0


def test_passes_are_as_published() -> None:
    assert passes(0) == []
    places = set()
    for seed in range(60):
        torch.manual_seed(seed)
        found = passes(8)
        assert len(found) == 10  # eleven with the first
        assert sum(found) == 8
        assert not found[-1]
        places.add(found.index(False))
    assert places == set(range(8))
