"""Inputs made again in backward: the gradients are those of saved inputs, and the inputs are not saved."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared import LoRA, adapt
from shared.linear import Piece, linear
from shared.sources import CHUNK, source

WIDTH, RANK = 12, 2
NORM = nn.LayerNorm(WIDTH)
nn.init.normal_(NORM.weight)
nn.init.normal_(NORM.bias)
MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda z: F.layer_norm(z, (WIDTH,), NORM.weight.to(z.dtype), NORM.bias.to(z.dtype)),
    "layer norm without weight": lambda z: F.layer_norm(z, (WIDTH,), eps=0.1),
    "layer norm without bias": lambda z: F.layer_norm(z, (WIDTH,), NORM.weight.to(z.dtype)),
    "gelu": F.gelu,
    "tanh gelu": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Piece], list[Tensor]]:
    torch.manual_seed(0)
    z = (torch.randn(3, 5, WIDTH, dtype=dtype) + 1).requires_grad_()
    weight = torch.randn(2 * WIDTH, WIDTH, dtype=dtype)
    pieces = []
    for rows in ((0, WIDTH), (WIDTH, 2 * WIDTH)):
        down = torch.randn(RANK, WIDTH, dtype=dtype, requires_grad=True)
        up = torch.randn(RANK, WIDTH, dtype=dtype, requires_grad=True)
        pieces.append(Piece(rows, down, up, 0.7, 0.0))
    return z, weight, pieces, [z, *(factor for piece in pieces for factor in (piece.down, piece.up))]


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_a_saved_input(name) -> None:
    z, weight, pieces, leaves = problem()
    x = MAKERS[name](z)
    assert source(x) is not None
    plain = x * 1
    assert source(plain) is None
    probe = torch.randn(3, 5, 2 * WIDTH, dtype=z.dtype)
    ours = torch.autograd.grad(linear(x, weight, None, pieces), leaves, probe, retain_graph=True)
    theirs = torch.autograd.grad(linear(plain, weight, None, pieces), leaves, probe)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_second_derivatives_pass_through_what_is_made_again(name) -> None:
    _, weight, pieces, leaves = problem()

    def run(z: Tensor, *factors: Tensor) -> Tensor:
        mine = [p._replace(down=factors[2 * i], up=factors[2 * i + 1]) for i, p in enumerate(pieces)]
        return linear(MAKERS[name](z[:1, :2] * 1), weight, None, mine)

    assert torch.autograd.gradgradcheck(run, tuple(leaves))


@pytest.mark.parametrize("name", MAKERS)
def test_the_input_is_let_go(name) -> None:
    z, weight, pieces, _ = problem()
    x = MAKERS[name](z)
    kept = weakref.ref(x)
    y = linear(x, weight, None, pieces)
    del x
    gc.collect()
    assert kept() is None
    y.sum().backward()


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_is_near(name) -> None:
    z, weight, pieces, leaves = problem(torch.float32)
    probe = torch.randn(3, 5, 2 * WIDTH)
    exact = torch.autograd.grad(linear(MAKERS[name](z) * 1, weight, None, pieces), leaves, probe)
    y = linear(MAKERS[name](z.bfloat16()), weight.bfloat16(), None, pieces)
    for a, b in zip(torch.autograd.grad(y, leaves, probe.bfloat16()), exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.03


def test_an_input_longer_than_a_chunk() -> None:
    _, weight, pieces, leaves = problem(torch.float32)
    long = torch.randn(CHUNK // WIDTH + 100, WIDTH, requires_grad=True)
    leaves = [long, *leaves[1:]]
    ours = torch.autograd.grad(linear(F.gelu(long), weight, None, pieces).mean(), leaves)
    theirs = torch.autograd.grad(linear(F.gelu(long) * 1, weight, None, pieces).mean(), leaves)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_an_input_changed_since_it_was_made_is_saved_as_it_is() -> None:
    z = problem()[0]
    x = F.gelu(z)
    with torch.no_grad():
        x.mul_(2)
    assert source(x) is None
    made_from = z * 1
    x = F.gelu(made_from)
    made_from.add_(1)
    assert source(x) is None
    assert source(z) is None
    assert source(nn.Parameter(torch.ones(2))) is None


def test_a_maker_of_several_axes_is_none() -> None:
    assert source(F.layer_norm(problem()[0], (5, WIDTH))) is None


def test_under_hooks_on_saved_tensors_nothing_is_read() -> None:
    """A checkpoint would run its part again for it, and offloading fetch it back."""
    z, weight, pieces, leaves = problem()

    def run(z: Tensor) -> Tensor:
        x = F.gelu(z)
        assert source(x) is None
        return linear(x, weight, None, pieces).square().sum()

    theirs = torch.autograd.grad(linear(F.gelu(z), weight, None, pieces).square().sum(), leaves)
    ours = torch.autograd.grad(checkpoint(run, z, use_reentrant=False), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_model_trains_alike_with_and_without() -> None:
    """The whole path: norms, GELU and projections of one block, against the separate form."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = adapt(nn.Sequential(Block(), Block()), LoRA(rank=2, roles="linear"))
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter)
    found = {}
    x = torch.randn(4, 50, 16)
    for form in ("auto", "separate"):
        model.state.form = form
        found[form] = torch.autograd.grad(model(x).square().mean(), list(model.trainable().values()))
    for a, b in zip(found["auto"], found["separate"], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
