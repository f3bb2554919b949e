"""Hydra on single layers and on the published models (its spec's "What must hold")."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import Hydra, LoRA
from shared.sites import Site, Sites

X = torch.linspace(-1, 1, 2 * 5 * 6).reshape(2, 5, 6)


def one(method: Hydra, layer: nn.Module | None = None, rows: tuple[int, int] | None = None) -> tuple[Any, Any, Any]:
    """A linear layer of 6 inputs and 8 outputs, the model adapted at it, and its pair of branches."""
    torch.manual_seed(2)
    layer = nn.Linear(6, 8) if layer is None else layer
    sites = Sites([Site("mlp.down", 0, "", layer, rows=rows)])
    model = adapt(layer, method, sites=sites, example=(torch.ones_like(layer.weight[:1]),))  # type: ignore[index]
    return layer, model, next(iter(model.bank["default"].values()))  # type: ignore[operator]


def hydra(**more) -> Hydra:
    return Hydra(**{"roles": "mlp.down", **more})


def perturb(pair: nn.Module) -> None:
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.4)


@pytest.mark.parametrize("start", ["xavier", "normal", "kaiming"])
def test_it_starts_as_the_frozen_layer_exactly(start):
    _, model, pair = one(hydra(start=start, scale=3.0, dropout=0.5))
    with model.disabled():
        bare = model(X)
    assert torch.equal(model.train()(X), bare)
    assert torch.equal(model.eval()(X), bare)
    assert pair.parallel.down.weight.any()
    assert not any(t.any() for t in (pair.parallel.up.weight, pair.parallel.up.bias, pair.parallel.down.bias))


def test_the_starts_are_as_published():
    wide = nn.Linear(300, 200)
    xavier = one(hydra(parallel_rank=100), wide)[2].parallel.down.weight.detach()
    assert float(xavier.abs().max()) == pytest.approx((6 / 400) ** 0.5, rel=1e-2)
    kaiming = one(hydra(parallel_rank=100, start="kaiming"), nn.Linear(300, 200))[2].parallel.down.weight.detach()
    assert float(kaiming.abs().max()) == pytest.approx(300**-0.5, rel=1e-2)
    normal = one(hydra(parallel_rank=100, start="normal"), nn.Linear(300, 200))[2].parallel.down.weight.detach()
    assert float(normal.std()) == pytest.approx(0.02, rel=2e-2)


def test_the_worked_example():
    layer = nn.Linear(1, 1)
    layer.load_state_dict({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])})
    layer, model, pair = one(hydra(parallel_rank=1, sequential_rank=1, scale=2.0, bias=False), layer)
    with torch.no_grad():
        for branch, product in ((pair.parallel, 0.5), (pair.sequential, 0.1)):
            branch.down.weight.fill_(1.0)
            branch.up.weight.fill_(product)
        x = torch.tensor([[3.0]])
        assert model(x).item() == pytest.approx(11.4, abs=1e-6)
        model.merge()
        assert layer.weight.item() == pytest.approx(3.4, abs=1e-6)
        assert layer.bias.item() == pytest.approx(1.2, abs=1e-6)
        assert model(x).item() == pytest.approx(11.4, abs=1e-6)


@pytest.mark.parametrize("scale", [0.7, "learned"])
def test_it_is_the_formula_and_the_sequential_branch_reads_y0(scale):
    layer, model, pair = one(hydra(scale=scale))
    perturb(pair)
    p, q = pair.parallel, pair.sequential
    y0 = X @ layer.weight.T + layer.bias
    parallel = p.scale * ((X @ p.down.weight.T + p.down.bias) @ p.up.weight.T + p.up.bias)

    def sequential(y: Tensor) -> Tensor:
        return q.scale * ((y @ q.down.weight.T + q.down.bias) @ q.up.weight.T + q.up.bias)

    assert torch.allclose(model(X), y0 + parallel + sequential(y0), atol=1e-5)
    assert not torch.allclose(model(X), y0 + parallel + sequential(y0 + parallel), atol=1e-2)
    if scale == "learned":
        assert len({1.0, p.scale.item(), q.scale.item()}) == 3  # one of each branch


def test_a_sequential_branch_can_undo_the_layer_bias_included():
    _, model, pair = one(hydra(parallel_rank=0, sequential_rank=8, bias=False))
    with torch.no_grad():
        pair.sequential.down.weight.copy_(torch.eye(8))
        pair.sequential.up.weight.copy_(-torch.eye(8))
    assert not model(X).any()
    with model.disabled():
        assert model(torch.zeros(1, 6)).any()  # there is a bias to undo


def test_the_parallel_branch_alone_is_lora():
    layer, model, pair = one(hydra(parallel_rank=3, sequential_rank=0, scale=1.5, bias=False))
    assert pair.sequential is None
    perturb(pair)
    ours = model(X)
    model.remove()
    lora = adapt(layer, LoRA(rank=3, alpha=4.5, roles="linear"), example=(X,))
    with torch.no_grad():
        lora.bank["default"]["model"].down.copy_(pair.parallel.down.weight)  # type: ignore[index]
        lora.bank["default"]["model"].up.copy_(pair.parallel.up.weight.T)  # type: ignore[index]
    assert torch.allclose(ours, lora(X), atol=1e-6)


@pytest.mark.parametrize("rows", [None, (2, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("host_bias", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_merged_is_unmerged_and_undone(rows, bias, host_bias, strength):
    torch.manual_seed(5)
    layer = nn.Linear(6, 8, bias=host_bias)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer, model, pair = one(hydra(scale=0.6, bias=bias, dropout=0.3), layer, rows)
    perturb(pair)
    model.eval().activate("default", strength=strength)
    with torch.no_grad():
        unmerged, half = model(X), pair(lambda x: x @ before["weight"].T + before.get("bias", 0.0), X)
        bare = X @ before["weight"].T + before.get("bias", 0.0)
        assert torch.allclose(unmerged, bare + strength * (half - bare), atol=1e-5)
        model.train().merge()  # no dropout in what is merged
        assert pair.training
        assert torch.allclose(model(X), unmerged, atol=1e-5)
        assert (layer.bias is not None) == (host_bias or bias)
        model.unmerge()
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    if rows:
        assert torch.equal(unmerged[..., :2], bare[..., :2])
        assert torch.equal(unmerged[..., 7:], bare[..., 7:])


def test_dropout_acts_between_the_factors_in_training_only():
    _, model, pair = one(hydra(parallel_rank=1, sequential_rank=0, dropout=0.5))
    perturb(pair)
    x = torch.randn(400, 6)
    with model.disabled():
        bare = model(x)
    kept = model.eval()(x) - bare
    noisy = model.train()(x) - bare
    assert torch.equal(model.eval()(x) - bare, kept)
    bias = pair.parallel.up.bias
    # With rank 1 the hidden number is dropped whole, its bias included, or doubled.
    dropped = torch.isclose(noisy, bias.expand_as(noisy), atol=1e-5).all(1)
    doubled = torch.isclose(noisy - bias, 2 * (kept - bias), atol=1e-5).all(1)
    assert bool((dropped | doubled).all())
    assert 0.4 < float(dropped.float().mean()) < 0.6


def test_half_precision_layers_keep_their_type():
    layer, model, pair = one(hydra(), nn.Linear(6, 8).bfloat16())
    perturb(pair)
    x = X.bfloat16()
    y = model.eval()(x)
    assert y.dtype == torch.bfloat16
    assert pair.parallel.down.weight.dtype == torch.float32
    model.merge()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.allclose(model(x).float(), y.float(), atol=0.1)


def vit_base():
    from modalities.images.backbones import TimmViT

    return TimmViT(3, name="vit_base_patch16_224", weights="random", image_size=224)


def clip_base():
    from modalities.images.backbones import OpenClipTower

    return OpenClipTower(3, name="ViT-B-32", image_size=224, pretrained="random")


def roberta_base():
    from modalities.language.backbones import TransformersText

    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return TransformersText(name="roberta", weights="random", config=sizes)


NLU = Hydra(parallel_rank=4, sequential_rank=8, bias=False, start="kaiming", roles="mlp.down")


@pytest.mark.parametrize(
    ("backbone", "method", "count"),
    [
        (vit_base, Hydra(), 239_712),
        (clip_base, Hydra(start="normal", roles="mlp.down"), 147_504),
        (roberta_base, NLU, 331_776),
    ],
)
def test_counts_as_published(backbone, method, count):
    with torch.device("meta"):
        host = backbone()
    assert adapt(host, method).count()["adapter"] == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel_rank": 0, "sequential_rank": 0}, "Hydra ranks 0 and 0: one of the two"),
        ({"parallel_rank": -1}, "Hydra parallel_rank -1 at model: use 0 to 6"),
        ({"parallel_rank": 7}, "Hydra parallel_rank 7 at model: use 0 to 6"),
        ({"sequential_rank": 9}, "Hydra sequential_rank 9 at model: use 0 to 8"),
        ({"dropout": 1.0}, "Hydra dropout 1.0: use a probability"),
        ({"start": "zeros"}, "Hydra start 'zeros': use xavier, normal or kaiming"),
    ],
)
def test_impossible_settings_are_one_clear_line(settings, message):
    with pytest.raises(RequestError, match=message):
        one(hydra(**settings))


def test_layers_that_are_not_called_are_refused():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(RequestError, match=r"Hydra at out_proj \(attention.output\): it goes around a linear layer"):
        adapt(attention, Hydra(roles="attention.output"))
    with pytest.raises(RequestError, match="and this is Conv2d"):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 1)), Hydra(roles="conv"))
