"""Statistics of what frozen layers are fed: exact sums, padding left out, the model left as it was, refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.adapted import Adapted, adapt
from shared.errors import RequestError, WorkError
from shared.methods import LoRA
from shared.sites import Site, Sites
from shared.statistics import SecondMoment, Statistic, collect
from tests.shared.hosts import HOSTS

ROLES = ("attention.query", "attention.value", "attention.output", "mlp.up", "mlp.down")


def stack(*sizes: int) -> tuple[Any, Sites]:
    model: Any = Adapted(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))))
    return model, model.sites().select("linear")


def moments(model, sites, batches, make: Any = SecondMoment, run=None, **more) -> dict[str, Any]:
    return {s.key: found for s, found in collect(model, sites, batches, run or model, make, **more)}


def listened(backbone, site: Site, inputs) -> list[Tensor]:
    """What the layer is fed, by a hook of the test's own."""
    seen: list[Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        backbone(*inputs)
    handle.remove()
    return seen


def test_the_sum_over_all_batches():
    model, sites = stack(4, 3)
    batches = [torch.randn(2, 5, 4), torch.randn(1, 3, 4), torch.randn(6, 4)]
    found = moments(model, sites, batches)["0"]
    rows = torch.cat([batch.reshape(-1, 4) for batch in batches])
    assert torch.allclose(found.total, rows.T @ rows, atol=1e-5)
    assert (found.samples, found.tokens) == (9, 19)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 3),
)
def test_neither_batches_nor_passes_matter(sizes, limit, normalised, at_a_time):
    model, sites = stack(3, 4, 2)
    rows = torch.randn(sum(sizes), 5, 3, generator=torch.Generator().manual_seed(limit))

    def make() -> SecondMoment:
        return SecondMoment(normalised=normalised)

    whole = moments(model, sites, list(rows[:limit, None]), make)
    parts = moments(model, sites, list(rows.split(sizes)), make, samples=limit, at_a_time=at_a_time)
    assert list(parts) == list(whole) == ["0", "1"]
    for key, found in parts.items():
        assert (found.samples, found.tokens) == (min(limit, sum(sizes)), 5 * min(limit, sum(sizes)))
        assert torch.allclose(found.total, whole[key].total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_is_left_out(family):
    backbone, (tokens, mask), sites = HOSTS[family]()
    model = Adapted(backbone)
    chosen = sites.select(ROLES)
    found = moments(model, chosen, [(tokens, mask)], run=lambda batch: model(*batch))
    for site in chosen:
        (x,) = listened(backbone, site, (tokens, mask))
        rows = x[mask]
        assert torch.allclose(found[site.key].total, rows.T @ rows, rtol=1e-4, atol=1e-5), site.key
        assert (found[site.key].samples, found[site.key].tokens) == (3, 16)


class Flat(nn.Module):
    """Writes a mask, feeds one layer (B, N, C), one (B * N, C), one (B, C) and one (B, C, N)."""

    context: Any
    use_odd: bool

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.flat, self.pooled, self.odd = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.context.token_mask = mask
        y = self.flat(self.tokens(x).flatten(0, 1)).view_as(x)
        pooled = self.pooled(y[:, 0])
        return pooled + (self.odd(y[:, :-1]).sum(1) if self.use_odd else 0)


@pytest.fixture
def flat() -> tuple[Any, Sites]:
    backbone: Any = Flat()
    backbone.use_odd = False
    model = Adapted(backbone)
    backbone.context = model.context
    return model, model.sites().select("linear")


def test_a_mask_fits_tokens_flattened_tokens_and_samples(flat):
    model, sites = flat
    x, mask = torch.randn(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])
    x[1, 2:] = torch.nan  # what stands at padding means nothing
    found = moments(model, sites[:3], [(x, mask)], run=lambda batch: model(*batch))
    assert [(f.samples, f.tokens) for f in found.values()] == [(2, 6), (2, 6), (2, 2)]
    rows = x[mask]
    assert torch.allclose(found["tokens"].total, rows.T @ rows, atol=1e-5)
    rows = model.backbone.tokens(rows)
    assert torch.allclose(found["flat"].total, rows.T @ rows, atol=1e-5)
    rows = model.backbone.flat(rows)[[0, 4]]
    assert torch.allclose(found["pooled"].total, rows.T @ rows, atol=1e-5)


def test_an_input_that_does_not_fit_the_mask_is_refused(flat):
    model, sites = flat
    model.backbone.use_odd = True
    with pytest.raises(WorkError, match=r"odd is fed \(2, 3, 3\), which does not fit the token mask \(2, 4\)"):
        moments(model, sites, [(torch.randn(2, 4, 3), torch.ones(2, 4).bool())], run=lambda batch: model(*batch))


def test_normalised_samples():
    model, sites = stack(2, 2)
    one = torch.tensor([[[4.0, -8.0], [2.0, 1.0]]])
    negative = torch.tensor([[[-1.0, -2.0]]])  # |max| of the signed tensor is 1, its largest magnitude 2
    guarded = torch.tensor([[[-1e-9, -2.0]]])
    zero = torch.zeros(1, 1, 2)
    found = moments(model, sites, [one, negative, guarded, zero], lambda: SecondMoment(normalised=True))["0"]
    rows = torch.cat([one[0] / 4, negative[0], guarded[0] / 2])
    assert torch.allclose(found.total, rows.T @ rows)
    assert (found.samples, found.guarded) == (4, 1)


def test_normalised_samples_see_no_padding(flat):
    model, sites = flat
    x, mask = torch.full((1, 2, 3), -2.0), torch.tensor([[True, False]])
    x[0, 1] = 5.0
    found = moments(
        model, sites[:1], [(x, mask)], lambda: SecondMoment(normalised=True), run=lambda batch: model(*batch)
    )
    assert torch.equal(found["tokens"].total, torch.ones(3, 3))


def test_the_model_is_left_as_it_was():
    backbone, inputs, _ = HOSTS["vit"]()
    model: Any = adapt(backbone, LoRA(rank=2), head=nn.Dropout(0.5)).train()
    modes = [m.training for m in model.modules()]
    seen: list[tuple[bool, bool, bool]] = []

    def run(batch: Tensor) -> None:
        seen.append((model.training, model.head.training, torch.is_grad_enabled()))
        model.backbone(batch)

    sites = model.sites().select(("mlp.up", "attention.query", "attention.key"))
    found = moments(model, sites, [inputs[0]], run=run)
    assert seen == [(False, False, False)]
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in backbone.modules())
    assert len(found) == 3 * 4
    # Query and key are rows of one projection: one input, one statistic.
    assert found["model/blocks/0/attn/qkv:query"] is found["model/blocks/0/attn/qkv:key"]


def test_what_fails_leaves_the_model_as_it_was_too():
    model, sites = stack(3, 3)
    model.train()
    with pytest.raises(WorkError):
        moments(model, sites, [torch.full((1, 3), torch.nan)])
    assert model.training
    assert not model.backbone[0]._forward_pre_hooks


def test_one_layer_at_a_time_sees_what_was_done_to_those_before():
    model, sites = stack(2, 2, 2)
    batches = [torch.randn(3, 2)]
    found = {}
    for site, moment in collect(model, sites, batches, model, SecondMoment, at_a_time=1):
        found[site.key] = moment.total
        with torch.no_grad():
            site.module.weight.zero_()
            site.module.bias.fill_(1.0)
    assert torch.equal(found["1"], torch.full((2, 2), 3.0))


def test_sums_are_of_float32_under_autocast():
    model, sites = stack(3, 3)
    x = torch.randn(40, 3)

    def run(batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)

    found = moments(model, sites, [x], run=run)["0"]
    assert found.total.dtype == torch.float32
    assert torch.allclose(found.total, x.T @ x, atol=1e-5)


def test_other_statistics_are_collected_as_well():
    class Mean(Statistic):
        def __init__(self) -> None:
            self.total = torch.zeros(3)

        def add(self, x: Tensor, mask: Tensor) -> None:
            self.total += x[mask].sum(0)

    model, sites = stack(3, 2)
    x = torch.randn(4, 5, 3)
    assert torch.allclose(moments(model, sites, [x], Mean)["0"].total / 20, x.mean((0, 1)), atol=1e-6)


def test_bad_calibration_is_one_line():
    model, sites = stack(3, 3)
    with pytest.raises(RequestError, match="calibration: there is no batch"):
        moments(model, sites, [])
    deep, both = stack(3, 3, 3)
    with pytest.raises(RequestError, match="calibration: there is no batch"):  # the second pass of an iterator
        moments(deep, both, iter([torch.randn(1, 3)]), at_a_time=1)
    bad = torch.randn(2, 3)
    bad[1, 1] = torch.inf
    with pytest.raises(WorkError, match="the input of 0 is not finite within samples 1 to 2"):
        moments(model, sites, [torch.randn(1, 3), bad])
    with pytest.raises(WorkError, match="0 was fed no token in 1 batches"):
        moments(model, sites, [torch.randn(1, 3)], run=lambda batch: None)
    with pytest.raises(RequestError, match="samples 0, None layers at a time: use at least 1"):
        moments(model, sites, [bad], samples=0)


def test_what_is_not_called_cannot_be_measured():
    backbone, inputs, sites = HOSTS["attention"]()
    model = Adapted(backbone, sites=sites)
    for role in ("attention.query", "attention.output"):
        with pytest.raises(RequestError, match="only inputs of linear layers that are called can be measured"):
            moments(model, sites.select(role), [inputs[0]])
