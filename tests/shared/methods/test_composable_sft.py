"""LT-SFT: selection, rewinding, sparse phase, composition, files (its spec's "What must hold")."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shared import sparse_diff
from shared.adapted import adapt
from shared.errors import RequestError, WorkError
from shared.methods.composable_sft import ComposableSFT, change, load_official, save_official, select
from shared.sites import describe, every_parameter
from shared.store import read_header
from tests.parity.__main__ import difference
from tests.shared.hosts import HOSTS
from tests.shared.training.problem import Data, Head, Line

X, Y = torch.randn(64, 6), torch.randn(64, 3)
PAIR = [(X, Y)]


def model_of(method: ComposableSFT | None = None, head: bool = True, seed: int = 0):
    torch.manual_seed(seed)
    host = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    made = method or ComposableSFT(count=20, epochs=30, learning_rate=1e-2)
    model = adapt(host, made, head=Head(4, 3) if head else None, example=(X,))
    return model, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def train(model, loss, steps: int = 40, batches=PAIR) -> float:
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimiser.zero_grad()
        value = loss(batches[step % len(batches)])
        value.backward()
        optimiser.step()
    return value.item()


def deltas(model, name: str = "default") -> dict[str, Any]:
    return dict(model.bank[name].items())


def set_delta(model, name: str, key: str, value: Tensor) -> None:
    delta = deltas(model, name)[key]
    with torch.no_grad():
        delta.value.copy_(value)
        delta.value_mask.copy_(value != 0)


def test_the_published_numbers_come_out(materials):
    assert difference(materials / "golden" / "composable_sft.npz") == 0


def test_the_worked_example():
    diff = torch.zeros(2, 3)
    diff[0, 1], diff[1, 2] = 0.5, -2.0
    entry = sparse_diff.encode(diff)
    assert entry["index_steps"] == [2, 3]
    assert entry["values"].tolist() == [0.5, -2.0]
    assert tuple(entry["size"]) == (2, 3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]))
def test_encoding_and_decoding_give_the_same(shape, seed, density):
    drawn = torch.Generator().manual_seed(seed)
    diff = torch.randn(shape, generator=drawn) * (torch.rand(shape, generator=drawn) < density)
    diff[diff.abs() <= 1e-7] = 0
    assert torch.equal(sparse_diff.decode(sparse_diff.encode(diff)), diff)


def test_exactly_k_entries_train_from_where_everything_began():
    model, loss = model_of()
    head = {n: t.clone() for n, t in model.head.state_dict().items()}
    frozen = {n: t.clone() for n, t in model.backbone.state_dict().items()}
    model.train()
    bare = model.backbone(X).detach()
    model.prepare(PAIR, loss)
    assert torch.equal(model.backbone(X), bare)
    assert all(torch.equal(t, head[n]) for n, t in model.head.state_dict().items())
    assert sum(int(d.value_mask.sum()) for d in deltas(model).values()) == 20
    assert not any(d.value.any() for d in deltas(model).values())
    assert all(p.grad is None for p in model.parameters())
    before = loss(PAIR[0]).item()
    assert train(model, loss) < before
    moved = 0
    for key, delta in deltas(model).items():
        module, _, parameter = key.partition(":")
        ours, theirs = (
            getattr(model.backbone[int(module)], parameter or "weight"),
            frozen[f"{module}.{parameter or 'weight'}"],
        )
        assert torch.equal(ours[~delta.value_mask], theirs[~delta.value_mask])
        moved += int((ours != theirs).sum())
    assert moved == 20
    assert all(torch.equal(t, frozen[n]) for n, t in model.backbone.state_dict().items())
    assert not torch.equal(model.head.weight, head["weight"])


def test_the_selection_is_the_largest_changes_of_the_full_phase():
    """The full phase written out: AdamW, a rate that falls to zero, the norm of the gradient at most 1."""
    model, _ = model_of()
    torch.manual_seed(0)
    plain, head = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4, bias=False)), Head(4, 3)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    moving = [p for n, p in plain.named_parameters() if not n.startswith("1.")] + list(head.parameters())
    optimiser = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.0)
    for step in range(30):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / 30)
        optimiser.zero_grad()
        nn.functional.mse_loss(head(plain(X), ()), Y).backward()
        nn.utils.clip_grad_norm_(moving, 1.0)
        optimiser.step()
    model.prepare(PAIR, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
    names = ("0.weight", "0.bias", "3.weight")
    expected = select([dict(plain.named_parameters())[n].detach() - start[n] for n in names], 20)
    for key, mask in zip(("0", "0:bias", "3"), expected, strict=True):
        assert torch.equal(deltas(model)[key].value_mask, mask)


def test_norms_and_the_output_embedding_stay():
    backbone, _, sites = HOSTS["bert"]()
    chosen = ComposableSFT().sites(sites)
    assert not any("LayerNorm" in site.path for site in chosen)
    names = {f"{s.path}.{s.parameter}" for s in chosen}
    rest = {n for n, _ in backbone.named_parameters()} - names
    assert rest
    assert all("LayerNorm" in n for n in rest)
    assert {"model.embeddings.word_embeddings.weight", "model.encoder.layer.1.output.dense.bias"} <= names

    from modalities.language.backbones import SmallLM

    with torch.device("meta"):
        small = SmallLM(lm_head=True)
    paths = {s.path for s in ComposableSFT().sites(small.sites())}
    assert "model.embed_tokens" in paths  # tied: its change leaves the head's copy as it is
    assert not any(path.startswith("lm_head") for path in paths)


def test_every_parameter_is_reached_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(3, 1), nn.BatchNorm1d(3))
    model.append(nn.Linear(3, 3, bias=False))
    model[3].weight = model[0].weight
    model.register_parameter("token", nn.Parameter(torch.zeros(3)))
    found = every_parameter(describe(model))
    assert len(found) == len(list(model.parameters()))
    assert {id(site.weight) for site in found} == {id(p) for p in model.parameters()}
    assert len({site.key for site in found}) == len(found)
    assert {site.path: site.role for site in found if site.parameter == "weight"}["2"] == "norm"


def test_two_changes_add_up_with_their_strengths_and_go_again():
    model, _ = model_of(head=False)
    model.add(ComposableSFT(count=5), name="task", example=(X,))
    weight = model.backbone[0]._parameters["weight"].detach().clone()
    one, two = torch.zeros(8, 6), torch.zeros(8, 6)
    one[0, 0], one[1, 2], two[1, 2], two[3, 3] = 1.0, 2.0, 0.25, -4.0  # they overlap at (1, 2)
    set_delta(model, "default", "0", one)
    set_delta(model, "task", "0", two)
    for names in (("default", "task"), ("task", "default")):
        model.activate(*names)
        assert torch.allclose(model.backbone[0].weight, weight + one + two, atol=1e-6)
        model.activate(*names, strength={"default": 0.5, "task": -2.0})
        assert torch.allclose(model.backbone[0].weight, weight + 0.5 * one - 2 * two, atol=1e-6)
    model.activate("default", "task")
    disjoint = (one != 0) & (two == 0)
    assert torch.equal(model.backbone[0].weight[disjoint], (weight + one)[disjoint])
    model.merge()
    assert torch.allclose(model.backbone[0]._parameters["weight"], weight + one + two, atol=1e-6)
    model.unmerge()
    model.activate()
    assert torch.equal(model.backbone[0].weight, weight)


def test_the_l1_term_pulls_every_entry_alike():
    model, _ = model_of(ComposableSFT(count=20, sparse_l1=0.3))
    total = sum(p.numel() for p in (*model.backbone.parameters(), *model.head.parameters()))
    set_delta(model, "default", "0", torch.randn(8, 6))
    (0.3 * change(model, "default")).backward()
    delta = deltas(model)["0"]
    assert torch.allclose(delta.value.grad, 0.3 * delta.value.sign() / total)

    class Task:
        def loss(self, batch: Any) -> Tensor:
            return torch.tensor(2.0)

    task: Any = Task()
    task.model = model
    expected = 2 + 0.3 * delta.value.abs().sum().item() / total
    assert model.loss(task, None).item() == pytest.approx(expected)


def test_its_file_holds_k_values_and_a_bit_for_every_entry(tmp_path):
    model, loss = model_of()
    model.prepare(PAIR, loss)
    train(model, loss)
    model.save(tmp_path / "a.safetensors")
    shapes = {n: t["shape"] for n, t in read_header(tmp_path / "a.safetensors")["tensors"].items()}
    assert sum(shape[0] for n, shape in shapes.items() if n.endswith(".value")) == 20
    other, _ = model_of()
    other.load(tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    from shared.training import Engine, Optimiser, fit
    from tests.shared.training.test_fit import Interrupted, interrupt

    def task() -> Line:
        torch.manual_seed(3)
        host = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        model = adapt(host, ComposableSFT(count=12, epochs=2, learning_rate=1e-2, sparse_l1=0.1), head=Head(16, 1))
        return Line(model, Optimiser(learning_rate=1e-2, weight_decay=0.0))

    def run(made: Line, output, seed: int, **more) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        random.seed(str(output))  # whatever else was drawn before
        fit(made, Data(noisy=True), Engine(epochs=3), output, **more)
        return torch.load(output / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    whole = run(task(), tmp_path / "whole", 11)
    with pytest.raises(Interrupted):
        run(interrupt(task(), epoch=2), tmp_path / "cut", 11)
    again = run(task(), tmp_path / "cut", 99, resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert int(sum(t.sum() for n, t in whole.items() if n.endswith("_mask"))) == 12


def published(path, names: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """As the published code writes it: the first step is a number of NumPy's."""
    diffs = {name: sparse_diff.encode(diff) for name, diff in names.items()}
    for entry in diffs.values():
        entry["index_steps"][:1] = [np.int64(step) for step in entry["index_steps"][:1]]
    torch.save({"diffs": diffs, "abs": whole}, path / "pytorch_diff.bin")


def test_a_published_file_loads_by_its_names(tmp_path):
    backbone, _, _ = HOSTS["bert"]()
    model = adapt(backbone, ComposableSFT(count=1), name="other", head=Head(16, 3))
    model.head.forward = lambda hidden, size: hidden.states  # type: ignore[method-assign]
    query, table = torch.zeros(16, 16), torch.zeros(50, 16)
    query[3, 5], table[7, 2] = 0.5, -1.5
    theirs = {
        "bert.encoder.layer.0.attention.self.query.weight": query,
        "bert.embeddings.word_embeddings.weight": table,
    }
    head = {"classifier.weight": torch.full((3, 16), 2.0), "classifier.bias": torch.ones(3)}
    published(tmp_path, theirs, head)
    before = model.head.weight.detach().clone()
    load_official(model, tmp_path, name="language", with_head=False)
    assert torch.equal(model.head.weight, before)
    load_official(model, tmp_path / "pytorch_diff.bin", name="task")
    assert torch.equal(model.head.weight, head["classifier.weight"])
    assert torch.equal(model.head.bias, head["classifier.bias"])
    layer = backbone.model.encoder.layer[0].attention.self.query
    assert torch.allclose(layer.weight, layer._parameters["weight"] + query)
    words = backbone.model.embeddings.word_embeddings
    assert torch.allclose(words.weight, words._parameters["weight"] + table)
    assert model.unprepared() == []
    assert sum(int(d.value_mask.sum()) for d in deltas(model, "task").values()) == 2

    save_official(model, tmp_path / "again.bin", name="task", prefix="bert.")
    diffs, whole = sparse_diff.read(tmp_path / "again.bin")
    assert {n for n, d in diffs.items() if d.any()} == set(theirs)
    assert all(torch.equal(diffs[n], theirs[n]) for n in theirs)
    assert torch.equal(whole["weight"], head["classifier.weight"])


def test_files_that_do_not_fit_change_nothing(tmp_path):
    backbone, _, _ = HOSTS["bert"]()
    model = adapt(backbone, ComposableSFT(count=1))
    for name, diff, message in (
        ("bert.nowhere.weight", torch.ones(2), "bert.nowhere.weight: the model has no such parameter"),
        ("bert.embeddings.word_embeddings.weight", torch.ones(2), r"shape \(2,\) where the model has \(50, 16\)"),
        ("bert.embeddings.LayerNorm.weight", torch.ones(16), "has no such parameter"),
    ):
        published(tmp_path, {name: diff}, {})
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path, name="new")
        assert model.active == ("default",)
    published(tmp_path, {}, {"classifier.weight": torch.ones(2, 2)})
    with pytest.raises(RequestError, match=r"classifier.weight \(2, 2\): the head has no one place for it; with_head"):
        load_official(model, tmp_path, name="new")
    bad = tmp_path / "bad.bin"
    for held, message in (
        ({"diffs": {"a": {"size": [2], "index_steps": [5], "values": torch.ones(1)}}}, "a: no sparse difference"),
        ({"diffs": {"a": {"size": [2], "index_steps": [0], "values": torch.tensor([np.nan])}}}, "no sparse difference"),
        ({"diffs": {"a": {"size": [2], "index_steps": [1, 0], "values": torch.ones(2)}}}, "no sparse difference"),
        ({"diffs": {}}, "holds no sparse difference"),
        ({"diffs": {"a": {"size": object}}}, "holds more than tensors and numbers"),
        ([1], "not a file of sparse differences"),
    ):
        torch.save(held, bad)
        with pytest.raises(RequestError, match=message):
            sparse_diff.read(bad)
    with pytest.raises(RequestError, match="no such file"):
        sparse_diff.read(tmp_path / "missing.bin")


def test_a_task_learnt_on_one_language_serves_another():
    """Inputs of two languages are the same meaning turned in two ways; labels exist in the first alone."""
    torch.manual_seed(1)
    host = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 16), nn.Tanh())
    model = adapt(host, ComposableSFT(share=0.9), head=Head(16, 3), name="base", example=(X,))
    meaning, label = torch.randn(256, 6), None
    turn = {"source": torch.linalg.qr(torch.randn(6, 6))[0], "target": torch.linalg.qr(torch.randn(6, 6))[0]}
    label = torch.stack([meaning[:, 0], meaning[:, 1], -meaning[:, 0]], 1).argmax(1)
    weight = host[0]._parameters["weight"].detach()
    for name, matrix in turn.items():  # a language's difference undoes its turn
        model.add(ComposableSFT(share=0.9), name=name, example=(X,))
        set_delta(model, name, "0", weight @ matrix.T - weight)
        model.bank[name].requires_grad_(False)
    model.prepared |= set(turn)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def accuracy(*names: str) -> float:
        model.activate(*names)
        return float((model(meaning @ turn["target"].T).argmax(1) == label).float().mean())

    known = [(meaning @ turn["source"].T, label)]
    scores = {}
    for name, below in (("with", ("source",)), ("without", ())):
        method = ComposableSFT(count=10, epochs=60, learning_rate=1e-2)
        model.add(method, name=name, example=(X,))
        model.activate(*below, name)
        model.prepare(known, loss)
        assert all(n.startswith(("head", f"adapter.{name}")) for n in model.trainable())
        train(model, loss, 200, known)
        scores[name] = accuracy("target", name) if below else accuracy(name)
    assert scores["with"] > scores["without"] + 0.2, scores


def bert_meta():
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        return TransformersText(name="bert-base-multilingual-cased", weights="random")


def test_counts_of_multilingual_bert():
    model = adapt(bert_meta(), ComposableSFT(count=14_155_776))
    norms = 25 * 2 * 768
    assert model.count() == {"trainable": (n := 177_262_848 - norms), "adapter": n, "head": 0, "frozen": 177_262_848}
    assert 24 * 768**2 == 14_155_776


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ComposableSFT(count=0), "ComposableSFT count 0"),
        (lambda: ComposableSFT(share=0.0), "ComposableSFT share 0"),
        (lambda: ComposableSFT(epochs=0), "epochs and learning_rate of the full phase"),
        (lambda: ComposableSFT(min_steps=5, max_steps=4), "min_steps 5, max_steps 4"),
        (lambda: ComposableSFT(full_l1=-1), "may not be negative"),
        (lambda: model_of(ComposableSFT(count=1000)), "count 1000: the model has 88 entries"),
        (lambda: model_of()[0].prepare([], lambda batch: torch.zeros(())), "batches: there is none"),
        (lambda: save_official(model_of()[0], "x.bin", name="y"), "no ComposableSFT is called 'y'; loaded: default"),
    ],
)
def test_wrong_requests_are_one_line(act, message):
    with pytest.raises(RequestError, match=message):
        act()


def test_a_full_phase_that_fails_leaves_the_model_as_it_was():
    model, loss = model_of()
    before = model(X).detach()
    with pytest.raises(WorkError, match="the loss of the full phase is nan at step 0"):
        model.prepare(PAIR, lambda batch: loss(batch) * torch.nan)
    with pytest.raises(WorkError, match="moved 0 entries, fewer than the 20 to keep"):
        model.prepare(PAIR, lambda batch: loss(batch) * 0)
    assert torch.equal(model(X), before)
    assert model.unprepared() == ["default"]


def test_the_budget_of_the_full_phase():
    def steps(**settings: Any) -> int:
        return ComposableSFT(**settings)._steps([0] * 10)

    assert steps(epochs=2.5) == 25
    assert steps(epochs=1, min_steps=40) == 40
    assert steps(epochs=100, max_steps=50) == 50
