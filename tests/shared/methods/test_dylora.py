"""DyLoRA on single layers and small stacks (its spec's "What must hold")."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import DyLoRA, LoRA
from shared.methods.dylora import set_rank, truncate
from shared.sites import describe
from shared.store import read, read_header

RANK, ALPHA = 6, 12.0
X = torch.linspace(-1, 1, 2 * 3 * 10).reshape(2, 3, 10)


def dylora(**more) -> DyLoRA:
    return DyLoRA(**{"rank": RANK, "alpha": ALPHA, "roles": "linear", **more})


def one(method: DyLoRA | None = None, perturbed: bool = True) -> tuple[nn.Linear, Any, Any]:
    """A linear layer of 10 inputs and 7 outputs, the model adapted at it, and its adapter."""
    torch.manual_seed(4)
    layer = nn.Linear(10, 7)
    model: Any = adapt(layer, method or dylora(), sites=describe(layer), example=(X,))
    (adapter,) = model.bank["default"].values()
    if perturbed:
        nn.init.normal_(adapter.up)
    return layer, model, adapter


def by_hand(layer: nn.Linear, adapter: Any, b: int) -> Tensor:
    """base + (alpha / b) B[:, :b] A[:b] x, with B = up.T and A = down."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    return X @ weight.T + bias + ALPHA / b * (X @ adapter.down[:b].T) @ adapter.up[:b]  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("freeze_lower", [True, False])
def test_it_starts_as_the_frozen_layer_at_every_rank(freeze_lower):
    _, model, adapter = one(dylora(freeze_lower=freeze_lower), perturbed=False)
    with model.disabled():
        bare = model(X)
    for b in range(1, RANK + 1):
        set_rank(model, b)
        adapter.drawn.fill_(b)
        assert torch.equal(model.train()(X), bare)
        assert torch.equal(model.eval()(X), bare)
        with torch.no_grad():
            assert torch.equal(model(X), bare)


@pytest.mark.parametrize("freeze_lower", [True, False])
def test_the_output_is_the_formula_at_every_rank(freeze_lower):
    layer, model, adapter = one(dylora(freeze_lower=freeze_lower))
    for b in range(1, RANK + 1):
        set_rank(model, b)
        adapter.drawn.fill_(b)
        expected = by_hand(layer, adapter, b)
        for y in (model.train()(X), model.eval()(X)):
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6 * float(expected.detach().abs().max()))


def gradients(freeze_lower: bool, b: int) -> tuple[Tensor, Tensor]:
    _, model, adapter = one(dylora(freeze_lower=freeze_lower))
    adapter.drawn.fill_(b)
    model.train()(X).square().mean().backward()
    return adapter.down.grad, adapter.up.grad


@pytest.mark.parametrize("b", range(1, RANK + 1))
def test_which_components_take_a_gradient(b):
    top, nested = gradients(True, b), gradients(False, b)
    for one_row, first_rows in zip(top, nested, strict=True):
        assert [bool(row.any()) for row in one_row] == [i == b - 1 for i in range(RANK)]
        assert [bool(row.any()) for row in first_rows] == [i < b for i in range(RANK)]
        assert torch.allclose(one_row[b - 1], first_rows[b - 1], rtol=1e-5, atol=1e-7)


def test_cut_and_saved_it_is_a_plain_lora(tmp_path):
    layer, model, _ = one()
    model.head = nn.Linear(7, 2)
    model.save(tmp_path / "whole.safetensors", metrics={"score": 0.5}, extra={"note": 1})
    for b in (1, 4, RANK):
        truncate(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors", b)
        tensors, header = read(tmp_path / "cut.safetensors")
        assert {n: tuple(t.shape) for n, t in tensors.items()} == {
            "adapter.model.down": (b, 10), "adapter.model.up": (b, 7), "head.weight": (2, 7), "head.bias": (2,),
        }  # fmt: skip
        assert header["method"]["type"] == "LoRA"
        assert header["metrics"] == {"score": 0.5}
        method = LoRA(**header["method"]["arguments"])
        assert (method.rank, method.alpha) == (b, ALPHA)
        plain = adapt(copy_of(layer), method, head=nn.Linear(7, 2), example=(X,))
        plain.load(tmp_path / "cut.safetensors")
        set_rank(model, b)
        with torch.no_grad():
            assert torch.allclose(plain.eval().backbone(X), model.eval().backbone(X), atol=1e-6)


def copy_of(layer: nn.Linear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.load_state_dict(layer.state_dict())
    return twin


def test_one_file_serves_at_any_rank(tmp_path):
    layer, model, adapter = one()
    model.save(tmp_path / "whole.safetensors")
    for b in (1, 3):
        other = adapt(copy_of(layer), dylora(serve=b), example=(X,))
        other.load(tmp_path / "whole.safetensors")
        assert torch.allclose(other.eval()(X), by_hand(layer, adapter, b), atol=1e-5)
    set_rank(model, 2)
    model.save(tmp_path / "two.safetensors")
    assert read_header(tmp_path / "two.safetensors")["method"]["arguments"]["serve"] == 2


def test_merging_follows_the_served_rank_and_never_drifts():
    layer, model, adapter = one()
    before = layer._parameters["weight"].clone()  # type: ignore[union-attr]
    for b in (3, 1, RANK):
        set_rank(model, b)
        adapter.drawn.fill_(5)
        model.train().merge()  # what is merged is what is served, whatever the last step drew
        with torch.no_grad():
            assert torch.allclose(model.eval()(X), by_hand_on(before, layer, adapter, b), atol=1e-5)
        with pytest.raises(RequestError, match="adapters are merged into the weights; unmerge"):
            set_rank(model, 2)
        model.unmerge()
        assert torch.equal(layer._parameters["weight"], before)  # type: ignore[arg-type]


def by_hand_on(weight: Tensor, layer: nn.Linear, adapter: Any, b: int) -> Tensor:
    return X @ (weight + ALPHA / b * adapter.up[:b].T @ adapter.down[:b]).T + layer.bias


def stack() -> Any:
    torch.manual_seed(0)
    model: Any = adapt(nn.Sequential(*(nn.Linear(10, 10) for _ in range(3))), dylora(), example=(X,))
    return model


def drawn(model: Any) -> int:
    ranks = {int(adapter.drawn) for adapter in model.bank["default"].values()}
    assert len(ranks) == 1
    return ranks.pop()


def test_a_step_draws_one_rank_for_the_whole_model():
    model, other = stack(), stack()  # as two processes of a run, or as a run that was stopped and goes on
    draws = []
    for number in range(600):
        model.step(number, seed=3)
        draws.append(drawn(model))
        if number > 590:
            torch.rand(number)
            other.step(number, seed=3)
            assert drawn(other) == draws[-1]
    counts = torch.bincount(torch.tensor(draws), minlength=RANK + 1)
    assert counts[0] == 0
    assert all(60 < n < 145 for n in counts[1:].tolist())  # 100 each, within five deviations
    repeated = sum(a == b for a, b in itertools.pairwise(draws))
    assert 60 < repeated < 145  # independent of the step before
    model.step(0, seed=4)
    fresh = [drawn(model)]
    for number in range(1, 20):
        model.step(number, seed=4)
        fresh.append(drawn(model))
    assert fresh != draws[:20]


def test_other_odds_are_heeded():
    model: Any = adapt(nn.Sequential(nn.Linear(10, 10)), dylora(odds=(0, 0, 1, 0, 3, 0)), example=(X,))
    draws = []
    for number in range(200):
        model.step(number)
        draws.append(drawn(model))
    assert set(draws) == {3, 5}
    assert 120 < draws.count(5) < 180


def test_the_state_of_training_has_the_drawn_rank():
    model, other = stack(), stack()
    model.step(7)
    assert drawn(model) != RANK
    other.load_trained_state(model.trained_state())
    assert drawn(other) == drawn(model)


def test_counts_as_published():
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        roberta = TransformersText(name="roberta-base", weights="random")
    assert adapt(roberta, DyLoRA()).count()["adapter"] == 294_912


def fit(method: DyLoRA | LoRA, target: Tensor, steps: int = 400) -> Any:
    layer = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(layer.weight)
    model: Any = adapt(layer, method, example=(torch.randn(2, 16),))
    optimiser = torch.optim.Adam(model.trainable().values(), lr=0.02)
    for number in range(steps):
        model.train().step(number)
        optimiser.zero_grad()
        x = torch.randn(64, 16)
        (model(x) - x @ target.T).square().mean().backward()
        optimiser.step()
    return model.eval()


def losses(model: Any, target: Tensor, alpha: float) -> list[float]:
    """The mean square error at rank 1 to 8, a plain LoRA cut as a DyLoRA is, but with the scale it was trained with."""
    (adapter,) = model.bank["default"].values()
    found = []
    for b in range(1, 9):
        scale = alpha / b if isinstance(model.methods["default"], DyLoRA) else alpha / 8
        found.append(float((scale * adapter.up[:b].T @ adapter.down[:b] - target).detach().square().mean()))
    return found


@pytest.mark.parametrize("freeze_lower", [True, False])
def test_trained_once_it_is_good_at_every_rank(freeze_lower):
    """A target of rank 4, 8 trained: cutting costs little, where a plain LoRA cut below its rank is lost."""
    torch.manual_seed(1)
    target = torch.randn(16, 4) @ torch.randn(4, 16) / 4
    ours = losses(fit(DyLoRA(alpha=8.0, roles="linear", freeze_lower=freeze_lower), target), target, 8.0)
    plain = losses(fit(LoRA(rank=8, alpha=8.0, roles="linear"), target), target, 8.0)
    assert all(after < 1.25 * before for before, after in itertools.pairwise(ours))
    assert ours[-1] < 0.3 * ours[0]
    assert all(theirs > 1.3 * mine for mine, theirs in zip(ours[:5], plain[:5], strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 at model: its matrix is 7 x 10, so use 1 to 7"),
        ({"rank": 8}, "rank 8 at model: its matrix is 7 x 10, so use 1 to 7"),
        ({"serve": 0}, "rank 0 of a DyLoRA trained to 6: use 1 to 6"),
        ({"serve": 7}, "rank 7 of a DyLoRA trained to 6: use 1 to 6"),
        ({"dropout": 1.0}, "DyLoRA dropout 1.0: use a probability"),
        ({"odds": (1.0,)}, "DyLoRA odds .1.0.: give 6 numbers from 0, one a rank"),
        ({"odds": (0.0,) * 6}, "give 6 numbers from 0, one a rank, not all 0"),
        ({"odds": (1, 1, 1, 1, 1, float("nan"))}, "give 6 numbers from 0"),
        ({"odds": (1, 1, 1, 1, 1, -1)}, "give 6 numbers from 0"),
    ],
)
def test_impossible_settings_are_one_clear_line(settings, message):
    with pytest.raises(RequestError, match=message):
        one(dylora(**settings))


def test_impossible_ranks_of_a_model_or_a_file_are_one_clear_line(tmp_path):
    _, model, _ = one()
    with pytest.raises(RequestError, match="rank 7 of a DyLoRA trained to 6"):
        set_rank(model, 7)
    with pytest.raises(RequestError, match="no DyLoRA 'other'; loaded: default"):
        set_rank(model, 1, name="other")
    model.save(tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match=r"a.safetensors: rank 0 of a DyLoRA trained to 6: use 1 to 6"):
        truncate(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 0)
    truncate(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 2)
    with pytest.raises(RequestError, match=r"b.safetensors: an adapter of method LoRA; only DyLoRA"):
        truncate(tmp_path / "b.safetensors", tmp_path / "c.safetensors", 1)
    assert not (tmp_path / "c.safetensors").exists()
    model.add(dylora(), name="more", example=(X,))
    with pytest.raises(RequestError, match="there are several DyLoRAs, name one; loaded: default, more"):
        set_rank(model, 1)
    set_rank(model, 1, name="more")
    assert model.methods["more"].serve == 1
