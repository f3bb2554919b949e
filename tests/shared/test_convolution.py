"""The hand-written low-rank convolution, and the branch beside a convolution, against its weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.convolution import convolution, convolution_beside, fits
from shared.linear import Piece

shapes = given(
    groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 2), dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]), rank=st.integers(1, 4), kernel=st.sampled_from([1, 3]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]), dims=st.integers(1, 3), split=st.booleans(),
    size=st.sampled_from([3, 8]), outputs=st.sampled_from([4, 24]),
)  # fmt: skip


def problem(groups, stride, dilation, padding, rank, kernel, mode, dims, split, size, outputs, dtype=torch.float64):
    if dims == 3 and mode == "reflect":
        mode = "replicate"
    stride = 1 if padding == "same" else stride
    size = max(size, dilation * (kernel - 1) + 1)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    host = kind(4, outputs, kernel, stride, padding, dilation, groups, padding_mode=mode).to(dtype)
    host.requires_grad_(False)
    x = torch.randn(2, 4, *(size,) * dims, dtype=dtype, requires_grad=True)
    ranges = [(0, 1), (1, outputs)] if split and groups == 1 else [None]
    pieces = []
    for i, rows in enumerate(ranges):
        down = torch.randn(rank, host.weight[0].numel(), dtype=dtype, requires_grad=True)
        up = torch.randn(rank, outputs if rows is None else rows[1] - rows[0], dtype=dtype, requires_grad=True)
        pieces.append(Piece(rows, down, up, 0.5 + i, 0.0))
    return host, x, pieces


def reference(host, x: Tensor, pieces) -> Tensor:
    """By the changed weight and autograd."""
    weight = host.weight
    for rows, down, up, scale, _ in pieces:
        start, stop = rows or (0, len(weight))
        change = (up.t() @ down * scale).reshape(-1, *weight.shape[1:])
        weight = torch.cat([weight[:start], weight[start:stop] + change, weight[stop:]])
    return host._conv_forward(x, weight, host.bias)


def leaves(x: Tensor, pieces) -> list[Tensor]:
    return [x, *(factor for piece in pieces for factor in (piece.down, piece.up))]


@settings(max_examples=150, deadline=None)
@shapes
def test_values_and_gradients_equal_autograd(**chosen) -> None:
    torch.manual_seed(0)
    host, x, pieces = problem(**chosen)
    expected = reference(host, x, pieces)
    probe = torch.randn_like(expected)
    exact = torch.autograd.grad(expected, leaves(x, pieces), probe)
    assert fits(host, x, pieces)
    for found in (
        convolution_beside(host, x, host(x), pieces, False),
        convolution(host, x, host.weight, pieces),
    ):
        assert torch.allclose(found, expected, atol=1e-9)
        gradients = torch.autograd.grad(found, leaves(x, pieces), probe)
        assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(gradients, exact, strict=True))


# By r channels and by the weight's gradient; folded and beside; whole, in rows and in groups.
@pytest.mark.parametrize(("rank", "kernel", "size"), [(1, 3, 6), (4, 1, 6), (1, 3, 3), (1, 1, 30)])
@pytest.mark.parametrize(("groups", "split"), [(1, False), (1, True), (2, False)])
def test_first_and_second_derivatives_are_right(rank, kernel, size, groups, split) -> None:
    torch.manual_seed(0)
    host, x, pieces = problem(groups, 1, 1, 0, rank, kernel, "zeros", 1, split, size, 8)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        mine = [p._replace(down=factors[2 * i], up=factors[2 * i + 1]) for i, p in enumerate(pieces)]
        return convolution(host, x, host.weight, mine)

    assert torch.autograd.gradcheck(run, tuple(leaves(x, pieces)))
    assert torch.autograd.gradgradcheck(run, tuple(leaves(x, pieces)))


def test_a_trained_weight_and_bias_also_get_their_gradient() -> None:
    host, x, pieces = problem(2, 1, 1, 1, 1, 3, "zeros", 2, False, 8, 24)
    host.requires_grad_(True)
    ours = torch.autograd.grad(convolution(host, x, host.weight, pieces).square().sum(), list(host.parameters()))
    theirs = torch.autograd.grad(reference(host, x, pieces).square().sum(), list(host.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_half_precision_a_small_change_is_not_lost(layout) -> None:
    """A change far below the weight's last bit still moves the output by its own size, as it does in single."""
    torch.manual_seed(0)
    host, x, pieces = problem(1, 1, 1, 1, 2, 3, "zeros", 2, False, 8, 24, torch.float32)
    x = x.detach().to(memory_format=layout)
    host.weight.fill_(1.0)
    host.bias = None
    small = [Piece(None, piece.down.detach(), piece.up.detach() * 1e-4, 1.0, 0.0) for piece in pieces]
    x[:, 1::2] = -x[:, ::2]  # what the frozen weight gives is near 0, so the output has bits to spare
    exact = reference(host, x, small) - reference(host, x, [])
    rough = host.bfloat16()
    found = convolution(rough, x.bfloat16(), rough.weight, small) - rough(x.bfloat16())
    assert float((found.float() - exact).norm() / exact.norm()) < 0.1


def test_gradients_in_half_precision_are_near_those_in_single() -> None:
    torch.manual_seed(0)
    host, x, pieces = problem(1, 1, 1, 1, 2, 3, "zeros", 2, True, 8, 24, torch.float32)
    probe = torch.randn(2, 24, 8, 8)
    exact = torch.autograd.grad(reference(host, x, pieces), leaves(x, pieces), probe)
    host = host.bfloat16()
    found = torch.autograd.grad(
        convolution(host, x.bfloat16(), host.weight, pieces), leaves(x, pieces), probe.bfloat16()
    )
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).norm() / b.norm()) < 0.02


def test_what_it_does_not_fit() -> None:
    """An even kernel with padding "same", one sample without a batch, rows of a grouped weight."""
    host, x, pieces = problem(2, 1, 1, 1, 1, 3, "zeros", 2, False, 8, 24)
    assert fits(host, x, pieces)
    assert not fits(host, x[0], pieces)
    assert not fits(host, x, [pieces[0]._replace(rows=(0, 8))])
    assert not fits(nn.Conv2d(4, 24, 2, padding="same"), x, pieces)
