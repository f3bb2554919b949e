"""What inference keeps is what would be computed now, whatever happened in between; and it is bounded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from shared import LoRA, adapt
from shared.folds import Fold
from shared.methods import DoRA
from tests.shared.hosts import vit

X = torch.linspace(-1, 1, 24).reshape(4, 6)
A, B = (("a", 1.0),), (("b", 1.0),)


def model_of(*names: str, method=None):
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    model = None
    for name in names or ("a",):
        if model is None:
            model = adapt(host, method or LoRA(rank=2, roles="linear"), name=name)
        else:
            model.add(method or LoRA(rank=2, roles="linear"), name=name)
    assert model is not None
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def infer(model, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def plain(model, x: Tensor = X) -> Tensor:
    """The path that keeps nothing."""
    model.state.form = "separate"
    y = model(x).detach()
    model.state.form = "auto"
    return y


def kept(model) -> dict:
    return model.state.folds.now or {}


def each(model, change) -> None:
    for parameter in model.bank.parameters():
        change(parameter)


def optimise(model, **kind) -> None:
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=0.1, **kind)
    model(X).square().sum().backward()
    optimiser.step()


def swap_twice(parameter: Tensor) -> None:
    """New data twice: the second may come to lie where the first's predecessor was."""
    parameter.data = parameter.data * 2
    parameter.data = parameter.data * 2


def turn(model) -> None:
    """A square frozen weight read the other way round: the address stays, and torch counts no change."""
    weight = model.backbone[2]._parameters["weight"]
    weight.data = weight.data.t()


def in_inference_mode(model) -> None:
    with torch.inference_mode():
        each(model, lambda p: p.mul_(2))


def replace(model) -> None:
    for adapter in model.bank["a"].values():
        adapter.up = nn.Parameter(adapter.up.detach() * 2)


CHANGES = {
    "nothing": lambda m: None,
    "in place": lambda m: each(m, lambda p: p.detach().mul_(2)),
    "in inference mode": in_inference_mode,
    "by foreach": lambda m: torch._foreach_mul_([p.detach() for p in m.bank.parameters()], 2),
    "new data": lambda m: each(m, lambda p: setattr(p, "data", p.data * 2)),
    "new data twice": lambda m: each(m, swap_twice),
    "turned": turn,
    "another tensor": replace,
    "a loaded adapter": lambda m: m.bank.load_state_dict({n: t * 2 for n, t in m.bank.state_dict().items()}),
    "loaded by assignment": lambda m: m.bank.load_state_dict(
        {n: t * 2 for n, t in m.bank.state_dict().items()}, assign=True
    ),
    "a loaded state": lambda m: m.load_trained_state({n: t * 2 for n, t in m.trained_state().items()}),
    "other frozen weights": lambda m: m.backbone.load_state_dict(
        {n: t * 2 for n, t in m.backbone.state_dict().items()}
    ),
    "other frozen weights by assignment": lambda m: m.backbone.load_state_dict(
        {n: t * 2 for n, t in m.backbone.state_dict().items()}, assign=True
    ),
    "AdamW": optimise,
    "AdamW by foreach": lambda m: optimise(m, foreach=True),
    "AdamW fused": lambda m: optimise(m, fused=True),
    "a scale": lambda m: [setattr(adapter, "scale", 3.0) for adapter in m.bank["a"].values()],
    "a strength": lambda m: m.activate("a", strength=0.5),
    "data written in place, then eval": lambda m: (each(m, lambda p: p.data.mul_(2)), m.eval()),
    "another type and back": lambda m: (m.double(), m.float()),
    "merged and back": lambda m: (m.merge(), m.unmerge()),
    "removed and added": lambda m: (m.remove("a"), m.add(LoRA(rank=2, roles="linear"), name="a")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fold_is_never_stale(what) -> None:
    model = model_of()
    infer(model)
    assert len(kept(model)) == 2
    CHANGES[what](model)
    expected = plain(model)
    assert torch.allclose(infer(model), expected, atol=1e-5)
    assert torch.allclose(infer(model), expected, atol=1e-5)


@pytest.mark.parametrize("what", ["float64", "bfloat16"])
def test_another_type_is_followed(what) -> None:
    model, dtype = model_of(), getattr(torch, what)
    infer(model)
    model.to(dtype)
    assert {fold.value.dtype for fold in kept(model).values()} == {dtype}
    assert torch.allclose(infer(model, X.to(dtype)), plain(model, X.to(dtype)), atol=1e-5 if what == "float64" else 0.1)


def test_a_move_to_another_device_leaves_no_fold_behind() -> None:
    model = model_of()
    model.to("meta")
    assert {fold.value.device.type for fold in kept(model).values()} == {"meta"}


def test_eval_folds_and_training_lets_go() -> None:
    model = model_of()
    folds = [weakref.ref(fold.value) for fold in kept(model).values()]
    assert len(folds) == 2
    frozen = {n: t.clone() for n, t in model.backbone.state_dict().items()}
    infer(model)
    assert all(ref() is fold.value for ref, fold in zip(folds, kept(model).values(), strict=True))
    model.train()
    assert not kept(model)
    gc.collect()
    assert all(ref() is None for ref in folds)
    assert all(torch.equal(frozen[n], t) for n, t in model.backbone.state_dict().items())


def test_a_fused_step_after_a_fold_of_the_same_round_is_seen() -> None:
    model = model_of()
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=0.1, fused=True)
    loss = model(X).square().sum()
    before = infer(model)
    loss.backward()
    optimiser.step()
    assert not torch.allclose(infer(model), before, atol=1e-3)
    assert torch.allclose(infer(model), plain(model), atol=1e-5)


def test_an_adapter_in_training_mode_drops_inputs_though_it_was_folded() -> None:
    model = model_of(method=LoRA(rank=2, roles="linear", dropout=0.5))
    infer(model)
    model.bank.train()
    assert not torch.equal(infer(model), infer(model))
    model.bank.eval()
    assert torch.allclose(infer(model), plain(model), atol=1e-6)


def test_an_adapter_switched_to_is_folded_once_it_has_paid() -> None:
    model = model_of("a", "b")
    model.activate("a")
    first, expected = infer(model, X[:1]), plain(model)
    assert not kept(model)
    assert torch.allclose(first, expected[:1], atol=1e-6)
    for _ in range(8):  # folds of 6 x 8 and 8 x 8 are paid by 2 * 2 / (14 / 48 + 16 / 64) = 7.4 rows
        infer(model, X[:1])
    assert len(kept(model)) == 2
    assert torch.allclose(infer(model), expected, atol=1e-6)


def test_many_rows_pay_at_once() -> None:
    model = model_of("a", "b")
    model.activate("a")
    infer(model, X.repeat(10, 1))
    assert kept(model)


def test_going_back_and_forth_folds_each_once() -> None:
    model = model_of("a", "b")
    for name in ("a", "b"):
        model.activate(name)
        model.fold()
    folds = {active: [fold.value for fold in folds.values()] for active, folds in model.state.folds.kept.items()}
    for name in ("a", "b", "a", "b"):
        model.activate(name)
        infer(model)
        active = model.state.active
        assert all(one is fold.value for one, fold in zip(folds[active], kept(model).values(), strict=True))


def test_the_least_recently_used_folds_make_room() -> None:
    model = model_of("a", "b", "c")
    one = sum(fold.value.nbytes for fold in kept(model).values())
    model.state.folds.spare = one
    for name in ("a", "b", "a", "c"):
        model.activate(name)
        model.fold()
    assert list(model.state.folds.kept) == [A, (("c", 1.0),)]
    model.state.folds.spare = 0
    model.activate("b")
    infer(model)
    model.fold()
    assert list(model.state.folds.kept) == [B]


def test_folds_do_not_grow_with_the_adapters() -> None:
    model = model_of(*(f"n{i}" for i in range(12)))
    one = sum(fold.value.nbytes for fold in kept(model).values())
    model.state.folds.spare = 2 * one
    for _ in range(2):
        for name in model.methods:
            model.activate(name)
            for _ in range(10):
                infer(model)
    held = [fold.value.nbytes for folds in model.state.folds.kept.values() for fold in folds.values()]
    assert sum(held) == 3 * one


def test_a_change_that_is_no_product_is_folded_at_its_first_reading() -> None:
    model = model_of("a", "b", method=DoRA(rank=2, roles="linear"))
    model.activate("a")
    y = infer(model)
    assert len(kept(model)) == 2
    assert torch.allclose(y, plain(model), atol=1e-5)


def test_removing_and_adding_take_the_folds_along() -> None:
    model = model_of("a", "b")
    model.remove("b")
    assert B not in model.state.folds.kept
    model.add(LoRA(rank=3, roles="linear"), name="b")
    assert torch.allclose(infer(model), plain(model), atol=1e-6)


def test_adapters_made_in_inference_mode_are_right_and_not_kept() -> None:
    model = model_of()
    with torch.inference_mode():
        for adapter in model.bank["a"].values():
            adapter.up = nn.Parameter(adapter.up * 2, requires_grad=False)
        expected = plain(model)
        model.eval()
        assert torch.allclose(model(X), expected, atol=1e-5)
        for adapter in model.bank["a"].values():
            adapter.up.mul_(2)
        assert torch.allclose(model(X), plain(model), atol=1e-5)


def test_the_fold_of_a_tensor_that_counts_no_changes_is_none() -> None:
    weight = torch.ones(2, 2)
    with torch.inference_mode():
        assert Fold.of(weight, torch.ones(2, 2), []) is None
    assert Fold.of(weight, weight, []) is not None


def test_a_vision_transformer_folds_whole() -> None:
    backbone, inputs, sites = vit()
    model = adapt(backbone, LoRA(rank=2, roles=("attention.query", "attention.value", "mlp.up")), sites=sites)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        model.eval()
        assert len(kept(model)) == 8
        folded = model(*inputs).summary
        model.merge()
        assert torch.equal(model(*inputs).summary, folded)
