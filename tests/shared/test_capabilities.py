"""The capability matrix: what every method must do on every host it is meant for.

A method joins by existing: with no file in ``capabilities`` it is tried as it is on the ViT. There, ``HOSTS`` names the
hosts and the arguments to try on each, ``EXCLUDED`` what it cannot do and why, ``ABSENT`` why it is not tried at all;
``before(model)`` adds what has to be in the model first.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shared import catalog, half, recompute, taxonomy
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.memory import Saving
from tests.shared.hosts import HOSTS


def told(method: str, what: str, otherwise):
    """What the method's own file in ``capabilities`` says."""
    try:
        file = importlib.import_module(f"tests.shared.capabilities.{catalog.fold(method)}")
    except ModuleNotFoundError:
        return otherwise
    return getattr(file, what, otherwise)


def settings(method: str) -> dict[str, dict]:
    return told(method, "HOSTS", {"vit": {}})


def excluded(method: str) -> dict[str, str]:
    """Capabilities not asked of the method, with the reason; merging follows from its record."""
    record = catalog.find(method, "method").record
    assert record is not None
    merging = {
        "yes": {"merge_refused": "merges"},
        "no": dict.fromkeys(("folded_separate_merged", "unmerge_exact"), "acts on activations: nothing to merge"),
        "conditional": {},
    }[record.mergeable]
    return merging | told(method, "EXCLUDED", {})


CAPABILITIES = {}


def capability(function):
    CAPABILITIES[function.__name__] = function
    return function


def cases() -> list[tuple[str, str]]:
    methods = [entry.name for entry in catalog.entries("method") if not told(entry.name, "ABSENT", "")]
    return [(method, host) for method in methods for host in settings(method)]


class Case:
    """A method on a host, fresh: the model, its inputs, and the bare output."""

    def __init__(self, method: str, host: str):
        torch.manual_seed(1)
        self.backbone, self.inputs, self.sites = HOSTS[host]()
        self.backbone.eval()
        self.method = catalog.find(method, "method").load()(**settings(method)[host])
        self.bare = out(self.backbone, self.inputs)
        # torch's own attention takes a fused path without gradients and another with them.
        self.bare_with_gradients = rows(self.backbone(*self.inputs)).detach()
        self.host, self.model = host, Adapted(self.backbone, sites=self.sites)
        told(method, "before", lambda model: None)(self.model)
        self.model.add(self.method, example=self.inputs)
        self.model.prepare([self.inputs], lambda batch: rows(self.model(*batch)).square().mean())
        # What is folded or merged on weights is the same tensor; a merged function only computes the same.
        self.same = torch.equal if self.method.record.acts_on == "weights" else close

    def perturb(self, name: str = "default", seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.bank[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return self


def out(model: Callable[..., Any], inputs: tuple[Tensor, ...], **more) -> Tensor:
    """All floating-point outputs without gradient, as rows of one (batch, -1) tensor."""
    with torch.no_grad():
        return rows(model(*inputs, **more))


def rows(output) -> Tensor:
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.flatten(1) for t in leaves], dim=1)


def close(a: Tensor, b: Tensor, limit: float = 2e-5) -> bool:
    return float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


@capability
def identity_at_start(case: Case) -> None:
    assert torch.equal(out(case.model, case.inputs), case.bare)
    case.model.train()
    # Which of torch's attention kernels runs depends on what asks for gradients: equal within rounding.
    assert close(rows(case.model(*case.inputs)).detach(), case.bare_with_gradients, 1e-6)


@capability
def changes_the_output(case: Case) -> None:
    assert not close(out(case.perturb().model, case.inputs), case.bare, 1e-3)


@capability
def training_equals_inference(case: Case) -> None:
    case.perturb().model.eval()
    assert close(rows(case.model(*case.inputs)).detach(), out(case.model, case.inputs))


@capability
def folded_separate_merged(case: Case) -> None:
    folded = out(case.perturb().model.eval(), case.inputs)
    case.model.state.form = "separate"
    separate, trained = out(case.model, case.inputs), rows(case.model(*case.inputs)).detach()
    case.model.state.form = "auto"
    case.model.merge()
    merged = out(case.model, case.inputs)
    assert close(separate, folded)
    assert close(trained, folded)
    assert case.same(merged, folded)


@capability
def unmerge_exact(case: Case) -> None:
    before = copy.deepcopy(case.backbone.state_dict())
    folded = out(case.perturb().model.eval(), case.inputs)
    for _ in range(3):
        case.model.merge()
        with case.model.disabled():
            assert torch.equal(out(case.model, case.inputs), case.bare)
        assert case.same(out(case.model, case.inputs), folded)  # still merged after the block
        case.model.unmerge()
    after = case.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(out(case.model, case.inputs), folded)


@capability
def merge_refused(case: Case) -> None:
    before = copy.deepcopy(case.backbone.state_dict())
    with pytest.raises(RequestError, match="cannot be merged: it acts on activations"):
        case.model.merge()
    assert all(torch.equal(before[n], t) for n, t in case.backbone.state_dict().items())


@capability
def disable_and_remove_restore(case: Case) -> None:
    case.perturb()
    with case.model.disabled():
        assert torch.equal(out(case.model, case.inputs), case.bare)
    for name in reversed(list(case.model.methods)):
        case.model.remove(name)
    assert torch.equal(out(case.backbone, case.inputs), case.bare)
    assert not any("_port" in m.__dict__ for m in case.backbone.modules())
    fresh, _, _ = HOSTS[case.host]()
    assert [type(m) for m in case.backbone.modules()] == [type(m) for m in fresh.modules()]


@capability
def keys_and_types_kept(case: Case) -> None:
    fresh, _, _ = HOSTS[case.host]()
    assert list(case.backbone.state_dict()) == list(fresh.state_dict())
    for ours, theirs in zip(case.backbone.modules(), fresh.modules(), strict=True):
        assert isinstance(ours, type(theirs))


@capability
def gradient_reaches_exactly_the_adapter(case: Case) -> None:
    case.perturb().model.train()
    rows(case.model(*case.inputs)).square().sum().backward()
    trained = case.model.trainable()
    assert set(trained) == {f"adapter.{n}" for n, _ in case.model.bank.named_parameters()}
    assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in trained.values())
    assert all(p.grad is None and not p.requires_grad for p in case.backbone.parameters())
    assert not any(m.training for m in case.backbone.modules())


@capability
def save_and_load(case: Case, tmp_path) -> None:
    folded = out(case.perturb().model.eval(), case.inputs)
    case.model.save(tmp_path / "a.safetensors", metrics={"score": 0.5})
    other = Case(type(case.method).__name__, case.host).model
    header = other.load(tmp_path / "a.safetensors")
    assert header["metrics"] == {"score": 0.5}
    assert torch.equal(out(other.eval(), case.inputs), folded)


@capability
def ten_adapters_switch(case: Case) -> None:
    case.model.eval()
    for i in range(9):
        case.model.add(case.method, name=f"n{i}")
    names = ["default", *(f"n{i}" for i in range(9))]
    outputs = {}
    for i, name in enumerate(names):
        case.perturb(name, seed=i).model.activate(name)
        outputs[name] = out(case.model, case.inputs)
    assert all(not close(outputs[a], outputs[b], 1e-4) for a, b in itertools.pairwise(names))
    for name in reversed(names):
        case.model.activate(name)
        assert torch.equal(out(case.model, case.inputs), outputs[name])
    case.model.remove("n3")
    case.model.activate("n7")
    assert torch.equal(out(case.model, case.inputs), outputs["n7"])
    case.model.activate()
    assert torch.equal(out(case.model, case.inputs), case.bare)


@capability
def per_sample_equals_row_by_row(case: Case) -> None:
    case.model.eval()
    case.model.add(case.method, name="other")
    case.perturb("default", 0).perturb("other", 1)
    names = ["other", None, "default"]
    together = out(case.model, case.inputs, adapters=names)
    for i, name in enumerate(names):
        case.model.activate(*([name] if name else []))
        alone = out(case.model, tuple(t[i : i + 1] for t in case.inputs))
        assert close(together[i : i + 1], alone)


@capability
def compiles_without_a_break(case: Case) -> None:
    case.perturb().model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    assert close(rows(compiled(*case.inputs)).detach(), rows(case.model(*case.inputs)).detach())
    assert close(out(compiled, case.inputs), out(case.model, case.inputs))


@capability
def copies_and_pickles(case: Case) -> None:
    folded = out(case.perturb().model.eval(), case.inputs)
    twin = copy.deepcopy(case.model)
    again = pickle.loads(pickle.dumps(case.model))
    for model in (twin, again):
        assert torch.equal(out(model, case.inputs), folded)
        model.state.active = ()
        assert torch.equal(out(model, case.inputs), case.bare)
    assert torch.equal(out(case.model, case.inputs), folded)  # the copies share nothing with it


@capability
def batch_of_one(case: Case) -> None:
    whole = out(case.perturb().model.eval(), case.inputs)
    one = tuple(t[:1] for t in case.inputs)
    assert close(out(case.model, one), whole[:1])
    rows(case.model(*one)).sum().backward()
    assert all(p.grad is not None for p in case.model.trainable().values())


@capability
def recomputing_changes_no_bit(case: Case) -> None:
    """Of gradients, of what the adapters count, and of the extra loss; dropout and draws for a step included."""
    if not any(site.role == "block" for site in case.model.sites()):
        with pytest.raises(RequestError, match="describes no blocks"):
            recompute.blocks(case.model)
        return
    twin = copy.deepcopy(case.perturb().model)
    twin.recompute = True
    kept, again = (training_step(model, case.inputs) for model in (case.model, twin))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[n], again[n]) for n in kept)


def training_step(model, inputs) -> dict[str, Tensor]:
    """Gradients, buffers and losses of a step with codes for what is saved for backward of 8 bits."""
    model.train().saving = Saving(bits=8)
    model.step(3, 7)
    torch.manual_seed(5)
    loss, extra = rows(model(*inputs)).square().sum(), model.penalty()
    (loss + extra).backward()
    gradients = {n: p.grad for n, p in model.trainable().items() if p.grad is not None}
    assert gradients
    return gradients | dict(model.bank.named_buffers()) | {"loss": loss.detach(), "extra": extra.detach()}


@capability
def half_precision_is_near(case: Case) -> None:
    """With the frozen products in bfloat16: outputs in float32 and near, in training as in inference; gradients too."""
    model, inputs = case.perturb().model.eval(), case.inputs
    before, weights = model.fingerprint, torch.randn(case.bare.shape, generator=torch.Generator().manual_seed(4))

    def found() -> list[Tensor]:
        """The output without gradients, the output with them, and all of them in one tensor."""
        inferred, trained = out(model, inputs).float(), rows(model(*inputs)).float()
        gradients = torch.autograd.grad((trained * weights).sum(), list(model.trainable().values()))
        assert all(g.dtype == torch.float32 for g in gradients)
        return [inferred, trained.detach(), torch.cat([g.flatten() for g in gradients])]

    exact = found()
    with torch.autocast("cpu", torch.bfloat16):  # what mixed precision makes of float32 weights
        mixed = found()
    half.halve(model)
    assert model.fingerprint == before
    assert out(model, inputs).dtype == torch.float32
    for right, usual, ours in zip(exact, mixed, found(), strict=True):
        size, error = float(right.norm()), float((usual - right).norm())
        if error < 0.5 * size:  # else the function is one that no rounding comes near
            assert float((ours - right).norm()) <= 1.5 * error + 0.05 * size  # a rectifier may switch


@capability
def trains_what_its_record_says(case: Case) -> None:
    record = catalog.find(type(case.method).__name__, "method").record
    assert record is not None
    assert case.model.count()["adapter"] == taxonomy.count(record, case.method, case.method.sites(case.model.sites()))


# torch's own notice while it compiles the activation of BLOOM, an autograd function of the library.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize(("method", "host"), cases())
def test_capability(method: str, host: str, name: str, tmp_path) -> None:
    if reason := excluded(method).get(name):
        pytest.skip(reason)
    case = Case(method, host)
    function = CAPABILITIES[name]
    if "tmp_path" in function.__code__.co_varnames[: function.__code__.co_argcount]:
        function(case, tmp_path)
    else:
        function(case)


def test_the_matrix_knows_its_size() -> None:
    methods = {entry.name for entry in catalog.entries("method")}
    absent = {method for method in methods if told(method, "ABSENT", "")}
    files = {path.stem for path in (Path(__file__).parent / "capabilities").glob("*.py")} - {"__init__"}
    assert files <= {catalog.fold(method) for method in methods}
    assert methods == {method for method, _ in cases()} | absent
    assert all(excluded(method).keys() <= CAPABILITIES.keys() and all(excluded(method).values()) for method in methods)
    assert len(CAPABILITIES) == 18
    assert len(cases()) >= 8


def test_the_matrix_can_fail() -> None:
    """A method whose adapter is not the identity at the start is caught."""
    case = Case("LoRA", "attention")
    case.perturb()
    with pytest.raises(AssertionError):
        identity_at_start(case)
