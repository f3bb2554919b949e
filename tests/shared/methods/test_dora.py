"""DoRA on single layers: the formula by hand, the published form of the layer, and both gradients of the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import DoRA, LoRA
from shared.sites import Site, Sites, describe

X = torch.linspace(-1, 1, 2 * 3 * 6).reshape(2, 3, 6)


def one(layer: nn.Module | None = None, perturbed: bool = True, **more) -> tuple[Any, Any, Any]:
    """A linear layer of 6 inputs and 4 outputs, the model adapted at it, and its adapter."""
    torch.manual_seed(6)
    layer = nn.Linear(6, 4) if layer is None else layer
    method = DoRA(**{"rank": 2, "alpha": 3.0, "roles": "linear", **more})
    model: Any = adapt(layer, method, sites=describe(layer))
    (adapter,) = model.bank["default"].values()
    if perturbed:
        with torch.no_grad():
            adapter.change.up.normal_()
            adapter.magnitude.mul_(torch.rand(adapter.magnitude.shape) + 0.5)
    return layer, model, adapter


def test_a_weight_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    layer.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.0, 2.0]])})
    layer, model, adapter = one(layer, perturbed=False, rank=1, alpha=2.0)
    assert adapter.magnitude.tolist() == [5.0, 2.0]
    with torch.no_grad():
        adapter.change.down.copy_(torch.tensor([[1.0, 0.0]]))
        adapter.change.up.copy_(torch.tensor([[1.0, 0.0]]))  # V = [[3 + 2, 4], [0, 2]]
        adapter.magnitude.copy_(torch.tensor([41.0**0.5 * 2, 3.0]))
        assert torch.allclose(layer.weight, torch.tensor([[10.0, 8.0], [0.0, 3.0]]), atol=1e-5)
        model.activate("default", strength=0.5)
        assert torch.allclose(layer.weight, torch.tensor([[6.5, 6.0], [0.0, 2.5]]), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "bfloat16", "zero row"])
def test_it_starts_as_the_frozen_layer_exactly(kind):
    layer = nn.Linear(6, 4)
    if kind == "zero row":
        nn.init.zeros_(layer.weight[1])
    x = X
    if kind == "bfloat16":
        layer, x = layer.bfloat16(), X.bfloat16()
    _, model, adapter = one(layer, perturbed=False)
    with model.disabled():
        bare = model(x)
    assert adapter.magnitude.dtype == torch.float32
    assert torch.equal(model.train()(x), bare)
    assert torch.equal(model.eval()(x), bare)
    model.train()(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.trainable().values())


def test_a_convolution_has_a_norm_for_each_kernel():
    layer = nn.Conv2d(3, 5, 3)
    _, _, adapter = one(layer, roles="conv")
    raw = layer._parameters["weight"].detach()  # type: ignore[union-attr]
    moved = raw + 1.5 * (adapter.change.up.T @ adapter.change.down).reshape(raw.shape)
    expected = adapter.magnitude.reshape(-1, 1, 1, 1) * moved / moved.square().sum((1, 2, 3), keepdim=True).sqrt()
    assert torch.allclose(layer.weight, expected, atol=1e-6)


def published(weight: Tensor, bias: Tensor, adapter: Any, detach: bool) -> Tensor:
    """The layer as the authors and peft compute it: the base output and the low-rank branch, scaled by m / |V|."""
    down, up, scale = adapter.change.down, adapter.change.up, 1.5
    norms = (weight + scale * up.T @ down).norm(dim=1)
    gain = adapter.magnitude / (norms.detach() if detach else norms)
    base = X @ weight.T
    return base + bias + (gain - 1) * base + gain * ((X @ down.T) @ up) * scale


@pytest.mark.parametrize("detach", [True, False])
def test_output_and_gradients_are_those_of_the_published_layer(detach):
    layer, model, adapter = one(detach_norm=detach)
    parameters = [adapter.magnitude, adapter.change.down, adapter.change.up]
    target = torch.randn(2, 3, 4)
    theirs = published(layer._parameters["weight"], layer._parameters["bias"], adapter, detach)
    ours = model.train()(X)
    assert torch.allclose(ours, theirs, atol=1e-5)
    expected = torch.autograd.grad((theirs - target).square().sum(), parameters)
    found = torch.autograd.grad((ours - target).square().sum(), parameters)
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model.eval()(X), theirs, atol=1e-5)


def test_the_two_gradients_differ_and_the_exact_one_keeps_the_magnitude():
    """Through the norm a row of V moves across its own direction only: gradient and row are at right angles."""
    along = {}
    for detach in (True, False):
        _, model, adapter = one(detach_norm=detach)
        moved = torch.zeros(4, 6, requires_grad=True)
        adapter.change.delta = lambda weight, moved=moved: moved
        model(X).pow(3).sum().backward()
        rows = model.backbone._parameters["weight"]
        along[detach] = float((moved.grad * rows).sum(1).abs().max() / moved.grad.norm())  # type: ignore[operator,union-attr]
    assert along[False] < 1e-5
    assert along[True] > 1e-2


def test_merging_and_undoing_are_exact():
    layer, model, _ = one()
    before = layer._parameters["weight"].clone()
    with torch.no_grad():
        folded = model.eval()(X)
        model.merge()
        assert torch.equal(model(X), folded)
        model.unmerge()
    assert torch.equal(layer._parameters["weight"], before)


def test_counts_as_published():
    """LLaMA-7B at rank 32 trains 0.84 % (Liu et al., 2024, table 1)."""
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        llama = TransformersText(name="llama-7b", weights="random")
        count = adapt(llama, DoRA(rank=32, alpha=64)).count()
    assert count["adapter"] == 32 * (32 * (3 * 8192 + 2 * 15104) + 3 * 4096 + 11008 + 4096)
    assert round(100 * count["adapter"] / 6_738_415_616, 2) in (0.84, 0.85)


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_ranks_are_one_clear_line(rank):
    with pytest.raises(RequestError, match=f"rank {rank} at model: its matrix is 4 x 6, so use 1 to 4"):
        one(rank=rank)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dropout_sees_all_that_is_added_to_the_frozen_product(kind):
    layer, x = (nn.Linear(6, 4), X) if kind == "linear" else (nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 5))
    layer, model, adapter = one(layer, roles=kind, dropout=0.5)
    raw, bias = layer._parameters["weight"], layer._parameters["bias"]
    product = torch.nn.functional.linear if kind == "linear" else torch.nn.functional.conv2d
    torch.manual_seed(1)
    ours = model.train()(x)
    torch.manual_seed(1)
    mask = 2 * torch.empty_like(x).bernoulli_(0.5)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    theirs = product(x, raw, bias) + product(x * mask, adapter(raw) - raw)
    assert torch.allclose(ours, theirs, atol=1e-5)
    parameters = list(adapter.parameters())
    expected = torch.autograd.grad(theirs.square().sum(), parameters)
    found = torch.autograd.grad(ours.square().sum(), parameters)
    assert len(found) == 3
    for mine, other in zip(found, expected, strict=True):
        assert float(mine.abs().max()) > 0
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), product(x, layer.weight, bias))


def test_the_published_layer_of_peft_with_the_same_mask():
    import peft

    layer, model, adapter = one(dropout=0.5)
    plain = nn.Linear(6, 4)
    plain.load_state_dict({name: p.detach() for name, p in layer._parameters.items()})
    config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(plain), config)  # type: ignore[arg-type]
    state = {"lora_A.weight": adapter.change.down, "lora_B.weight": adapter.change.up.T}
    state["lora_magnitude_vector"] = adapter.magnitude
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.0.{name}": t.detach() for name, t in state.items()})
    for mode in (True, False):
        outputs = []
        for layers in (model, theirs):
            torch.manual_seed(1)
            outputs.append(layers.train(mode)(X))
        assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
        outputs[0].square().sum().backward()
        outputs[1].square().sum().backward()
    found = {name.split("lora_")[1]: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert torch.allclose(adapter.change.down.grad, found["A.default.weight"], rtol=1e-4, atol=1e-4)
    assert torch.allclose(adapter.change.up.grad.T, found["B.default.weight"], rtol=1e-4, atol=1e-4)
    assert torch.allclose(adapter.magnitude.grad, found["magnitude_vector.default.weight"], rtol=1e-4, atol=1e-4)


def test_each_of_several_adapters_has_its_own_dropout():
    """LoRA's too, which alone would act beside the product."""
    layer, model, adapter = one(dropout=0.5)
    model.add(LoRA(rank=2, roles="linear", dropout=0.25), name="lora")
    (lora,) = model.bank["lora"].values()
    nn.init.normal_(lora.up)
    model.activate("default", "lora", strength={"default": 0.5})
    raw, bias = layer._parameters["weight"], layer._parameters["bias"]
    torch.manual_seed(1)
    ours = model.train()(X)
    torch.manual_seed(1)
    first, second = (torch.nn.functional.dropout(X, p) for p in (0.5, 0.25))
    theirs = X @ raw.T + bias + first @ (adapter(raw, 0.5) - raw).T + second @ (lora.up.T @ lora.down).T
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_dropout_of_rows_of_a_fused_projection():
    """Query and value of one weight: each with a mask of its own, keys as frozen."""
    layer = nn.Linear(6, 12)
    rows = {"attention.query": (0, 4), "attention.value": (8, 12)}
    parts = [Site(role, 0, "", layer, "weight", rows=at, layout="BNC", width=6) for role, at in rows.items()]
    model: Any = adapt(layer, DoRA(rank=2, dropout=0.5, roles=tuple(rows)), sites=Sites(parts, "fused"))
    bare = layer._parameters["weight"]
    assert torch.equal(model.train()(X), X @ bare.T + layer.bias)
    for adapter in model.bank["default"].values():
        nn.init.normal_(adapter.change.up)
    query, value = model.bank["default"].values()
    torch.manual_seed(1)
    ours = model(X)
    torch.manual_seed(1)
    theirs = torch.nn.functional.linear(X, bare, layer.bias).tensor_split((4, 8), -1)
    masked = [torch.nn.functional.dropout(X, 0.5) for _ in range(2)]
    assert torch.allclose(ours[..., :4], theirs[0] + masked[0] @ (query(bare[:4]) - bare[:4]).T, atol=1e-5)
    assert torch.equal(ours[..., 4:8], theirs[1])
    assert torch.allclose(ours[..., 8:], theirs[2] + masked[1] @ (value(bare[8:]) - bare[8:]).T, atol=1e-5)


def test_dropout_where_the_weight_is_read_without_a_call_is_one_clear_line():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(RequestError, match="dropout 0.1 cannot act on in_proj_weight of MultiheadAttention") as error:
        adapt(attention, DoRA(rank=2, dropout=0.1, roles="attention.query"), sites=describe(attention))
    assert "\n" not in str(error.value)
    with pytest.raises(RequestError, match="DoRA dropout 1.0: use a probability"):
        DoRA(dropout=1.0)
