"""SoKA and sums of Kronecker products against their formulas (its spec's "What must hold")."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.kronecker import Shape, decompose, largest_divisor, rank_by_elbow, rank_by_energy, recompose
from shared.errors import RequestError, WorkError
from shared.methods import Full, LoRA, SoKA
from tests.shared.hosts import HOSTS

shapes = st.builds(Shape, *[st.integers(1, 5)] * 4)
ELBOW = torch.tensor([10, 5, 1, 0.8, 0.6, 0.5])


def summed(found: Any, rank: int | None = None) -> Tensor:
    """By torch's own Kronecker product."""
    terms = [torch.kron(a, b) for a, b in zip(found.a[:rank], found.b[:rank], strict=True)]
    return torch.stack(terms).sum(0)


def model_of(linear: nn.Linear, **arguments) -> Any:
    return adapt(linear, SoKA(**arguments))


# -- the decomposition -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_the_rearrangement_is_an_isometry_that_makes_products_rank_one(shape, seed):
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape.p1 * shape.p2, shape.q1 * shape.q2, generator=g)
    rearranged = shape.rearrange(matrix)
    assert torch.equal(shape.restore(rearranged), matrix)
    assert torch.equal(rearranged.flatten().sort().values, matrix.flatten().sort().values)  # so its norm is the same
    a, b = torch.randn(shape.p1, shape.q1, generator=g), torch.randn(shape.p2, shape.q2, generator=g)
    assert torch.allclose(shape.rearrange(torch.kron(a, b)), torch.outer(a.flatten(), b.flatten()), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_all_components_give_the_matrix_and_fewer_leave_the_energy_of_the_rest(shape, seed):
    matrix = torch.randn(
        shape.p1 * shape.p2, shape.q1 * shape.q2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    found = decompose(matrix, shape, shape.most)
    assert (summed(found) - matrix).norm() < 1e-10 * matrix.norm() + 1e-12
    assert found.energy == pytest.approx(float(found.values.square().sum()))
    for rank in range(1, shape.most):
        left = (matrix - summed(found, rank)).square().sum()
        assert float(left) == pytest.approx(float(found.values[rank:].square().sum()), abs=1e-9)


def test_a_matrix_that_is_not_square():
    matrix = torch.randn(6, 20)
    found = decompose(matrix, Shape(2, 3, 4, 5), 100)
    assert len(found.values) == 8
    assert (summed(found) - matrix).norm() / matrix.norm() < 1e-5


def test_a_product_acts_without_being_formed():
    linear = nn.Linear(20, 6, bias=False)
    model = model_of(linear, factors=(2, 4), rank_min=3, rank_max=3)
    adapter = model.bank["default"]["model"]
    with torch.no_grad():
        adapter.a.add_(torch.randn_like(adapter.a))
    x = torch.randn(7, 20)
    parts = [(adapter.a, adapter.b, 1), (adapter.a_start, adapter.b_start, -1)]
    branch = sum(
        sign * torch.einsum("kij,tjl,kml->tim", a, x.view(7, 4, 5), b).flatten(1)  # vec(A X B^T)
        for a, b, sign in parts
    )
    with model.disabled():
        bare = model(x)
    assert torch.allclose(model(x), bare + branch, atol=1e-5)


def test_the_first_worked_example():
    matrix = torch.arange(1.0, 17).view(4, 4)
    shape = Shape.of(4, 4)
    assert shape == (2, 2, 2, 2)
    expected = torch.tensor([[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16.0]])
    assert torch.equal(shape.rearrange(matrix), expected)
    found = decompose(matrix, shape, 4)
    assert torch.allclose(found.values, torch.tensor([38.51665, 3.53094, 0, 0]), atol=1e-5)
    assert float(found.values[0]) ** 2 / found.energy == pytest.approx(0.991666, abs=1e-6)
    assert rank_by_energy(found.values, found.energy, 0.9) == 1
    assert rank_by_energy(found.values, found.energy, 0.995) == 2


def test_the_identity_is_one_product():
    found = decompose(torch.eye(4), Shape.of(4, 4), 4)
    assert torch.allclose(found.values, torch.tensor([2.0, 0, 0, 0]), atol=1e-6)
    assert torch.allclose(summed(found, 1), torch.eye(4), atol=1e-6)


def test_the_elbow_and_the_energy_of_the_third_example():
    energy = float(ELBOW.square().sum())
    x, y = torch.arange(6) / 5, (ELBOW - 0.5) / 9.5
    assert torch.allclose(1 - x - y, torch.tensor([0, 0.3263, 0.5474, 0.3684, 0.1895, 0]), atol=1e-4)
    assert rank_by_elbow(ELBOW) == 2
    shares = ELBOW.square().cumsum(0) / energy
    assert torch.allclose(shares[:3], torch.tensor([0.7859, 0.9823, 0.9902]), atol=1e-4)
    assert [rank_by_energy(ELBOW, energy, tau) for tau in (0.78, 0.95, 0.99, 1.0)] == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("values", "rank"),
    [([3, 3, 3], 3), ([5], 1), ([4, 1], 1), ([10, 0, 0, 0], 1), ([4, 3, 2, 1], 1), ([0, 0], 2)],
)
def test_elbows_of_odd_spectra(values, rank):
    assert rank_by_elbow(torch.tensor(values, dtype=torch.float32)) == rank


def test_large_matrices_by_a_randomised_decomposition(monkeypatch):
    torch.manual_seed(1)
    shape = Shape(6, 6, 6, 6)
    spectrum = torch.logspace(1, -2, 36)
    left, right = (torch.linalg.qr(torch.randn(36, 36))[0] for _ in range(2))
    matrix = shape.restore(left * spectrum @ right.T)
    exact = decompose(matrix, shape, 5)
    monkeypatch.setattr("shared.blocks.kronecker.EXACT", 10)
    state = torch.random.get_rng_state()
    near, again = decompose(matrix, shape, 5), decompose(matrix, shape, 5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(near.a, again.a)
    assert torch.allclose(near.values, exact.values, rtol=1e-4)
    assert torch.allclose(summed(near), summed(exact), atol=1e-3)
    assert near.energy == exact.energy


def test_factors():
    assert [largest_divisor(n) for n in (4096, 11008, 1, 7, 12)] == [64, 86, 1, 1, 3]
    assert Shape.of(4096, 11008) == (64, 64, 86, 128)
    assert Shape.of(4096, 4096).parameters == 8192


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_the_start_from_the_weight_is_the_identity(rank):
    linear = nn.Linear(20, 6)
    before = linear.weight.detach().clone()
    model = model_of(linear, factors=(2, 4), rank_min=rank, rank_max=rank)
    adapter = model.bank["default"]["model"]
    assert adapter.a.shape == (rank, 2, 4)
    assert torch.allclose(summed(adapter), summed(decompose(before, Shape(2, 3, 4, 5), rank)), atol=1e-6)
    x = torch.randn(3, 20)
    with model.disabled():
        bare = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), bare)
    assert torch.equal(model(x), bare)  # in training
    model.merge()
    assert torch.equal(model(x), bare)
    model.unmerge()
    model.remove()
    assert torch.equal(linear.weight, before)


def test_gradients_reach_the_factors_only():
    linear = nn.Linear(20, 6)
    model = model_of(linear, factors=(2, 4), rank_min=3, rank_max=3)
    model(torch.randn(3, 20)).square().sum().backward()
    trained = model.trainable()
    assert set(trained) == {"adapter.default.model.a", "adapter.default.model.b"}
    assert all(p.grad.count_nonzero() == p.numel() for p in trained.values())
    assert not any(p.requires_grad for p in linear.parameters())
    assert model.count()["adapter"] == 3 * (2 * 4 + 3 * 5)


def test_counts_of_llama_2_7b():
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        backbone = TransformersText(name="Llama-2-7b-hf", weights="random", lm_head=True)
    model = adapt(backbone, SoKA(roles=("attention.query", "attention.value"), rank_max=2))
    assert model.count()["adapter"] == 64 * 2 * 8192 == 1_048_576
    model.remove()
    model.add(SoKA(rank_max=2))
    one = 4 * 8192 + 2 * (86 * 64 + 128 * 64) + (64 * 86 + 64 * 128)
    assert model.count()["adapter"] == 2 * 32 * one


def with_spectrum(values: list[float], size: int = 4) -> nn.Linear:
    """A layer of size^2 x size^2 with these Kronecker singular values, zeros after them."""
    shape = Shape(size, size, size, size)
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size * size, len(values), generator=g))[0] for _ in range(2))
    linear = nn.Linear(size * size, size * size, bias=False)
    linear.weight.data.copy_(shape.restore(left * torch.tensor(values) @ right.T))
    return linear


@pytest.mark.parametrize(
    ("arguments", "rank"),
    [
        ({"threshold": 0.95, "rank_max": 5}, 2),
        ({"threshold": 0.99, "rank_max": 5}, 2),  # the elbow's
        ({"threshold": 0.5, "rank_max": 5}, 1),  # the energy's
        ({"threshold": 0.99, "rank_max": 5, "combine": "max"}, 3),
        ({"threshold": 0.99, "rank_max": 5, "combine": "energy"}, 3),
        ({"threshold": 0.5, "rank_max": 5, "combine": "elbow"}, 2),
        ({"threshold": 0.5, "rank_max": 5, "rank_min": 4}, 4),
        ({"threshold": 1.0, "rank_max": 5, "combine": "energy"}, 5),  # at most
    ],
)
def test_the_rank_follows_from_the_spectrum(arguments, rank, caplog):
    with caplog.at_level(logging.INFO, logger="omniadapt"):
        model = model_of(with_spectrum(ELBOW.tolist()), **arguments)
    adapter = model.bank["default"]["model"]
    assert adapter.a.shape == adapter.b_start.shape == (rank, 4, 4)
    assert torch.allclose(adapter.spectrum, ELBOW, atol=1e-5)
    share = float(ELBOW[:rank].square().sum() / ELBOW.square().sum())
    assert adapter.kept == pytest.approx(share, abs=1e-5)
    assert f"SoKA: model: {rank} products, {share:.3f} of the energy" in caplog.text


def three_layers() -> nn.Sequential:
    return nn.Sequential(with_spectrum([8, 7, 6, 5, 4]), with_spectrum([9, 0.1]), with_spectrum([3, 2, 1]))


@pytest.mark.parametrize("budget", [3, 4, 5, 6, 7, 8, 100])
def test_a_budget_lowers_the_threshold(budget):
    method = SoKA(combine="energy", threshold=0.99, budget=32 * budget)
    model: Any = adapt(three_layers(), method)
    ranks = [len(adapter.a) for adapter in model.bank["default"].values()]
    free: Any = adapt(three_layers(), SoKA(combine="energy", threshold=0.99))
    most = [len(adapter.a) for adapter in free.bank["default"].values()]
    assert most == [5, 1, 3]
    assert sum(ranks) <= budget
    assert sum(ranks) >= min(budget, 9) - 1  # a threshold may bring two at once
    assert all(a <= b for a, b in zip(ranks, most, strict=True))
    assert model.count()["adapter"] == 32 * sum(ranks)


def test_a_budget_too_small_is_refused():
    with pytest.raises(RequestError, match="SoKA budget 95: combine 'energy' with rank_min 1 needs 96"):
        adapt(three_layers(), SoKA(combine="energy", budget=95))


def test_a_file_brings_its_ranks(tmp_path):
    model: Any = adapt(three_layers(), SoKA(combine="energy", threshold=0.99))
    with torch.no_grad():
        for adapter in model.bank["default"].values():
            adapter.a.mul_(1.5)
    model.save(tmp_path / "a.safetensors")
    x = torch.randn(2, 16)
    # Another backbone, with other spectra: its own ranks are others.
    layers = three_layers()
    other: Any = adapt(nn.Sequential(layers[2], layers[0], layers[1]), SoKA(combine="energy", threshold=0.99))
    parameters = list(other.trainable().values())
    assert [len(adapter.a) for adapter in other.bank["default"].values()] == [3, 5, 1]
    other.load(tmp_path / "a.safetensors", other_backbone=True)
    assert [len(adapter.a) for adapter in other.bank["default"].values()] == [5, 1, 3]
    assert all(p is q for p, q in zip(parameters, other.trainable().values(), strict=True))  # an optimiser has them
    for a, b in zip(model.bank["default"].values(), other.bank["default"].values(), strict=True):
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())
    other(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in other.trainable().values())
    same: Any = adapt(three_layers(), SoKA(combine="energy", threshold=0.99))
    same.load(tmp_path / "a.safetensors")
    assert torch.equal(same(x), model(x))


def test_tensors_of_two_ranks_do_not_load_and_nothing_changes():
    model: Any = adapt(three_layers(), SoKA(combine="energy", threshold=0.99))
    state = {n: t.clone() for n, t in model.trained_state().items()}
    for name, tensor in (("b", torch.zeros(2, 4, 4)), ("a", torch.zeros(5, 3, 4)), ("b_start", torch.zeros(()))):
        wrong = state | {f"adapter.default.0.{name}": tensor, "adapter.default.1.a": torch.ones(1, 4, 4)}
        with pytest.raises(RequestError, match=r"\d of its \d+ tensors fit this model; \d of another shape \(first"):
            model.load_trained_state(wrong)
        assert all(torch.equal(state[n], t) for n, t in model.trained_state().items())


def test_sites_of_all_kinds():
    backbone, inputs, _ = HOSTS["vit"]()
    model: Any = adapt(backbone, SoKA(rank_max=2))
    assert {key.rpartition(":")[2] for key in model.bank["default"] if ":" in key} == {"query", "key", "value"}
    assert model.backbone(*inputs).summary.isfinite().all()


# -- the start from an update ------------------------------------------------------------------------------------------


class Toy:
    """A 16 x 16 layer whose true update is two Kronecker products of 4 x 4 factors."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(16, 16, bias=False)
        self.linear.weight.data.copy_(torch.randn(16, 16, generator=g) / 4)
        factors = torch.randn(4, 4, 4, generator=g)
        update = torch.kron(factors[0], factors[1]) + torch.kron(factors[2], factors[3])
        self.x = torch.randn(512, 16, generator=g)
        self.update = update * (0.24 / (self.x @ update.T).square().mean()).sqrt()
        self.target = self.x @ (self.linear.weight.detach() + self.update).T

    def loss(self, model: Any) -> Tensor:
        return (model(self.x) - self.target).square().mean()

    def train(self, method: Any, steps: int) -> tuple[float, float]:
        """The loss at the start and the lowest in the last steps."""
        model: Any = adapt(self.linear, method)
        model.prepare([self.x], lambda batch: self.loss(model))
        assert model.count()["trainable"] == 64 * (2 if getattr(method, "rank_max", 2) == 4 else 1)
        start = float(self.loss(model).detach())
        optimiser = torch.optim.Adam(model.trainable().values(), lr=0.01)
        losses = []
        for _ in range(steps):
            optimiser.zero_grad()
            loss = self.loss(model)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return start, min(losses[-50:])


@pytest.mark.parametrize("seed", range(2))
def test_only_the_update_of_two_products_is_reached_and_from_the_gradient_it_is(seed):
    """From the weight, r products can only reach W_res plus r products: an update of rank two is not among them."""
    steps = 1000
    start, end = Toy(seed).train(SoKA(source="gradient", rank_min=2, rank_max=2), steps)
    assert start < 0.85 * 0.24  # below any start that is the identity
    assert end < 1e-6
    _, lora = Toy(seed).train(LoRA(rank=2, roles="linear"), steps)
    same, two = Toy(seed).train(SoKA(rank_min=2, rank_max=2), steps)
    _, four = Toy(seed).train(SoKA(rank_min=4, rank_max=4), steps)
    assert same == pytest.approx(0.24, abs=1e-5)
    assert lora > 0.05
    assert two > 0.05
    assert 0.01 < four < two


def test_the_start_from_a_given_update(tmp_path):
    toy = Toy()
    full: Any = adapt(nn.Sequential(toy.linear), Full())
    before = toy.linear.weight.detach().clone()
    with torch.no_grad():
        full.trainable()["backbone.0.weight"].add_(toy.update)
    full.save(tmp_path / "full.safetensors")
    with torch.no_grad():
        full.trainable()["backbone.0.weight"].copy_(before)
    full.remove()
    file = str(tmp_path / "full.safetensors")
    model: Any = adapt(nn.Sequential(toy.linear), SoKA(source="update", update=file, threshold=0.999, combine="energy"))
    assert model.bank["default"]["0"].a.shape == (2, 4, 4)
    assert model.unprepared() == []
    assert torch.allclose(summed(model.bank["default"]["0"]), toy.update, atol=1e-5)
    assert float(toy.loss(model).detach()) < 1e-10
    with model.disabled():
        assert float(toy.loss(model).detach()) == pytest.approx(0.24, abs=1e-5)
    model.save(tmp_path / "soka.safetensors")
    model.remove()
    assert torch.equal(toy.linear.weight, before)
    lora: Any = adapt(nn.Sequential(toy.linear), LoRA(rank=2, roles="linear"))
    lora.save(tmp_path / "lora.safetensors")
    lora.remove()
    with pytest.raises(RequestError, match="an adapter of LoRA without a whole trained weight for 0; train one with"):
        adapt(nn.Sequential(toy.linear), SoKA(source="update", update=str(tmp_path / "lora.safetensors")))
    with pytest.raises(RequestError, match="no such file"):
        adapt(nn.Sequential(toy.linear), SoKA(source="update", update=str(tmp_path / "none.safetensors")))


def test_the_start_from_the_gradient():
    toy = Toy()
    model: Any = adapt(nn.Sequential(toy.linear, nn.Dropout(0.5)), SoKA(source="gradient", rank_min=2, rank_max=3))
    with pytest.raises(RequestError, match="starts from data"):
        model.trainable()
    x = torch.randn(3, 16)
    with model.disabled():
        bare = model(x)
    assert torch.equal(model.eval()(x), bare)
    model.train()
    calls = []

    def loss(batch: Tensor) -> Tensor:
        calls.append(model.training)
        return (model(batch) - batch @ toy.update.T).square().mean()

    batches = [toy.x[:100], toy.x[100:200]]
    model.prepare(batches, loss)
    assert not any(calls)
    assert model.training
    assert not toy.linear._parameters["weight"].requires_grad  # type: ignore[union-attr]
    weight = toy.linear._parameters["weight"].detach().clone().requires_grad_()  # type: ignore[union-attr]
    whole = sum((b @ weight.T - b @ toy.update.T).square().mean() for b in batches) / 2
    (gradient,) = torch.autograd.grad(whole, weight)
    adapter = model.bank["default"]["0"]
    down = summed(decompose(-gradient, Shape.of(16, 16), len(adapter.a)))
    moved = summed(adapter).detach()
    length = float((moved * down).sum() / down.square().sum())
    assert length > 0
    assert torch.allclose(moved, length * down, rtol=1e-3, atol=1e-5)
    # The loss is quadratic, so the search finds its lowest point along the line.
    near = [weight.detach() + c * length * down - toy.update for c in (0.98, 1.0, 1.02)]
    at = [float(sum((b @ off.T).square().mean() for b in batches)) for off in near]
    assert at[1] < min(at[0], at[2])


def test_a_gradient_start_is_saved_with_its_rank(tmp_path):
    toy = Toy()
    model: Any = adapt(toy.linear, SoKA(source="gradient"))
    assert len(model.bank["default"]["model"].a) == 8
    model.prepare([toy.x], lambda batch: toy.loss(model))
    rank = len(model.bank["default"]["model"].a)
    assert rank < 8
    model.save(tmp_path / "a.safetensors")
    other: Any = adapt(Toy().linear, SoKA(source="gradient"))
    other.load(tmp_path / "a.safetensors")
    assert other.unprepared() == []
    assert torch.equal(other(toy.x), model(toy.x))


def test_bad_gradients_are_one_line():
    toy = Toy()
    model: Any = adapt(toy.linear, SoKA(source="gradient"))
    with pytest.raises(RequestError, match="calibration: there is no batch"):
        model.prepare([], lambda batch: toy.loss(model))
    with pytest.raises(WorkError, match="the gradient of model is not finite"):
        model.prepare([toy.x], lambda batch: toy.loss(model) * torch.nan)
    with pytest.raises(WorkError, match="the loss does not fall along minus its gradient"):
        model.prepare([toy.x], lambda batch: toy.loss(model) * 0)
    assert not toy.linear._parameters["weight"].requires_grad  # type: ignore[union-attr]


# -- reselection in training -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_the_components_of_a_sum_of_products_are_those_of_its_matrix(shape, seed):
    g = torch.Generator().manual_seed(seed)
    rank = int(torch.randint(1, shape.most + 1, (), generator=g))
    a = torch.randn(rank, shape.p1, shape.q1, generator=g, dtype=torch.float64)
    b = torch.randn(rank, shape.p2, shape.q2, generator=g, dtype=torch.float64)
    matrix = torch.stack([torch.kron(*pair) for pair in zip(a, b, strict=True)]).sum(0)
    found, whole = recompose(a, b), decompose(matrix, shape, rank)
    assert torch.allclose(found.values, whole.values, atol=1e-9)
    assert found.energy == pytest.approx(whole.energy)
    assert torch.allclose(summed(found), matrix, atol=1e-9)
    assert (found.values.diff() <= 0).all()


def reselecting(values: list[float], **arguments) -> tuple[Any, Any]:
    """A layer whose products are changed to have these singular values, hidden by another basis of the same sum."""
    fixed = {"rank_max": len(values), "reselect_every": 5, "combine": "energy"}
    model: Any = adapt(with_spectrum([9, 8, 7, 6, 5, 4]), SoKA(rank_min=len(values), **fixed))
    model.methods["default"] = SoKA(**fixed | arguments)
    adapter = model.bank["default"]["model"]
    torch.manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(16, len(values)))[0] for _ in range(2))
    mix = torch.randn(len(values), len(values)) + 3 * torch.eye(len(values))
    with torch.no_grad():
        adapter.a.copy_((left * torch.tensor(values) @ mix).t().view_as(adapter.a))
        adapter.b.copy_((right @ torch.linalg.inv(mix).t()).t().view_as(adapter.b))
    return model, adapter


@pytest.mark.parametrize(
    ("values", "arguments", "rank"),
    [
        ([10, 5, 1, 0.5], {"threshold": 0.95}, 2),
        ([10, 5, 1, 0.5], {"threshold": 0.5}, 1),
        ([10, 5, 1, 0.5], {"threshold": 0.5, "rank_min": 3}, 3),
        ([10, 5, 1, 0.5], {"threshold": 1.0}, 4),
        ([10, 9, 8], {"combine": "elbow"}, 3),  # before the zeros
        ([10, 9, 0.1], {"combine": "min", "threshold": 1.0}, 2),
    ],
)
def test_reselection_drops_by_the_rule_and_changes_nothing(values, arguments, rank, caplog):
    model, adapter = reselecting(values, **arguments)
    x, before = torch.randn(9, 16), {n: t.clone() for n, t in adapter.state_dict().items()}
    parameters = [(p, p.shape, p.data_ptr()) for p in model.trainable().values()]
    expected, total = model(x).detach(), summed(adapter).detach()
    for number in (0, 1, 4, 6):
        model.step(number)
        assert all(torch.equal(before[n], t) for n, t in adapter.state_dict().items() if n != "reselected")
    with caplog.at_level(logging.INFO, logger="omniadapt"):
        model.step(5)
    assert adapter.live.tolist() == [k < rank for k in range(len(values))]
    assert all(p is q and p.shape == s and p.data_ptr() == d
               for (p, s, d), q in zip(parameters, model.trainable().values(), strict=True))  # fmt: skip
    assert torch.allclose(model(x), expected, atol=1e-5 * float(expected.abs().max()))
    if rank == len(values):  # the optimiser's moments stay those of these rows
        assert all(torch.equal(before[n], t) for n, t in adapter.state_dict().items() if n != "reselected")
        return
    assert f"SoKA: model: {rank} of {len(values)} products go on" in caplog.text
    folded = torch.stack([torch.kron(*pair) for pair in zip(adapter.a_folded, adapter.b_folded, strict=True)]).sum(0)
    assert torch.allclose(summed(adapter).detach() + folded, total, atol=1e-5)
    lost = torch.tensor(values[rank:]).square().sum()
    assert float(folded.square().sum()) == pytest.approx(float(lost), rel=1e-3)  # the nearest of that rank stays
    assert not adapter.a[rank:].any()
    assert not adapter.b[rank:].any()


def test_a_reselected_layer_merges_and_restores():
    model, _ = reselecting([10, 5, 1, 0.5])
    model.step(5)
    x = torch.randn(4, 16)
    served = model.eval()(x)
    model.merge()
    assert torch.allclose(model(x), served, atol=1e-5)
    model.unmerge()
    assert torch.equal(model(x), served)


def test_dropped_products_stay_dropped_whatever_the_optimiser_holds():
    model, adapter = reselecting([10, 5, 1, 0.5], threshold=0.9)
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=0.05, weight_decay=0.1)
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    for number in range(6, 25):  # moments before the first look
        model.step(number)
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        gone = ~adapter.live
        if gone.any():
            assert not adapter.a.grad[gone].any()
            assert not adapter.b.grad[gone].any()
        optimiser.step()
    gone = ~adapter.live
    assert gone.any()
    assert adapter.a[gone].abs().max() > 0  # momentum moved them
    value = model(x).detach()
    with torch.no_grad():
        adapter.a[gone], adapter.b[gone] = 7.0, -3.0
    assert torch.equal(model(x), value)


def test_each_step_looks_once_though_every_batch_of_it_asks():
    model, adapter = reselecting([10, 5, 4, 3], threshold=0.8)
    model.step(5)
    once = {n: t.clone() for n, t in adapter.state_dict().items()}
    assert int(once["live"].sum()) == 2
    model.step(5)
    assert all(torch.equal(once[n], t) for n, t in adapter.state_dict().items())
    model.step(10)  # 10 has 0.8 of the energy of 10 and 5
    assert int(adapter.live.sum()) == 1
    assert adapter.a_folded.flatten(1).any(1).tolist() == [False, True, True, True]


def test_a_reselected_file_loads(tmp_path):
    model, _ = reselecting([10, 5, 1, 0.5])
    model.step(5)
    model.save(tmp_path / "a.safetensors")
    arguments = {"rank_max": 4, "combine": "energy", "reselect_every": 5}
    other: Any = adapt(with_spectrum([9, 8, 7, 6, 5, 4]), SoKA(rank_min=2, threshold=0.1, **arguments))
    assert len(other.bank["default"]["model"].a) == 2
    other.load(tmp_path / "a.safetensors")
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))
    assert other.bank["default"]["model"].live.tolist() == [True, True, False, False]


def test_products_that_are_not_finite_are_one_line():
    model, adapter = reselecting([10, 5, 1])
    with torch.no_grad():
        adapter.b[0, 0, 0] = torch.inf
    with pytest.raises(WorkError, match="the products at model hold numbers that are not finite"):
        model.step(5)


def test_divided_factors_are_refused_at_the_first_step():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, adapter = reselecting([10, 5, 1])
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        divided = distribute_tensor(adapter.a.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        adapter.a = nn.Parameter(divided)
        with pytest.raises(RequestError, match="SoKA's reselect_every needs whole factors"):
            model.step(0)
    finally:
        distributed.destroy_process_group()


def test_a_resumed_run_reselects_as_the_uninterrupted_one(tmp_path):
    from shared.training import Engine, Optimiser, fit
    from tests.shared.training.problem import Data, Head, Line
    from tests.shared.training.test_fit import Interrupted, interrupt

    def task() -> Line:
        torch.manual_seed(3)
        method = SoKA(rank_min=1, rank_max=4, threshold=0.8, combine="energy", reselect_every=2)
        host = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        return Line(adapt(host, method, head=Head(16, 1)), Optimiser(learning_rate=0.05, weight_decay=0.0))

    def run(made: Line, output, seed: int, **more) -> dict[str, Any]:
        torch.manual_seed(seed)
        fit(made, Data(noisy=True), Engine(epochs=3, accumulate=2), output, **more)
        return torch.load(output / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    whole = run(task(), tmp_path / "whole", 11)
    with pytest.raises(Interrupted):
        run(interrupt(task(), epoch=2), tmp_path / "cut", 11)
    again = run(task(), tmp_path / "cut", 99, resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert int(whole["adapter.default.0.reselected"]) == 8  # of 9 steps, of which 6 came before the interruption
    assert not whole["adapter.default.0.live"].all()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "SoKA threshold 0.0: use a share of the energy above 0, at most 1"),
        ({"threshold": 1.1}, "SoKA threshold 1.1"),
        ({"rank_min": 0}, "SoKA ranks 0 to 8: use 1 <= rank_min <= rank_max"),
        ({"rank_min": 3, "rank_max": 2}, "SoKA ranks 3 to 2"),
        ({"rank_min": 9, "rank_max": 9}, "rank 9 at model: factors .* have 1 to 8 products"),
        ({"combine": "mean"}, "SoKA combine 'mean': use one of min, max, energy, elbow"),
        ({"source": "thin air"}, "SoKA source 'thin air'"),
        ({"source": "update"}, "SoKA source 'update', update None: use weight, gradient, or update with a file"),
        ({"update": "full.safetensors"}, "SoKA source 'weight', update 'full.safetensors'"),
        ({"factors": (4, 4)}, "factors of 4 x 4 at model: they do not divide its matrix 6 x 20"),
        ({"factors": (0, 4)}, "factors of 0 x 4 at model"),
        ({"factors": (2,)}, "SoKA batches 16, factors .2,.: at least 1, and two numbers"),
        ({"batches": 0}, "SoKA batches 0"),
        ({"reselect_every": 0}, "SoKA reselect_every 0: use at least 1 step, or None"),
        ({"roles": "mlp.up"}, "has no site with role 'mlp.up'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        model_of(nn.Linear(20, 6), **{"factors": (2, 4), **arguments})


def test_a_weight_that_is_not_finite_is_refused():
    linear = nn.Linear(4, 4)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(RequestError, match="what is decomposed at model holds numbers that are not finite"):
        model_of(linear)


def test_a_prime_side_is_told(caplog):
    model = model_of(nn.Linear(7, 6))
    assert "SoKA: model: 6 x 7 has a prime side: factors (2, 3, 1, 7)" in caplog.text
    assert model.bank["default"]["model"].a.shape[1:] == (2, 1)
