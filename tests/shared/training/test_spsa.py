"""SPSA with gradient correction: its estimates, its steps against hand calculation, and whole trainings by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import RequestError, WorkError
from shared.training import SPSA, Engine, fit
from shared.training.spsa import assign
from tests.shared.training.problem import Data, Line, line
from tests.shared.training.test_fit import Interrupted, interrupt
from tests.shared.training.test_resume import checkpoint, same


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_directions_are_of_size_a_half_to_one_and_of_either_sign():
    draws = SPSA(repeats=4).draws(5000, generator())
    assert draws.shape == (4, 5000)
    assert 0.5 <= float(draws.abs().min()) < 0.501
    assert 0.999 < float(draws.abs().max()) <= 1
    assert abs(float((draws > 0).float().mean()) - 0.5) < 0.02
    assert torch.equal(draws, SPSA(repeats=4).draws(5000, generator()))


def test_every_repeat_gives_the_slope_along_its_own_direction():
    """On L = k . w each repeat has sum_i d_i g_i = P * (k . d)."""
    slope, weights = torch.randn(30, dtype=torch.float64), nn.Parameter(torch.randn(30, dtype=torch.float64))
    spsa = SPSA(repeats=1)
    for seed in range(5):
        draws = spsa.draws(30, generator(seed)).double()
        gradient, _ = spsa.estimate(lambda: slope @ weights, [weights], 0, draws)
        assert float(draws[0] @ gradient) == pytest.approx(30 * float(slope @ draws[0]), rel=1e-8)


def test_the_mean_over_repeats_is_what_is_estimated():
    slope, weights = torch.randn(6, dtype=torch.float64), nn.Parameter(torch.randn(6, dtype=torch.float64))
    draws = SPSA(repeats=3).draws(6, generator()).double()
    whole, _ = SPSA().estimate(lambda: slope @ weights, [weights], 0, draws)
    single = [SPSA().estimate(lambda: slope @ weights, [weights], 0, draws[i : i + 1])[0] for i in range(3)]
    assert torch.allclose(whole, torch.stack(single).mean(0))


def test_one_step_by_hand():
    """w = 1, L = w^2, d = 1: the estimate is 2, a_1 = 0.01 / 2^0.4, and w becomes 1 - a_1 (2 + 0.9 * 2)."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    spsa = SPSA(a=0.01, c=0.01, o=1.0, alpha=0.4, gamma=0.1, momentum=0.9)
    moves, schedule = spsa.over([weight])
    gradient, loss = spsa.estimate(lambda: weight.square().sum(), [weight], 0, torch.ones(1, 1, dtype=torch.float64))
    assert float(gradient) == pytest.approx(2, abs=1e-9)
    assert float(loss) == pytest.approx(1 + 0.01**2)
    assert moves.param_groups[0]["lr"] == pytest.approx(0.0075786, abs=1e-7)
    assign(gradient, [weight])
    moves.step()
    schedule.step()
    assert weight.item() == pytest.approx(0.97120, abs=1e-5)
    assert moves.param_groups[0]["lr"] == pytest.approx(0.01 / 3**0.4)
    assert spsa.width(1) == pytest.approx(0.01 / 2**0.1)


def test_an_estimate_leaves_weights_as_they_were_and_asks_for_no_gradient():
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    before, asked = [w.detach().clone() for w in weights], []

    def loss() -> Tensor:
        asked.append(torch.is_grad_enabled())
        assert not any(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        return weights[0].sum() + weights[1].square().sum()

    SPSA().estimate(loss, weights, 0, SPSA(repeats=5).draws(10, generator()))
    assert asked == [False] * 10  # twice the repeats
    assert all(torch.equal(w, b) and w.grad is None for w, b in zip(weights, before, strict=True))
    with pytest.raises(ZeroDivisionError):
        SPSA().estimate(lambda: torch.tensor(1 / 0), weights, 0, SPSA().draws(10, generator()))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def calls_to_reach(goal: float, momentum: float, seed: int) -> int:
    """Evaluations of a noisy bowl until its true value is below ``goal``."""
    noise, draws = generator(seed), generator(seed + 100)
    scale, weights = torch.linspace(0.2, 1, 20), nn.Parameter(torch.ones(20))
    spsa = SPSA(a=0.01, c=0.05, momentum=momentum, repeats=1)
    moves, schedule = spsa.over([weights])

    def bowl() -> Tensor:
        return (scale * weights.square()).sum() + 0.01 * torch.randn((), generator=noise)

    for step in range(3000):
        if float((scale * weights.detach().square()).sum()) < goal:
            return 2 * step
        moves.zero_grad()
        assign(spsa.estimate(bowl, [weights], step, spsa.draws(20, draws))[0], [weights])
        moves.step()
        schedule.step()
    return 6000


def test_the_correction_needs_fewer_calls_than_plain_spsa():
    for seed in range(3):
        corrected, plain = (calls_to_reach(1.2, momentum, seed) for momentum in (0.9, 0.0))
        assert corrected < 0.5 * plain


# -- in the engine -------------------------------------------------------------------------------------------------


def by_values(**more: Any) -> Line:
    torch.manual_seed(0)
    task = line()
    task.optimiser = SPSA(**{"a": 3e-4, "c": 0.001, "repeats": 4, **more})
    return task


def train(task: Line, output: Path, seed: int = 11, **more: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    engine = Engine(**{"epochs": 4, "device": "cpu", **more.pop("engine", {})})
    return fit(task, Data(), engine, output, **more)


def test_a_weight_adapter_learns_by_values_alone(tmp_path):
    """LoRA too: what is folded without gradients is folded anew for every perturbation."""
    task = by_values(a=1e-3, momentum=0.0)
    start = {n: t.clone() for n, t in task.model.trained_state().items()}
    found = train(task, tmp_path, engine={"epochs": 30})
    assert found["steps"] == 150
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("validation/loss")
    losses = [float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]]
    assert losses[-1] < 0.95 * losses[0]
    assert all(not torch.equal(t, start[n]) for n, t in task.model.trained_state().items())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    train(by_values(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(interrupt(by_values(), epoch=2), tmp_path / "parts")
    assert checkpoint(tmp_path / "parts")["global_step"] == 10
    train(by_values(), tmp_path / "parts", seed=99, resume=True)
    ours, theirs = (checkpoint(tmp_path / name) for name in ("parts", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops"):
        assert same(ours[part], theirs[part]), part
    kept = ours["optimizer_states"][0]["state"]
    assert kept
    assert all(bool(state["momentum_buffer"].any()) for state in kept.values())


def test_accumulated_batches_draw_anew_and_are_averaged(tmp_path):
    seen, task = [], by_values()
    estimate = SPSA.estimate

    class Watched(SPSA):
        def estimate(self, loss, parameters, step, draws):
            seen.append((step, draws))
            return estimate(self, loss, parameters, step, draws)

    task.optimiser = Watched(repeats=1)
    train(task, tmp_path, engine={"epochs": 1, "accumulate": 2})
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2]
    assert len({tuple(draws.flatten().tolist()) for _, draws in seen}) == 5


def test_a_loss_that_never_moves_is_an_error(tmp_path):
    task = by_values()
    task.loss = lambda batch: torch.ones(())  # type: ignore[method-assign]
    with pytest.raises(WorkError, match="no gradient reaches"):
        train(task, tmp_path)


def test_a_loss_that_is_not_a_number_is_an_error(tmp_path):
    task = by_values()
    task.loss = lambda batch: torch.tensor(float("nan"))  # type: ignore[method-assign]
    with pytest.raises(WorkError, match="the training loss is nan at step 0"):
        train(task, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": 0.0}, "optimiser.a 0.0: use a number above 0"),
        ({"c": float("inf")}, "optimiser.c inf: use a number above 0"),
        ({"alpha": -1.0}, "optimiser.alpha -1.0: use a number of at least 0"),
        ({"momentum": 1.0}, "momentum 1.0 and repeats 5"),
        ({"repeats": 0}, "repeats 0"),
    ],
)
def test_a_wrong_setting_is_named(wrong, message):
    with pytest.raises(RequestError, match=message):
        SPSA(**wrong)
