"""Changes of weights as other libraries make them: each against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.lycoris import AnyRank, Hadamard, Kronecker, Tucker
from shared.errors import RequestError
from shared.methods import Imported
from tests.shared.capabilities.imported import change

SIZES = st.integers(1, 4)
SHORT = settings(max_examples=25, deadline=None)


def filled(block, shape: tuple[int, ...], scale: float = 0.7, **shapes: tuple[int, ...]):
    adapter = block(shape, shapes, scale)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    tensors = {name: p.detach() for name, p in adapter.named_parameters()}
    return adapter.delta(torch.empty(shape)).detach(), tensors


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@SHORT
@given(SIZES, SIZES, SIZES, SIZES)
def test_a_core_is_a_chain_of_three_convolutions(rows, columns, p, q):
    shape = (rows, columns, 3, 2)
    delta, t = filled(Tucker, shape, down=(q, columns), mid=(p, q, 3, 2), up=(p, rows))
    x = torch.randn(2, columns, 5, 5)
    h = nn.functional.conv2d(x, t["down"][..., None, None])
    h = nn.functional.conv2d(nn.functional.conv2d(h, t["mid"]), t["up"].T[..., None, None])
    assert near(nn.functional.conv2d(x, delta), 0.7 * h)


@SHORT
@given(SIZES, SIZES, SIZES, st.booleans())
def test_a_hadamard_product_of_two(rows, columns, r, core):
    shape = (rows, columns, 3, 3)
    if not core:
        fan_in = columns * 9
        shapes = {"w1_a": (rows, r), "w1_b": (r, fan_in), "w2_a": (rows, r), "w2_b": (r, fan_in)}
        delta, t = filled(Hadamard, shape, **shapes)
        halves = [t[f"w{i}_a"] @ t[f"w{i}_b"] for i in (1, 2)]
    else:
        shapes = {"w1_a": (r, rows), "w1_b": (r, columns), "w2_a": (r, rows), "w2_b": (r, columns)}
        delta, t = filled(Hadamard, shape, **shapes, t1=(r, r, 3, 3), t2=(r, r, 3, 3))
        halves = [torch.einsum("ij...,ip,jr->pr...", t[f"t{i}"], t[f"w{i}_a"], t[f"w{i}_b"]) for i in (1, 2)]
    assert near(delta, 0.7 * (halves[0] * halves[1]).reshape(shape))


@SHORT
@given(SIZES, SIZES, SIZES, SIZES, SIZES, st.sampled_from(["whole", "first", "second", "core"]))
def test_a_kronecker_product(p, s, rows, columns, r, form):
    shape = (p * rows, s * columns, 3, 3)
    first = {"w1_a": (p, r), "w1_b": (r, s)} if form == "first" else {"w1": (p, s)}
    second = {
        "second": {"w2_a": (rows, r), "w2_b": (r, columns * 9)},
        "core": {"w2_a": (r, rows), "w2_b": (r, columns), "t2": (r, r, 3, 3)},
    }.get(form, {"w2": (rows, columns, 3, 3)})
    delta, t = filled(Kronecker, shape, **first, **second)
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    w2 = t.get("w2")
    if form == "second":
        w2 = (t["w2_a"] @ t["w2_b"]).reshape(rows, columns, 3, 3)
    elif form == "core":
        w2 = torch.einsum("ij...,ip,jr->pr...", t["t2"], t["w2_a"], t["w2_b"])
    expected = torch.einsum("ps,rcxy->prscxy", w1, w2).reshape(shape)
    assert near(delta, 0.7 * expected)


def test_a_rank_above_the_sides():
    delta, t = filled(AnyRank, (2, 3), down=(9, 3), up=(9, 2))
    assert near(delta, 0.7 * t["up"].T @ t["down"])


@pytest.mark.parametrize(
    ("block", "shapes"),
    [
        (AnyRank, {"down": (2, 3), "up": (2, 5)}),
        (AnyRank, {"down": (2, 3), "up": (3, 4)}),
        (Tucker, {"down": (2, 3), "mid": (2, 2, 1), "up": (2, 4)}),
        (Hadamard, {"w1_a": (4, 2), "w1_b": (2, 3), "w2_a": (4, 2), "w2_b": (1, 3)}),
        (Hadamard, {"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (4, 2), "w2_b": (2, 3)}),
        (Kronecker, {"w1": (2, 1), "w2": (2, 2)}),
    ],
)
def test_shapes_that_do_not_make_the_weight(block, shapes):
    with pytest.raises(RequestError, match="change of here: .* do not make its matrix of 4 x 3"):
        block((4, 3), shapes, 1.0, "here")


LINEAR = change("low_rank", down=[1, 3], up=[1, 4])


@pytest.mark.parametrize(
    ("key", "said", "message"),
    [
        ("0", LINEAR | {"kind": "magic"}, "wants a kind of low_rank, tucker, hadamard, kronecker"),
        ("0", LINEAR | {"shapes": 3}, "wants a kind"),
        ("0", LINEAR | {"trains": 8}, "trains 8, its shapes 7"),
        ("0", change("low_rank", down=[1, 3]), r"down \[1, 3\] is no low_rank change"),
        ("0", change("low_rank", down=[3], up=[4]), "is no low_rank change|do not make"),
        ("0", {k: v for k, v in LINEAR.items() if k != "scale"}, "is no low_rank change with a scale"),
        ("5", LINEAR, "change of 5: Sequential has no such module"),
        ("0:gain", LINEAR, "no parameter 'gain'"),
        ("1", LINEAR, "a LayerNorm; can be of Linear"),
        ("0:bias", change("replaced", value=[3]), r"value of 0:bias: \(3,\) in place of \(4,\)"),
    ],
)
def test_what_a_change_cannot_be(key, said, message):
    with pytest.raises(RequestError, match=message):
        adapt(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), Imported(changes={key: said}))


def test_no_changes_are_no_adapter():
    with pytest.raises(RequestError, match="zero sites"):
        adapt(nn.Linear(3, 4), Imported(changes={}))


def test_it_trains_on():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(3, 4)), Imported(changes={"0": LINEAR}), example=(torch.randn(2, 3),))
    with torch.no_grad():
        for p in model.bank["default"].parameters():
            p.normal_()
    assert math.prod(model.bank["default"]["0"].down.shape) == 3
    model(torch.randn(5, 3)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in model.trainable().values())
