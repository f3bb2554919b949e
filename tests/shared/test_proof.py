"""An adapter without effect is an error that names its site; a proof leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared import Adapter, LoRA, Method, RequestError, WorkError, adapt
from shared.sites import Site, Sites, describe


class Gate(Adapter):
    """Counts its calls in a buffer and adds a learnt vector."""

    def __init__(self, width: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, base, x: Tensor) -> Tensor:
        self.calls += 1
        return base(x) + self.shift


class Gates(Method):
    def sites(self, sites: Sites) -> Sites:
        return sites.select("linear")

    def build(self, site: Site) -> Gate:
        return Gate(site.width)


class Skipping(nn.Module):
    """Its second layer runs only in training mode; its third is never used; its fourth's output is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.use_b, self.drop_d = True, False

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_d:
            self.d(x)
        return self.b(self.a(x)) if self.use_b and torch.is_grad_enabled() else self.a(x)


def sites_of(model: nn.Module, *names: str) -> Sites:
    return Sites([s for s in describe(model) if s.path in names])


X = torch.randn(3, 4)


@pytest.mark.parametrize("method", [Gates(), LoRA(rank=2, roles="linear")])
def test_a_layer_that_is_never_run_is_named(method) -> None:
    host = Skipping()
    with pytest.raises(WorkError, match="'default' never ran in training mode at c$"):
        adapt(host, method, sites=sites_of(host, "a", "c"), example=(X,))
    assert not any("_port" in m.__dict__ for m in host.modules())  # nothing stays attached


@pytest.mark.parametrize("method", [Gates(), LoRA(rank=2, roles="linear")])
def test_a_layer_skipped_at_inference_is_named(method) -> None:
    host = Skipping()
    with pytest.raises(WorkError, match="never ran in inference mode .* at b$"):
        adapt(host, method, sites=sites_of(host, "a", "b"), example=(X,))


@pytest.mark.parametrize("method", [Gates(), LoRA(rank=2, roles="linear")])
def test_a_layer_whose_output_is_dropped_is_named(method) -> None:
    host = Skipping()
    host.drop_d, host.use_b = True, False
    with pytest.raises(WorkError, match="received no gradient: its output is not used at d$"):
        adapt(host, method, sites=sites_of(host, "a", "d"), example=(X,))


class Fused(nn.Module):
    """Uses a copy of its weight, taken when it was built, at inference: what a fused kernel may do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("packed", self.layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.layer(x)
        self.layer.weight.sum()  # read, so that running alone proves nothing
        return x @ self.packed.t() + self.layer.bias


def test_a_kernel_that_uses_old_weights_at_inference_is_caught() -> None:
    with pytest.raises(WorkError, match="acts differently in training and in inference mode"):
        adapt(Fused(), LoRA(rank=2, roles="linear"), example=(X,))


def test_a_module_that_is_never_called_refuses_activation_adapters() -> None:
    host = nn.MultiheadAttention(8, 2, batch_first=True)
    site = Site("linear", 0, "out_proj", host.out_proj, width=8)
    x = torch.randn(2, 3, 8)
    with pytest.raises(WorkError, match="never ran in training mode at out_proj$"):
        adapt(host, Gates(), sites=Sites([site]), example=(x, x, x))


def test_the_fused_encoder_layer_runs_activation_adapters() -> None:
    host, x = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        base = host(x)
    model = adapt(host, Gates(), example=(x,))
    for gate in model.bank["default"].values():
        nn.init.normal_(gate.shift)
    trained = model(x).detach()
    with torch.no_grad():
        assert torch.allclose(model(x), trained, atol=1e-6)
        assert not torch.allclose(trained, base, atol=1e-2)
        model.remove()
        assert torch.equal(host(x), base)
    assert not any(m._forward_pre_hooks for m in host.modules())


def test_the_proof_leaves_no_trace() -> None:
    torch.manual_seed(3)
    host = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    before = torch.random.get_rng_state()
    model = adapt(host, Gates(), example=(X,))
    assert torch.equal(torch.random.get_rng_state(), before)
    gate = model.bank["default"]["0"]
    assert not gate.shift.any()
    assert gate.calls == 0
    assert gate.shift.grad is None
    assert vars(model.context) == {}


def test_zero_sites_and_unknown_roles_are_errors() -> None:
    class Nowhere(Gates):
        def sites(self, sites: Sites) -> Sites:
            return Sites(())

    with pytest.raises(RequestError, match="Nowhere attaches to zero sites of Sequential"):
        adapt(nn.Sequential(nn.Linear(4, 4)), Nowhere())
    with pytest.raises(RequestError, match="Sequential has no site with role 'attention.query'; it has model, linear"):
        adapt(nn.Sequential(nn.Linear(4, 4)), LoRA())


def test_a_context_value_nobody_wrote_is_an_error() -> None:
    class Reader(Gate):
        def forward(self, base, x: Tensor) -> Tensor:
            return base(x) + self.shift * self.context.scale

    class Readers(Gates):
        def build(self, site: Site) -> Reader:
            return Reader(site.width)

    model = adapt(nn.Sequential(nn.Linear(4, 4)), Readers())
    with pytest.raises(AttributeError, match="holds no 'scale' .it holds nothing."):
        model(X)
    nn.init.ones_(model.bank["default"]["0"].shift)
    two, three = model(X, context={"scale": 2.0}), model(X, context={"scale": 3.0})
    assert torch.allclose(three - two, torch.ones(3, 4), atol=1e-6)
    assert vars(model.context) == {}


class Answers(nn.Module):
    """Gives no gradient; of its three layers the last one's output is dropped."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.c(x)
        return self.b(self.a(x))


def test_where_there_is_no_gradient_the_output_must_change() -> None:
    host = Answers()
    model = adapt(host, Gates(), sites=sites_of(host, "a", "b"), example=(X,))
    assert all(not bool(gate.shift.any()) for gate in model.bank["default"].values())  # as they came
    assert all(float(gate.calls) == 0 for gate in model.bank["default"].values())
    host = Answers()
    with pytest.raises(WorkError, match="'default' does not change the output, which gives no gradient either at c$"):
        adapt(host, Gates(), sites=sites_of(host, "a", "c"), example=(X,))
    assert not any("_port" in m.__dict__ for m in host.modules())
