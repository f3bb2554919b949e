"""Saved activations in few bits: exact forward, gradients within the codes' error, the bytes promised, nothing left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.quantised import codes_of
from shared.blocks.saved import codes_to_rows, interval_table, rows_to_codes, value_levels, with_derivative
from shared.errors import RequestError
from shared.memory import Saving, compressed, saved_bytes
from shared.methods import BitFit, LoRA
from tests.shared.hosts import HOSTS

NOTHING = nn.Identity()
MEAN, VARIANCE = torch.randn(6), torch.rand(6) + 0.1
# (function of x (7, 6, 33), bound on the relative error of the gradient, bytes saved for its 1,386 elements)
FUNCTIONS = {
    "gelu": (F.gelu, 0.05, 693),
    "gelu module": (nn.GELU(approximate="tanh"), 0.05, 693),
    "silu": (nn.SiLU(), 0.05, 693),
    "hardswish": (F.hardswish, 0.08, 693),
    "sigmoid": (torch.sigmoid, 0.05, 693),
    "tanh": (torch.Tensor.tanh, 0.05, 693),
    "relu": (F.relu, 0.0, 174),
    "relu6": (nn.ReLU6(), 0.0, 174),
    "hardtanh": (nn.Hardtanh(-0.5, 0.7), 0.0, 174),
    "leaky relu": (nn.LeakyReLU(0.2), 1e-6, 174),
    "softmax": (lambda x: x.softmax(dim=-1), 0.15, 693 + 42 * 4),
    "layer norm": (lambda x: F.layer_norm(x, (33,)), 0.05, 693 + 42 * 12),
    "layer norm of two axes": (lambda x: F.layer_norm(x, (6, 33)), 0.05, 693 + 7 * 12),
    "group norm": (lambda x: F.group_norm(x, 2, torch.arange(1.0, 7.0)), 0.05, 693 + 14 * 12),
    "batch norm": (lambda x: F.batch_norm(x, MEAN, VARIANCE, torch.arange(1.0, 7.0)), 1e-6, 0),
    "dropout": (lambda x: F.dropout(x, 0.3), 1e-6, 174),
}


def gradient(run, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    y = run(x)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_is_exact_and_the_gradient_within_its_codes(name):
    run, bound, size = FUNCTIONS[name]
    x, upstream = torch.randn(7, 6, 33, requires_grad=True), torch.randn(7, 6, 33)
    y, exact = gradient(run, x, upstream)
    with compressed():
        coded, close = gradient(run, x, upstream)
    assert torch.equal(y, coded)
    assert float((close - exact).norm()) <= bound * float(exact.norm())
    with saved_bytes(NOTHING) as before:
        run(x)
    with saved_bytes(NOTHING) as after, compressed():
        run(x)
    assert sum(after.values()) == size < sum(before.values())


@pytest.mark.parametrize("run", [F.gelu, F.silu])
def test_the_codes_of_a_derivative_are_as_good_as_published(run):
    published = {
        F.gelu: (-0.1129, -0.0486, 0.0274, 0.1102, 0.1953, 0.2818, 0.3689, 0.4563, 0.5438, 0.6311, 0.7182, 0.8047,
                 0.8898, 0.9726, 1.0486, 1.1129),
        F.silu: (-0.0748, 0.0007, 0.0769, 0.1533, 0.2299, 0.3068, 0.3839, 0.4613, 0.5388, 0.6161, 0.6932, 0.7701,
                 0.8467, 0.9231, 0.9993, 1.0748),
    }[run]  # fmt: skip
    levels = value_levels(run, 4)
    assert levels.tolist() == pytest.approx(published, abs=2e-3)
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    derivative = with_derivative(run, x)[1]
    error = (levels[codes_of(derivative.float(), levels).int()] - derivative).square().mean().sqrt()
    assert float(error) <= 0.022
    borders, table = interval_table(run, 4)
    error = (table[torch.searchsorted(borders, x.float())] - derivative).square().mean().sqrt()
    assert float(error) <= 0.025  # the public tables: 0.0312 and 0.0277


def test_interval_codes_can_be_chosen():
    x, upstream = torch.randn(50, requires_grad=True), torch.randn(50)
    y, exact = gradient(F.gelu, x, upstream)
    with compressed(Saving(codec="interval")):
        coded, close = gradient(F.gelu, x, upstream)
    with compressed():
        other = gradient(F.gelu, x, upstream)[1]
    assert torch.equal(y, coded)
    assert 0 < float((close - exact).norm()) < 0.08 * float(exact.norm())
    assert not torch.equal(close, other)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 40), st.integers(1, 5))
def test_rows_come_back_within_half_a_step(bits, width, count):
    rows = torch.randn(count, width)
    packed, least, step = rows_to_codes(rows, bits)
    assert packed.numel() == -(-count * width * bits // 8)
    error = (codes_to_rows(packed, least, step, bits, rows.shape) - rows).abs()
    assert bool((error <= step / 2 + 1e-5).all())


POOLS = {1: (F.max_pool1d, torch.max_pool1d), 2: (F.max_pool2d, torch.max_pool2d), 3: (F.max_pool3d, torch.max_pool3d)}


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_max_pooling_saves_a_place_in_the_window_and_is_exact(data):
    axes, batched = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    one = lambda least, most: data.draw(st.lists(st.integers(least, most), min_size=axes, max_size=axes))  # noqa: E731
    kernel, stride, dilation, extra = one(1, 4), one(1, 3), one(1, 3), one(0, 5)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    sizes = [(k - 1) * d + 1 + e for k, d, e in zip(kernel, dilation, extra, strict=True)]
    arguments = (kernel, stride, padding, dilation, data.draw(st.booleans()))
    function = data.draw(st.sampled_from(POOLS[axes]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randint(-3, 4, (*((2,) if batched else ()), 3, *sizes), generator=generator).double()  # with ties
    x = x.requires_grad_()
    y = function(x, *arguments)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (exact,) = torch.autograd.grad(y, x, upstream)
    with saved_bytes(NOTHING) as told, compressed():
        coded = function(x, *arguments)
    (gradient,) = torch.autograd.grad(coded, x, upstream)
    assert torch.equal(coded, y)
    assert torch.allclose(gradient, exact, rtol=1e-14, atol=1e-14)
    bits = next(bits for bits in (1, 2, 4, 8) if 2**bits >= math.prod(kernel))
    assert told == {"outside": -(-y.numel() * bits // 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "bits"),
    [(nn.MaxPool2d(2), 2), (nn.MaxPool2d(3, 2, 1), 4), (nn.MaxPool1d(16), 4), (nn.MaxPool3d((1, 2, 1)), 1)],
)
def test_max_pooling_of_modules_has_the_gradient_bit_for_bit(layer, bits, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 6, *((160,) if isinstance(layer, nn.MaxPool1d) else (16, 16))).to(dtype).requires_grad_()
    y = layer(x)
    (exact,) = torch.autograd.grad(y, x, torch.ones_like(y))
    with saved_bytes(layer) as told, compressed():
        coded = layer(x)
    assert torch.equal(coded, y)
    assert torch.equal(torch.autograd.grad(coded, x, torch.ones_like(y))[0], exact)
    assert told == {type(layer).__name__: y.numel() * bits // 8}


def test_windows_of_more_than_eight_bits_and_returned_places_stay_with_torch():
    x = torch.randn(1, 1, 34, 34, requires_grad=True)
    with saved_bytes(NOTHING) as told, compressed():
        y = F.max_pool2d(x, 17)
        _, index = F.max_pool2d(x, 2, return_indices=True)
    assert told["outside"] >= 4 * 34 * 34
    assert type(y.grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"
    assert index.dtype == torch.long


def test_a_linear_layer_with_a_frozen_weight_and_a_trained_bias_saves_no_input():
    layer, x = nn.Linear(64, 32), torch.randn(10, 64, requires_grad=True)
    layer.weight.requires_grad_(False)
    with saved_bytes(layer) as told:
        layer(x)
    assert told == {}
    layer.weight.requires_grad_(True)
    with saved_bytes(layer) as told:
        layer(x)
    assert told == {"Linear": 10 * 64 * 4}


def test_what_trains_and_what_works_in_place_stays_exact():
    norm, x, upstream = nn.LayerNorm(8), torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    nn.init.normal_(norm.weight)
    exact = gradient(norm, x, upstream)[1]
    with compressed():
        assert torch.equal(gradient(norm, x, upstream)[1], exact)
        norm.weight.requires_grad_(False)
        y = norm(x)
        assert not torch.equal(torch.autograd.grad(y, x, upstream, retain_graph=True)[0], exact)
        assert torch.allclose(torch.autograd.grad(y, norm.bias, upstream)[0], upstream.sum(0), atol=1e-6)
        inner = x * 1
        assert F.silu(inner, inplace=True) is inner


def test_fused_attention_is_coded_only_where_asked_for():
    q, k, v = (torch.randn(2, 3, 17, 16, requires_grad=True) for _ in range(3))
    y, upstream = F.scaled_dot_product_attention(q, k, v), torch.randn(2, 3, 17, 16)
    exact = torch.autograd.grad(y, (q, k, v), upstream)
    with compressed():
        same = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), upstream)
    assert all(torch.equal(a, b) for a, b in zip(same, exact, strict=True))
    for bits, bound in ((4, 0.2), (8, 0.015)):
        with compressed(Saving(bits=bits, attention=True)), saved_bytes(NOTHING) as told:
            coded = F.scaled_dot_product_attention(q, k, v)
        assert sum(told.values()) == 3 * (2 * 3 * 17 * 16 * bits // 8 + 2 * 3 * 17 * 8)
        assert torch.equal(y, coded)
        for a, b in zip(torch.autograd.grad(coded, (q, k, v), upstream), exact, strict=True):
            assert 0 < float((a - b).norm()) < bound * float(b.norm())


# LLaMA writes its norm out in products, and BLOOM its activation: these stay as they are
@pytest.mark.parametrize(
    ("host", "most"), [("vit", 0.75), ("convolutions", 0.9), ("llama", 0.95), ("bert", 0.75), ("bloom", 0.95)]
)
def test_it_serves_any_method_on_any_host(host, most):
    backbone, inputs, sites = HOSTS[host]()
    method = LoRA(rank=2, roles=("conv",)) if host == "convolutions" else LoRA(rank=2, roles=("mlp.up",))
    model = adapt(backbone, method, sites=sites, example=inputs).train()
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter, std=0.3)

    def step() -> tuple[Tensor, Tensor, int]:
        model.zero_grad()
        with saved_bytes(model) as told:
            output = model(*inputs)
        output = getattr(output, "summary", output)
        output = output if isinstance(output, Tensor) else next(t for t in output if isinstance(t, Tensor))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        (output * weights).sum().backward()  # a sum of squares behind a norm would have no gradient
        gradients = [p.grad.flatten() for p in model.trainable().values() if p.grad is not None]
        return output.detach(), torch.cat(gradients), sum(told.values())

    output, exact, before = step()
    model.saving = Saving()
    coded, close, after = step()
    assert torch.equal(output, coded)
    assert float((close - exact).norm()) < 0.2 * float(exact.norm())
    assert after < most * before
    model.saving = None
    assert torch.equal(step()[1], exact)


def test_the_report_names_the_classes():
    backbone, inputs, _ = HOSTS["vit"]()
    model = adapt(backbone, BitFit()).train()
    with saved_bytes(model) as before:
        model(*inputs)
    model.saving = Saving()
    with saved_bytes(model) as after:
        model(*inputs)
    assert after["GELU"] * 8 == before["GELU"]
    assert after["LayerNorm"] < 0.4 * before["LayerNorm"]
    assert after["Attention"] == before["Attention"]  # a fused kernel


def test_half_precision_keeps_its_types():
    x = torch.randn(4, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), compressed():
        y = F.layer_norm(F.gelu(F.linear(x, torch.eye(10))), (10,)).softmax(-1)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert bool(x.grad.isfinite().all())


def test_wrong_arguments_are_one_line():
    with pytest.raises(RequestError, match="codes of 3 bits: use 1, 2, 4, 8"):
        Saving(bits=3)
    with pytest.raises(RequestError, match="codec 'lloyd' of saved activations"):
        Saving(codec="lloyd")  # type: ignore[arg-type]
