"""Methods that start from data, draw once a step, or train on more than one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn

from shared.adapted import adapt
from shared.adapter import WeightAdapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record


class Shift(WeightAdapter):
    towards: Tensor

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.amount = nn.Parameter(torch.zeros(()))
        self.register_buffer("towards", torch.ones(shape))
        self.drawn: list[int] = []

    def delta(self, weight: Tensor) -> Tensor:
        return self.amount * self.towards


@dataclass(frozen=True, kw_only=True)
class Prepared(Method):
    """Moves a weight along the mean gradient of the task, found before training."""

    record: ClassVar[Record] = Record(
        categories=("additive/other",), acts_on="weights", form="parallel", mergeable="yes", trains="1", needs="labels"
    )

    def sites(self, sites: Sites) -> Sites:
        return sites.select("linear")

    def build(self, site: Site) -> Shift:
        return Shift(site.weight.shape)

    def prepare(self, model: Any, name: str, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        for adapter in model.bank[name].values():
            adapter.towards.fill_(sum(float(loss(batch).detach()) for batch in batches))

    def step(self, adapters: Mapping[str, nn.Module], number: int, generator: Generator) -> None:
        for adapter in adapters.values():
            adapter.drawn.append(int(torch.randint(1000, (), generator=generator)))  # type: ignore[union-attr]

    def loss(self, task: Any, batch: Any) -> Tensor:
        return 2 * task.loss(batch)


class Double:
    def loss(self, batch: Tensor) -> Tensor:
        return batch.sum()


@pytest.fixture
def model() -> Any:
    return adapt(nn.Sequential(nn.Linear(3, 2)), Prepared(), example=(torch.randn(2, 3),))


def test_an_unprepared_adapter_does_not_train(model):
    with pytest.raises(RequestError, match=r"adapter 'default' \(Prepared\) starts from data: call prepare"):
        model.trainable()
    assert model.count()["adapter"] == 1  # what it will train can be counted
    model.prepare([torch.ones(2), torch.ones(3)], lambda batch: batch.sum())
    assert list(model.trainable()) == ["adapter.default.0.amount"]
    assert torch.equal(model.bank["default"]["0"].towards, torch.full((2, 3), 5.0))


@dataclass(frozen=True, kw_only=True)
class PreparedOrNot(Prepared):
    """Starts from data only where it is asked to."""

    from_data: bool = True

    def starts_from_data(self) -> bool:
        return self.from_data


def test_a_setting_may_say_whether_a_method_starts_from_data():
    for from_data, waiting in ((True, ["default"]), (False, [])):
        method = PreparedOrNot(from_data=from_data)
        model = adapt(nn.Sequential(nn.Linear(3, 2)), method, example=(torch.randn(2, 3),))
        assert model.unprepared() == waiting


def test_preparing_happens_once_and_a_file_brings_it(model, tmp_path):
    model.prepare([torch.ones(2)], lambda batch: batch.sum())
    model.prepare([torch.ones(7)], lambda batch: batch.sum())
    assert torch.equal(model.bank["default"]["0"].towards, torch.full((2, 3), 2.0))
    model.save(tmp_path / "a.safetensors")
    other = adapt(nn.Sequential(nn.Linear(3, 2)), Prepared(), example=(torch.randn(2, 3),))
    other.load(tmp_path / "a.safetensors", other_backbone=True)
    assert other.unprepared() == []
    assert torch.equal(other.bank["default"]["0"].towards, torch.full((2, 3), 2.0))
    model.remove()
    model.add(Prepared(), example=(torch.randn(2, 3),))
    assert model.unprepared() == ["default"]


def test_what_a_step_draws_follows_from_the_run_and_the_step(model):
    adapter = model.bank["default"]["0"]
    for seed, number in ((1, 0), (1, 1), (1, 0), (2, 0)):
        torch.rand(3)  # whatever else is drawn
        model.step(number, seed)
    first, second, again, other = adapter.drawn
    assert first == again
    assert len({first, second, other}) == 3


def test_the_method_has_the_say_over_the_loss(model):
    assert float(model.loss(Double(), torch.ones(4))) == 8
    with model.disabled():
        assert float(model.loss(Double(), torch.ones(4))) == 4
