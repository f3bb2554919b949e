"""Latency by form: what each form runs, and that a slow adapter shows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from shared.adapted import adapt
from shared.adapter import Adapter
from shared.latency import first, latency
from shared.method import Method
from shared.methods import LoRA
from shared.sites import Site, Sites, describe
from shared.taxonomy import Record

X = torch.randn(4, 8)


class Task(nn.Module):
    """Runs a model on ``x`` and remembers in which state."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def outputs(self, batch: dict[str, Any]):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.append((self.model.active, self.model.state.form, bool(self.model.state.merged)))
        return self.model(batch["x"])


class Sleeping(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, base, *args, **kwargs):
        time.sleep(0.02)
        return base(*args, **kwargs) + self.shift


@dataclass(frozen=True, kw_only=True)
class Slow(Method):
    record: ClassVar[Record] = Record(
        categories=("reference",), acts_on="activations", form="sequential", mergeable="no", trains="8"
    )

    def sites(self, sites: Sites) -> Sites:
        return sites.select("linear")

    def build(self, site: Site) -> Sleeping:
        return Sleeping()


def task(method: Method) -> Task:
    linear = nn.Linear(8, 8)
    return Task(adapt(linear, method, sites=describe(linear), example=(X,)))


def test_every_form_is_what_its_name_says_and_the_model_is_left_as_it_was():
    one = task(LoRA(rank=2, roles="linear")).train()
    with torch.no_grad():
        for parameter in one.model.trainable().values():
            parameter.normal_()
    before = {n: p.clone() for n, p in one.model.backbone.state_dict().items()}
    found = latency(one, {"x": X}, rounds=2, calls=2)
    assert list(found) == ["bare", "separate", "folded", "merged"]
    assert all(0 < seconds < 1 for seconds in found.values())
    turn = [((), "auto", False)] * 3 + [(("default",), "separate", False)] * 3
    turn += [(("default",), "auto", False)] * 3 + [(("default",), "auto", True)] * 3
    assert one.seen == turn + turn[3:] + turn[:3]
    assert one.training
    assert one.model.active == ("default",)
    assert not one.model.state.merged
    assert all(torch.equal(before[n], p) for n, p in one.model.backbone.state_dict().items())


def test_a_slow_adapter_shows_and_does_not_merge():
    found = latency(task(Slow()), {"x": X}, rounds=2, calls=2)
    assert set(found) == {"bare", "separate", "folded"}
    assert found["bare"] < 0.01
    assert found["folded"] == pytest.approx(found["separate"], rel=0.5)
    assert found["folded"] > 0.02


def test_first_takes_samples_of_tensors_and_of_lists():
    assert first({"x": X, "name": ["a", "b"], "count": 3}, 1)["name"] == ["a"]
    assert torch.equal(first({"x": X}, 2)["x"], X[:2])
