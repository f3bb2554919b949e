"""The dual masks: conditions of every task, what is given and what counts in the loss."""

from __future__ import annotations

import random

import pytest
import torch

from modalities.diffusion.masks import TASKS, condition, frame_mask, interpolations, masked_condition, masked_loss
from shared.errors import RequestError

INTERPOLATIONS = {(1, 0, 1, 0, 1, 0, 1, 0), (0, 1, 0, 1, 0, 1, 0, 1), (1, 0, 0, 1, 0, 0, 1, 0)}


def drawn(task: str, real: int, times: int = 200) -> set[tuple[int, ...]]:
    draws = random.Random(0)
    found = [condition(task, real, draws=draws) for _ in range(times)]
    assert {c.text for c in found} == {task != "i2v"}
    return {c.given for c in found}


def test_generation_is_given_nothing_or_one_real_frame():
    assert drawn("t2v", 5) == {(0,) * 8}
    for task in ("i2v", "it2v"):
        assert drawn(task, 5) == {tuple(int(i == place) for i in range(8)) for place in range(5)}


def test_interpolation_is_given_one_of_three_masks():
    assert drawn("interpolation", 8) == INTERPOLATIONS == set(interpolations(8))


@pytest.mark.parametrize("real", range(2, 9))
def test_predictions_are_given_an_end_or_a_beginning(real):
    starts = {8 - sum(given) for given in drawn("pre_frame_prediction", real)}
    assert starts == set(range(1, real // 2 + 2))
    ends = {sum(given) for given in drawn("post_frame_prediction", real)}
    assert ends == set(range(real // 2, real))
    assert all(g == tuple(sorted(g)) for g in drawn("pre_frame_prediction", real))  # a suffix of ones
    assert all(g == tuple(sorted(g, reverse=True)) for g in drawn("post_frame_prediction", real))  # a prefix


def test_draws_are_python_s_own_where_none_are_given():
    random.seed(4)
    first = [condition("it2v", 8) for _ in range(20)]
    random.seed(4)
    assert [condition("it2v", 8) for _ in range(20)] == first
    assert len(set(first)) > 3


def test_other_lengths():
    assert condition("post_frame_prediction", 3, 3, random.Random(0)).given[-1] == 0
    assert interpolations(4) == ((1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 0, 1))


def test_what_cannot_be_is_said():
    with pytest.raises(RequestError, match="no task 'v2v'; there are i2v, t2v"):
        condition("v2v", 4)
    for real in (1, 9):
        with pytest.raises(RequestError, match=f"clips of {real} real frames: from 2 to 8"):
            condition("t2v", real)


def test_frame_masks():
    assert frame_mask(3).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert frame_mask([1, 4], 4).tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 2, 2), (2, 3, 8)], ids=["frames", "steps of a series"])
def test_a_condition_is_what_is_given_and_real_and_zero_elsewhere(task, shape):
    x = torch.randn(shape) + 5
    given = torch.tensor(condition(task, 3, draws=random.Random(1)).given)
    real = frame_mask([3, 6])
    found = masked_condition(x, given, real)
    both = (given * real).bool()
    assert torch.equal(found.transpose(1, 2)[both], x.transpose(1, 2)[both])
    assert (found.transpose(1, 2)[~both] == 0).all()
    assert bool(found.any()) == (task != "t2v")


def test_the_loss_divides_by_all_elements():
    predicted, target = torch.randn(1, 4, 8, 3, 3), torch.randn(1, 4, 8, 3, 3)
    error = (predicted - target).square()
    loss = masked_loss(predicted, target, frame_mask([4]))
    assert loss.shape == (1,)
    torch.testing.assert_close(loss[0], 0.5 * error[:, :, :4].mean())
    torch.testing.assert_close(masked_loss(predicted, target, frame_mask([8]))[0], error.mean())


def test_padding_gets_no_gradient():
    predicted = torch.randn(2, 4, 8, 3, 3, requires_grad=True)
    masked_loss(predicted, torch.randn(2, 4, 8, 3, 3), frame_mask([3, 7])).mean().backward()
    reached = predicted.grad.abs().sum((1, 3, 4)) > 0
    assert torch.equal(reached, frame_mask([3, 7]).bool())
