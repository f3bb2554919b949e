"""The hand-written low-rank product against plain autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.linear import Piece, linear, linear_beside
from shared.skinny import product, product_t

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


@settings(max_examples=40, deadline=None)
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
    """Saved for backward: the input, the frozen weight, the factors, and r numbers a token."""
    x, weight, bias, pieces = problem(64, 8, 8, 2, False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias, pieces)
    known = {id(t) for t in (x, weight, pieces[0].down, pieces[0].up)}
    assert [t.shape for t in saved if id(t) not in known] == [(2, 64)]


def test_in_half_precision_a_small_change_is_not_lost() -> None:
    """A change far below the weight's last bit still moves the output by its own size, as it does in single."""
    torch.manual_seed(0)
    x, down, up = torch.randn(40, 16).bfloat16(), torch.randn(2, 16), torch.randn(2, 24) * 1e-4
    x[:, 1::2] = -x[:, ::2]  # what the frozen weight gives is 0, so the output has bits to spare
    found = linear(x, torch.ones(24, 16, dtype=torch.bfloat16), None, [Piece(None, down, up, 1.0, 0.0)])
    exact = x.float() @ (up.t() @ down).t()
    assert float((found.float() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("tokens", [2, 40])
def test_gradients_in_half_precision_are_near_those_in_single(tokens) -> None:
    torch.manual_seed(0)
    x, weight, bias, pieces = problem(tokens, 16, 24, 2, True, torch.float32)
    leaves = [x, *(t for p in pieces for t in (p.down, p.up))]
    probe = torch.randn(tokens, 24)
    exact = torch.autograd.grad(reference(x, weight, bias, pieces), leaves, probe)
    half = linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), pieces)
    for a, b in zip(torch.autograd.grad(half, leaves, probe.bfloat16()), exact, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm() / b.norm()) < 0.02


def test_many_threads_share_out_what_one_does_alone() -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    x, a, b = torch.randn(300, 252), torch.randn(3, 252), torch.randn(3, 300)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.allclose(product_t(a, x), a @ x.t(), atol=1e-4)
            assert torch.allclose(product(b, x[:, 3:243]), b @ x[:, 3:243], atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_torch_func_differentiates_it() -> None:
    x, weight, bias, (piece,) = problem(12, 4, 6, 2, False)
    x = x.detach()

    def loss(down: Tensor, up: Tensor, x: Tensor = x) -> Tensor:
        return linear(x, weight, bias, [piece._replace(down=down, up=up)]).square().sum()

    ours = torch.func.grad(loss, (0, 1))(piece.down.detach(), piece.up.detach())
    theirs = torch.autograd.grad(reference(x, weight, bias, [piece]).square().sum(), (piece.down, piece.up))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
