"""Merging a linear function around a linear layer into it: a bias made and unmade, strengths, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared import Adapter, LoRA, Method, RequestError, adapt
from shared.blocks.placement import After
from shared.sites import Sites

X = torch.linspace(-1, 1, 30).reshape(5, 6)


def infer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


class Remixed(Adapter):
    """What a linear layer gives plus a linear function of it, with a bias of its own."""

    additive = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, base, x):
        y = base(x)
        return y + self.mix(y)

    def merged(self, tensors):
        weight, bias = tensors["weight"], tensors["bias"]
        assert weight is not None
        bias = torch.zeros(len(weight)) if bias is None else bias
        return {"weight": weight + self.mix.weight @ weight, "bias": bias + self.mix(bias)}


class Remix(Method):
    def sites(self, sites: Sites) -> Sites:
        return sites.select("linear")

    def build(self, site):
        return Remixed(site.width)


class Bent(Remix):
    """Not linear."""

    def build(self, site):
        return After(nn.Sequential(nn.Linear(site.width, site.width), nn.Tanh()))


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_function_around_a_linear_layer_merges_into_it(bias, strength) -> None:
    host = nn.Sequential(nn.Linear(6, 4, bias=bias))
    before = copy.deepcopy(host.state_dict())
    bare = host(X).detach()
    model = adapt(host, Remix(), name="remix", example=(X,))
    model.add(LoRA(rank=2, roles="linear"), name="lora", example=(X,))
    bank: Any = model.bank
    nn.init.normal_(bank["lora"]["0"].up)
    mix = bank["remix"]["0"].mix
    for active in (("remix",), ("remix", "lora"), ("lora", "remix")):
        model.activate(*active, strength={"remix": strength})
        separate = infer(model)
        if active == ("remix",):
            assert torch.allclose(separate, bare + strength * mix(bare).detach(), atol=1e-5)
        for _ in range(3):
            model.merge()
            assert torch.allclose(infer(model), separate, atol=1e-5)
            assert host[0]._parameters["bias"] is not None
            with model.disabled():
                assert torch.equal(infer(model), bare)
                assert (host[0].bias is None) is not bias
            model.activate("lora")
            assert not torch.allclose(infer(model), bare, atol=1e-2)  # on the frozen weights, not on the merged ones
            model.activate(*active, strength={"remix": strength})
            assert torch.equal(pickle.loads(pickle.dumps(host))(X), host(X))
            model.unmerge()
            assert torch.equal(infer(model), separate)
        after = host.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], before[n]) for n in before)
    model.remove("remix")
    model.remove("lora")
    assert type(host[0]) is nn.Linear
    assert torch.equal(host(X), bare)


def test_a_merge_that_is_refused_changes_nothing() -> None:
    host = nn.Sequential(nn.Linear(6, 6))
    model = adapt(host, Remix(), name="remix", example=(X,))
    model.add(Bent(), name="bent", example=(X,))
    model.activate("remix", "bent")
    before = infer(model)
    with pytest.raises(RequestError, match="adapter 'bent' cannot be merged: it acts on activations at 0$"):
        model.merge()
    assert torch.equal(infer(model), before)
    assert not model.state.merged
