"""The fold is never stale, strengths and several adapters add up, and hosts stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from shared import Adapter, LoRA, Method, RequestError, adapt, trainable
from shared.blocks.low_rank import LowRank, Replacement
from shared.sites import Sites, describe


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def model_of(host: nn.Module, **more):
    model = adapt(host, LoRA(rank=2, roles="linear"), **more).eval()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.5)
    return model


X = torch.linspace(-1, 1, 30).reshape(5, 6)


def infer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def step(model) -> None:
    optimiser = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    model(X).square().sum().backward()
    optimiser.step()


CHANGES = {
    "an optimiser step": step,
    "a scale": lambda m: [setattr(a, "scale", 3.0) for a in m.bank["default"].values()],
    "a strength": lambda m: m.activate("default", strength=0.5),
    "a new frozen weight": lambda m: m.backbone.load_state_dict({n: t + 1 for n, t in m.backbone.state_dict().items()}),
    "a loaded state": lambda m: m.load_trained_state({n: t + 1 for n, t in m.trained_state().items()}),
    "a replaced tensor": lambda m: [
        setattr(a, "up", nn.Parameter(torch.ones_like(a.up))) for a in m.bank["default"].values()
    ],
    "data swapped under a tensor": lambda m: [setattr(p, "data", p.data * 2) for p in m.bank.parameters()],
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_fold_follows(what) -> None:
    model = model_of(net())
    before = infer(model)
    CHANGES[what](model)
    after = infer(model)
    assert torch.allclose(after, model(X).detach(), atol=1e-5)  # the path that keeps nothing
    assert not torch.allclose(after, before, atol=1e-3)


def test_the_fold_is_kept_while_nothing_changes() -> None:
    model = model_of(net())
    infer(model)
    kept = [model.state.folds.now[port, "weight"].value for port in model.hosts().values()]
    infer(model)
    assert all(
        a is model.state.folds.now[port, "weight"].value for a, port in zip(kept, model.hosts().values(), strict=True)
    )


def test_inference_mode_then_training() -> None:
    model = model_of(net())
    with torch.inference_mode():
        first = model(X)
    step(model)
    assert not torch.allclose(infer(model), first.clone(), atol=1e-3)


def test_dtype_and_copies_follow() -> None:
    model = model_of(net())
    reference = infer(model)
    model.double()
    with torch.no_grad():
        assert torch.allclose(model(X.double()).float(), reference, atol=1e-5)


def test_strength_scales_the_change_and_two_adapters_add() -> None:
    host = nn.Sequential(nn.Linear(6, 4)).eval()
    base = host(X).detach()
    model = model_of(host)
    one = infer(model) - base
    model.add(LoRA(rank=3, roles="linear"), name="other")
    nn.init.normal_(model.bank["other"]["0"].up)
    other = infer(model) - base
    model.activate("default", "other", strength={"default": 0.5})
    for form in ("auto", "separate"):
        model.state.form = form
        assert torch.allclose(infer(model), base + 0.5 * one + other, atol=1e-5)
        assert torch.allclose(model(X), base + 0.5 * one + other, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = adapt(net(), LoRA(rank=2, roles="linear", dropout=0.5), example=(X,))
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    model.eval()
    assert torch.allclose(model(X).detach(), infer(model), atol=1e-5)
    model.train()
    assert not torch.allclose(model(X), model(X))


def test_half_precision_hosts_keep_float32_adapters() -> None:
    model = adapt(net().bfloat16(), LoRA(rank=2, roles="linear"), example=(X.bfloat16(),))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert model(X.bfloat16()).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = adapt(net(), LoRA(rank=2, roles="linear"))
        other(X).float().sum().backward()
    assert all(p.grad is not None for p in trainable(other).values())


def test_a_host_is_still_its_own_type() -> None:
    host = net()
    adapt(host, LoRA(rank=2, roles="linear"), example=(X,))
    assert isinstance(host[0], nn.Linear)
    assert type(host[0]).__name__ == "Linear"
    assert list(host.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert isinstance(host.state_dict(keep_vars=True)["0.weight"], nn.Parameter)


def test_another_layer_of_a_hosts_type_has_no_adapters() -> None:
    host = net()
    adapt(host, LoRA(rank=2, roles="linear"), example=(X,))
    other = type(host[0])(3, 5, bias=False)  # as peft does around a layer it wraps
    assert type(other) is nn.Linear
    assert (other.weight.shape, other.bias) == ((5, 3), None)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(host)(X), host(X))


def test_one_module_cannot_serve_two_models() -> None:
    host = net()
    adapt(host, LoRA(rank=2, roles="linear"))
    with pytest.raises(RequestError, match="belongs to another adapted model"):
        adapt(host, LoRA(rank=2, roles="linear"))


class Double(Adapter):
    """Runs the base twice, on its own output's size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, base, x):
        return base(x) * self.scale + base(-x)


class Doubled(Method):
    """An activation adapter on every linear."""

    def sites(self, sites: Sites) -> Sites:
        return sites.select("linear")

    def build(self, site):
        return Double()


def test_activation_adapters_nest_in_the_order_of_activation() -> None:
    host = nn.Sequential(nn.Linear(6, 6))
    model = adapt(host, Doubled(), name="a", example=(X,))
    model.add(Doubled(), name="b")
    with torch.no_grad():
        model.bank["a"]["0"].scale.fill_(3.0)
        weight, bias = host[0].weight, host[0].bias

        def inner(x: Tensor) -> Tensor:
            return 3 * (x @ weight.t() + bias) + (-x @ weight.t() + bias)

        model.activate("a", "b")
        assert torch.allclose(model(X), inner(X) + inner(-X), atol=1e-5)
        model.activate("a", strength=0.5)
        with pytest.raises(RequestError, match="takes no strength"):
            model(X)


def test_an_activation_adapter_and_a_weight_adapter_share_a_host() -> None:
    host = nn.Sequential(nn.Linear(6, 4))
    model = adapt(host, Doubled(), name="a", example=(X,))
    model.add(LoRA(rank=2, roles="linear"), name="b", example=(X,))
    nn.init.normal_(model.bank["b"]["0"].up)
    model.activate("a", "b")
    with torch.no_grad():
        weight = host[0].weight
        assert torch.allclose(model(X), (X @ weight.t() + host[0].bias) + (-X @ weight.t() + host[0].bias), atol=1e-5)


def test_a_replacement_is_exact_at_both_ends() -> None:
    old, new = torch.randn(9), torch.randn(9) * 1e3
    change = Replacement(old)
    assert torch.equal(change(old), old)
    with torch.no_grad():
        change.value.copy_(new)
    assert torch.equal(change(old, 1.0), new)
    assert torch.equal(change(old, 0.0), old)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_an_impossible_rank_names_the_site(rank) -> None:
    with pytest.raises(RequestError, match=rf"rank {rank} at 0: its matrix is 4 x 6, so use 1 to 4"):
        adapt(nn.Sequential(nn.Linear(6, 4)), LoRA(rank=rank, roles="linear"))


def test_low_rank_starts_as_the_identity_and_kaiming() -> None:
    change = LowRank((8, 50), 4, 1.0)
    assert not change.up.any()
    assert change.down.abs().max().item() <= 50**-0.5
    assert 0.5 < change.down.std().item() * (3 * 50) ** 0.5 < 1.5


def test_a_failed_attach_leaves_the_model_as_it_was() -> None:
    host = net()
    sites = describe(host)
    model = adapt(host, LoRA(rank=2, roles="linear"), sites=sites)
    before = infer(model)
    with pytest.raises(RequestError):
        model.add(LoRA(rank=7, roles="linear"), name="too wide")
    assert model.active == ("default",)
    assert list(model.bank) == ["default"]
    assert torch.equal(infer(model), before)


def test_functional_use_is_twice_differentiable() -> None:
    """The adapter run with given tensors, as meta-learning does: the gradient of a gradient step is right."""
    model = model_of(net().double()).double()
    x = X.double()
    given = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n.startswith("bank.")}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, tensors, (x,)).square().mean()

    def after_a_step(*tensors: Tensor) -> Tensor:
        inner = dict(zip(given, tensors, strict=True))
        steps = torch.autograd.grad(loss(inner), tensors, create_graph=True)
        return loss({n: t - 0.1 * g for (n, t), g in zip(inner.items(), steps, strict=True)})

    before = {n: p.clone() for n, p in model.named_parameters()}
    assert torch.autograd.gradcheck(after_a_step, tuple(given.values()))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_attaching_again_freezes_again_and_the_proof_leaves_no_copy_of_weights() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 4)), LoRA(rank=2, roles="linear"), example=(torch.randn(2, 6),))
    assert not model.state.folds.kept.get(model.state.active)
    model.remove()
    assert all(p.requires_grad for p in model.backbone.parameters())
    model.add(LoRA(rank=2, roles="linear"))
    assert [name for name in model.trainable() if name.startswith("backbone")] == []
