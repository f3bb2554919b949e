"""The hand-written low-rank product against plain autograd, and the branch beside a convolution against its weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.linear import Piece, convolution_beside, linear, linear_beside

sizes = st.integers(1, 7)


def problem(tokens: int, inputs: int, outputs: int, rank: int, split: bool, dtype=torch.float64):
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype)
    ranges = [(0, outputs // 2), (outputs // 2, outputs)] if split and outputs > 1 else [None]
    pieces = []
    for i, rows in enumerate(ranges):
        size = outputs if rows is None else rows[1] - rows[0]
        down = torch.randn(rank, inputs, dtype=dtype, requires_grad=True)
        up = torch.randn(rank, size, dtype=dtype, requires_grad=True)
        pieces.append(Piece(rows, down, up, 0.5 + i, 0.0))
    return x, weight, bias, pieces


def reference(x: Tensor, weight: Tensor, bias: Tensor, pieces) -> Tensor:
    for rows, down, up, scale, _ in pieces:
        start, stop = rows or (0, len(weight))
        pad = torch.zeros_like(weight)
        pad[start:stop] = 1
        change = torch.zeros_like(weight).index_add(0, torch.arange(start, stop), up.t() @ down * scale)
        weight = weight + pad * change
    return x @ weight.t() + bias


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 40), inputs=sizes, outputs=sizes, rank=st.integers(1, 4), split=st.booleans())
def test_value_and_gradients_equal_autograd(tokens, inputs, outputs, rank, split) -> None:
    torch.manual_seed(tokens + 100 * inputs)
    x, weight, bias, pieces = problem(tokens, inputs, outputs, rank, split)
    leaves = [x, *(t for p in pieces for t in (p.down, p.up))]
    expected, ours = reference(x, weight, bias, pieces), linear(x, weight, bias, pieces)
    assert torch.allclose(ours, expected, atol=1e-10)
    assert torch.allclose(linear_beside(x, x @ weight.t() + bias, pieces, False), expected, atol=1e-10)
    probe = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, probe), torch.autograd.grad(expected, leaves, probe), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("tokens", [2, 40])  # beside the product, and folded
def test_first_and_second_derivatives_are_right(tokens) -> None:
    x, weight, bias, pieces = problem(tokens, 4, 6, 2, True)
    leaves = tuple(t for p in pieces for t in (p.down, p.up))

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        mine = [p._replace(down=factors[2 * i], up=factors[2 * i + 1]) for i, p in enumerate(pieces)]
        return linear(x, weight, bias, mine)

    assert torch.autograd.gradcheck(run, (x, *leaves))
    assert torch.autograd.gradgradcheck(run, (x, *leaves))


def test_a_trained_weight_and_bias_also_get_their_gradient() -> None:
    x, weight, bias, pieces = problem(30, 4, 6, 2, False)
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    ours = torch.autograd.grad(linear(x, weight, bias, pieces).square().sum(), (weight, bias))
    theirs = torch.autograd.grad(reference(x, weight, bias, pieces).square().sum(), (weight, bias))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nothing_of_the_outputs_size_is_saved() -> None:
    """Saved for backward: the input, the frozen weight, and the factors."""
    x, weight, bias, pieces = problem(64, 8, 8, 2, False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias, pieces)
    assert {id(t) for t in saved} <= {id(t) for t in (x, weight, pieces[0].down, pieces[0].up)}


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 2), dilation=st.integers(1, 2), padding=st.integers(0, 2),
    rank=st.integers(1, 4), kernel=st.sampled_from([1, 3]), mode=st.sampled_from(["zeros", "reflect", "circular"]),
    dims=st.integers(1, 3),
)  # fmt: skip
def test_a_convolutions_branch_equals_its_weight(groups, stride, dilation, padding, rank, kernel, mode, dims) -> None:
    if dims == 3 and mode == "reflect":
        mode = "replicate"
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    host = kind(4, 8, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    x = torch.randn(2, 4, *(8,) * dims, dtype=torch.float64)
    down = torch.randn(rank, host.weight[0].numel(), dtype=torch.float64)
    up = torch.randn(rank, 8, dtype=torch.float64)
    beside = convolution_beside(host, x, host(x), [Piece(None, down, up, 0.7, 0.0)], False)
    with torch.no_grad():
        host.weight += (up.t() @ down * 0.7).reshape(host.weight.shape)
    assert torch.allclose(beside, host(x), atol=1e-9)
