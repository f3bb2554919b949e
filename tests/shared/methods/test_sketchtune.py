"""SketchTune: format, gradients, learner, memory and files (its spec's "What must hold")."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks import sketch
from shared.blocks.sketch import Sketched, dense, pack, rounded, unpack
from shared.blocks.sketch_learning import centres, learn
from shared.errors import RequestError, WorkError
from shared.methods import LoRA, SketchTune
from shared.methods.sketchtune import dequantise, load_official, read_official
from shared.sites import Site, Sites
from tests.shared.hosts import llama


def layer(rows: int = 6, columns: int = 16, bias: bool = True, **arguments):
    torch.manual_seed(4)
    linear = nn.Linear(columns, rows, bias=bias)
    x = torch.randn(3, 5, columns)
    method = SketchTune(**{"groups": 2, "roles": ("linear",), **arguments})
    adapted = adapt(linear, method, sites=Sites([Site("linear", 0, "", linear)]), example=(x,))
    return adapted, adapted.bank["default"]["model"], x


def prepared(adapted, x: Tensor):
    adapted.prepare([x[:2], x[2:]], lambda batch: adapted(batch).square().mean())
    return adapted


# -- the format --------------------------------------------------------------------------------------------------------


def test_the_high_half_of_a_byte_is_the_even_column():
    assert unpack(torch.tensor([[[0xA3]]], dtype=torch.uint8)).tolist() == [[[10, 3]]]
    assert pack(torch.tensor([[[10, 3]]])).tolist() == [[[0xA3]]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_the_weight_is_the_table_at_the_codes(rows, groups, half, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, groups, 2**bits, generator=generator)
    codes = torch.randint(2**bits, (rows, groups, 2 * half), generator=generator)
    assert torch.equal(unpack(pack(codes)).long(), codes)
    weight = dense(table, pack(codes)).reshape(rows, groups, -1)
    for i in range(rows):
        for g in range(groups):
            assert torch.equal(weight[i, g], table[i, g, codes[i, g]])
            assert len(weight[i, g].unique()) <= 2**bits


def test_the_gradient_of_a_table_is_the_sum_over_its_entries(monkeypatch):
    monkeypatch.setattr(sketch, "ENTRIES", 40)  # two rows at a time
    adapted, adapter, x = layer()
    x.requires_grad_()
    out = torch.randn(3, 5, 6)
    y = adapted(x)
    y.backward(out)
    weight = adapter.dense().requires_grad_()
    again = nn.functional.linear(x.detach().requires_grad_(), weight, adapted.backbone.bias)
    assert torch.allclose(y, again, atol=1e-6)
    whole = (out.flatten(0, 1).t() @ x.detach().flatten(0, 1)).reshape(6, 2, 8)
    codes = unpack(adapter.codes).long()
    for value in range(16):
        expected = (whole * (codes == value)).sum(2)
        assert torch.allclose(adapter.table.grad[..., value], expected, atol=1e-4)
    assert torch.allclose(adapter.table.grad.sum(2), whole.sum(2), atol=1e-4)
    assert torch.allclose(x.grad, out @ weight, atol=1e-5)


def test_gradients_by_finite_differences():
    table, x = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    packed = pack(torch.randint(4, (3, 2, 4)))

    def loss(table: Tensor, x: Tensor) -> Tensor:
        return sketch.product(x, table, packed).sin().sum()

    inputs = table.requires_grad_(), x.requires_grad_()
    grads = torch.autograd.grad(loss(*inputs), inputs)
    with torch.no_grad():
        for which, grad in enumerate(grads):
            for index in ((0,) * grad.ndim, tuple(n - 1 for n in grad.shape)):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [t.detach().clone() for t in inputs]
                    moved[which][index] += step
                    ends.append(loss(*moved).item())
                # The table's gradient is summed in float32.
                assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(grad[index].item(), rel=1e-4, abs=1e-6)


def test_a_constant_added_to_a_table_adds_to_its_row():
    adapted, adapter, x = layer()
    before = adapted(x)
    with torch.no_grad():
        adapter.table[4, 1] += 0.5
    change = adapted(x) - before
    assert torch.allclose(change[..., 4], 0.5 * x[..., 8:].sum(-1), atol=1e-5)
    assert change[..., [0, 1, 2, 3, 5]].abs().max() == 0


# -- training ----------------------------------------------------------------------------------------------------------


def test_only_tables_train_and_codes_and_the_rest_stay():
    backbone, (tokens, mask), _ = llama()
    adapted = adapt(backbone, SketchTune(groups=2), example=(tokens, mask))
    adapted.prepare([(tokens, mask)], lambda batch: adapted(*batch).states.square().mean())
    codes = {n: t.clone() for n, t in adapted.trained_state().items() if n.endswith("codes")}
    rest = {n: t.clone() for n, t in backbone.state_dict().items()}
    trained = adapted.trainable()
    assert len(codes) == len(trained) == 14
    assert all(n.endswith(".table") for n in trained)
    optimiser = torch.optim.AdamW(trained.values(), 0.01, weight_decay=0.0)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = (adapted.train()(tokens, mask).states - 1).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(codes[n], adapted.trained_state()[n]) for n in codes)
    assert all(torch.equal(rest[n], t) for n, t in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def few_valued_and_rank_one() -> dict[str, Tensor]:
    """Updates of a layer of 16 rows and 64 columns: of few values on the codes of the layer, and of rank 1."""
    _, adapter, _ = layer(16, 64, bias=False, groups=4)
    few = dense(torch.randn(adapter.table.shape), adapter.codes)
    return {"few-valued": few, "rank 1": torch.randn(16, 1) @ torch.randn(1, 64)}


@pytest.mark.parametrize(("update", "better"), [("few-valued", "SketchTune"), ("rank 1", "LoRA")])
def test_what_each_can_fit(update, better):
    """Both have about 1024 parameters: LoRA of rank 12 has 960."""
    change, errors = few_valued_and_rank_one()[update], {}
    for method in (SketchTune(groups=4, roles=("linear",)), LoRA(rank=12, roles=("linear",))):
        torch.manual_seed(4)
        linear = nn.Linear(64, 16, bias=False)
        adapted = adapt(linear, method, sites=Sites([Site("linear", 0, "", linear)]), example=(torch.randn(2, 64),))
        adapter = adapted.bank["default"]["model"]
        if isinstance(adapter, Sketched):  # the best tables are means over the entries of a code
            target, codes = (linear.weight + change).reshape(16, 4, 16), unpack(adapter.codes).long()
            counts = torch.zeros_like(adapter.table).scatter_add_(2, codes, torch.ones_like(target))
            best = torch.zeros_like(adapter.table).scatter_add_(2, codes, target) / counts.clamp_min(1)
            errors["SketchTune"] = (best.gather(2, codes) - target).norm().item() / change.norm().item()
        else:
            errors["LoRA"] = torch.linalg.svdvals(change)[12:].norm().item() / change.norm().item()
    other = "LoRA" if better == "SketchTune" else "SketchTune"
    assert errors[better] < 0.1 < 0.2 < errors[other]


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_few_distinct_values_are_kept_exactly(bits):
    values = torch.randn(5, 2**bits)
    weight = values.gather(1, torch.randint(2**bits, (5, 40)))
    x = torch.randn(200, 40)
    learnt = learn(weight, x.t() @ x, bits, 1, exponent=4.0, damping=0.1)
    assert torch.equal(dense(*learnt), weight)


def test_centres_are_weighted_means_of_what_is_nearest():
    values, weights = torch.randn(4, 60), torch.rand(60) + 0.1
    for count in (4, 16):
        found = centres(values, weights, count)
        nearest = (values[:, :, None] - found[:, None]).abs().argmin(2)
        for row in range(4):
            for c in range(count):
                own = nearest[row] == c
                mean = (values[row] * weights * own).sum() / (weights * own).sum()
                assert found[row, c].item() == pytest.approx(mean.item(), abs=2e-3)


def calibration(outliers: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(400, 64, generator=generator)
    mix = torch.randn(64, 64, generator=generator) * 0.1 + torch.eye(64)
    x = x @ mix
    if outliers:
        x[:, ::13] *= 30
    return weight, x


def error(weight: Tensor, x: Tensor, learnt: tuple[Tensor, Tensor]) -> float:
    return (x @ (weight - dense(*learnt)).t()).norm().item()


def test_what_is_learnt_beats_even_spacing_and_importance_pays_with_outliers():
    weight, x = calibration(outliers=True)
    moment = x.t() @ x
    plain, aware = (error(weight, x, learn(weight, moment, 3, 1, exponent=p, damping=0.01)) for p in (0.0, 4.0))
    assert aware < plain < error(weight, x, rounded(weight, 3, 1))


def test_the_error_falls_with_groups_and_bits():
    weight, x = calibration(outliers=False)
    moment = x.t() @ x

    def of(bits: int, groups: int) -> float:
        return error(weight, x, learn(weight, moment, bits, groups, exponent=4.0, damping=0.01))

    by_groups, by_bits = [of(3, g) for g in (1, 2, 4)], [of(b, 1) for b in (1, 2, 3, 4)]
    assert by_groups == sorted(by_groups, reverse=True)
    assert by_bits == sorted(by_bits, reverse=True)


def test_inputs_that_never_come_cost_nothing():
    weight, x = calibration(outliers=False)
    x[:, 5] = 0
    learnt = learn(weight, x.t() @ x, 3, 1, exponent=4.0, damping=0.01)
    assert dense(*learnt).isfinite().all()
    assert error(weight, x, learnt) < error(weight, x, rounded(weight, 3, 1))
    with pytest.raises(WorkError, match=r"the statistics at there have no inverse: raise damping \(now 1e-12\)"):
        learn(weight, torch.full((64, 64), 1e6), 3, 1, exponent=4.0, damping=1e-12, where="there")


def test_each_block_is_learnt_behind_compressed_ones():
    """The second layer's statistics are of what the first, compressed, gives it."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    first, second = layers[0].weight.detach().clone(), layers[2].weight.detach().clone()
    x = torch.randn(40, 16)
    adapted = adapt(layers, SketchTune(groups=1, bits=2, samples=40), example=(x[:2],))
    adapted.prepare([x], lambda batch: adapted(batch).sum())
    bank = adapted.bank["default"]
    own = learn(first, x.t() @ x, 2, 1, exponent=4.0, damping=0.1)
    assert torch.equal(bank["0"].codes, own[1])
    hidden = torch.tanh(nn.functional.linear(x, dense(*own), layers[0].bias))
    other = learn(second, hidden.t() @ hidden, 2, 1, exponent=4.0, damping=0.1)
    assert torch.allclose(bank["2"].dense(), dense(*other), atol=1e-5)


def test_padding_does_not_teach():
    found, (_, (tokens, mask), _) = [], llama()
    for padding in (0, 9):
        backbone, _, _ = llama()
        adapted = adapt(backbone, SketchTune(groups=1), example=(tokens, mask))
        batch = tokens.masked_fill(~mask, padding), mask
        adapted.prepare([batch], lambda b, m=adapted: m(*b).states.sum())
        found.append(adapted.trained_state())
    assert all(torch.allclose(found[0][n].float(), found[1][n].float(), atol=1e-5) for n in found[0])


# -- memory and removal ------------------------------------------------------------------------------------------------

MEASURE = """
import ctypes, gc, json, sys, torch
from torch import nn
from shared.adapted import adapt
from shared.methods import LoRA, SketchTune
def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
torch.set_num_threads(1)
nn.Linear(64, 64)(torch.randn(2, 64)).sum().backward()
before = anonymous()
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
method = {"dense": None, "lora": LoRA(rank=8, roles=("linear",)), "sketch": SketchTune(groups=4)}[sys.argv[1]]
x = torch.randn(8, 1024)
if method is not None:
    adapted = adapt(model, method, example=(x,))
    adapted(x).sum().backward()
    adapted.zero_grad()
print(json.dumps(anonymous() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_the_dense_weights_leave_main_memory():
    """Bytes of a process beside torch itself; the dense weights are 8 x 1024 x 1024 x 4 = 33.6 MB."""
    found = {}
    for kind in ("dense", "lora", "sketch"):
        done = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout)
    assert found["dense"] >= 33e6
    assert found["lora"] >= found["dense"]
    codes, tables = 8 * 1024 * 1024 // 2, 8 * 4 * 1024 * 4 * 16
    assert codes + tables <= found["sketch"] < 0.5 * found["dense"]


def test_bytes_are_those_of_the_format():
    _, adapter, _ = layer(64, 4096, groups=4, dtype="bfloat16")
    size = sum(t.numel() * t.element_size() for t in (adapter.table, adapter.codes))
    assert size == 64 * 4096 // 2 + 2 * 64 * 4 * 16
    assert size / (2 * 64 * 4096) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removal_gives_the_frozen_weights_back(dtype):
    linear = nn.Linear(16, 6).to(dtype)
    before, x = linear.weight.detach().clone(), torch.randn(2, 16, dtype=dtype)
    adapted = adapt(linear, SketchTune(groups=2), example=(x,))
    assert linear.weight.data_ptr() == adapted.bank["default"]["model"]._mapped
    assert not torch.equal(adapted(x), nn.functional.linear(x, before, linear.bias))
    with adapted.disabled():
        assert torch.equal(adapted(x), nn.functional.linear(x, before, linear.bias))
    adapted.to(torch.float64)
    assert adapted(x.double()).dtype == torch.float64
    adapted.remove()
    assert torch.equal(linear.weight, before.double())
    linear.weight.data.add_(1)  # it can be written, too
    assert torch.equal(linear.weight, before.double() + 1)


def test_dequantised_weights_take_the_place_of_the_frozen_ones():
    adapted, adapter, x = layer(columns=64)
    expected, identity = adapted(x).detach(), adapted.fingerprint
    dequantise(prepared(adapted, x))
    assert adapted.methods == {}
    assert len(adapted.backbone.weight.reshape(6, 2, 32)[0, 0].unique()) == 16
    assert torch.equal(adapted.backbone.weight, adapter.dense())
    assert not torch.equal(adapted(x), expected)  # the learnt one, not the first
    assert adapted.fingerprint != identity


def test_autocast_and_copies():
    adapted, _, x = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), adapted(x), atol=0.05)
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        twin.bank["default"]["model"].table.zero_()
    assert torch.equal(twin(x), twin.backbone.bias.expand(3, 5, 6))
    assert adapted(x).abs().max() > 0
    assert twin.bank["default"]["model"].host[0] is twin.backbone


# -- counts, files, errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "groups", "count"),
    [
        ("meta-llama/Llama-2-7b-hf", 1, 21_757_952),
        ("meta-llama/Llama-2-7b-hf", 4, 87_031_808),
        ("meta-llama/Meta-Llama-3-8B", 1, 22_020_096),
    ],
)
def test_counts_on_llama(name, groups, count):
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        backbone = TransformersText(name=name, weights="random")
    assert adapt(backbone, SketchTune(groups=groups)).count()["adapter"] == count


def official(adapted) -> dict[str, tuple[Tensor, Tensor]]:
    """A compressed base as the authors publish it."""
    found = {}
    for key, adapter in adapted.bank["default"].items():
        table = torch.randn_like(adapter.table).half()
        found[key.replace("/", ".")] = (table, torch.randint_like(adapter.codes, 256))
    return found


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_official_files_load(kind, tmp_path):
    backbone, (tokens, mask), _ = llama()
    adapted = adapt(backbone, SketchTune(groups=1), example=(tokens, mask))
    content = official(adapted)
    write = pickle.dump if kind == "pickle" else torch.save
    tables = {name: (2 * pair[0])[:, 0] for name, pair in content.items()}
    flat = {name: (pair[0][:, 0], pair[1][:, 0]) for name, pair in content.items()}  # of one group a row: 2-D
    for name, data in (("trained.pkl", tables), ("base.pkl", flat)):
        with open(tmp_path / name, "wb") as file:
            write(data, file)
    with pytest.raises(RequestError, match="trained tables without codes; load its compressed base first"):
        load_official(adapted, tmp_path / "trained.pkl")
    load_official(adapted, tmp_path / "base.pkl")
    key = "model/layers/1/mlp/up_proj"
    table, codes = content["model.layers.1.mlp.up_proj"]
    adapter = adapted.bank["default"][key]
    assert torch.equal(adapter.table, table.float())
    assert torch.equal(adapter.codes, codes)
    load_official(adapted, tmp_path / "trained.pkl")
    assert torch.equal(adapter.table, 2 * table.float())
    assert torch.equal(adapter.codes, codes)
    assert adapted.trainable()


class Evil:
    def __reduce__(self):
        return (print, ("this would have run",))


def test_what_is_no_file_of_tensors_is_refused_unrun(tmp_path, capsys):
    backbone, inputs, _ = llama()
    adapted = adapt(backbone, SketchTune(groups=1), example=inputs)
    content = official(adapted)
    name, (table, codes) = next(iter(content.items()))
    for data, message in (
        ({"a": Evil()}, "it calls builtins.print, which is no tensor"),
        ({**content, "lm_head": (table, codes)}, "lm_head is no layer that this SketchTune compresses"),
        ({name: (table, codes)}, "it has 1 of the 14 layers"),
        ({**content, name: (table[:, :, :4], codes)}, r"table of .* is \(16, 1, 4\); the adapter's is \(16, 1, 16\)"),
        ({**content, name: (table * torch.nan, codes)}, "holds numbers that are not finite"),
        ({**content, name: (codes, codes)}, "not a mapping of layers"),
        ({**content, name: table}, "not a mapping of layers"),
        ([table], "not a mapping of layers"),
    ):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(data))
        with pytest.raises(RequestError, match=message):
            load_official(adapted, tmp_path / "a.pkl")
    whole = pickle.dumps(content)
    for spoilt in (whole[: len(whole) // 2], b"", b"PK nothing", b"hello"):
        (tmp_path / "a.pkl").write_bytes(spoilt)
        with pytest.raises(RequestError, match="not a file of tensors"):
            read_official(tmp_path / "a.pkl")
    with pytest.raises(RequestError, match="no such file"):
        read_official(tmp_path / "absent.pkl")
    assert capsys.readouterr().out == ""
    assert "default" not in adapted.prepared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "SketchTune bits 0: use 1 to 4"),
        ({"bits": 5}, "SketchTune bits 5"),
        ({"groups": 0}, "0 groups at model: its 16 columns do not divide"),
        ({"groups": 3}, "3 groups at model"),
        ({"groups": 16}, "16 groups at model: its 16 columns do not divide into groups of even size"),
        ({"damping": 0.0}, "damping 0.0"),
        ({"exponent": -1.0}, "exponent -1.0"),
        ({"samples": 0}, "samples 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        layer(**arguments)


def test_weights_and_batches_that_cannot_be_learnt_from():
    linear = nn.Linear(4, 4)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(RequestError, match="the weight at model holds numbers that are not finite"):
        adapt(linear, SketchTune(groups=1), sites=Sites([Site("linear", 0, "", linear)]))
    adapted, adapter, x = layer()
    for batches, kind, message in (([], RequestError, "there is no batch"), ([x * torch.nan], WorkError, "not finite")):
        with pytest.raises(kind, match=message):
            adapted.prepare(batches, lambda batch: adapted(batch).sum())
        assert adapter.bare is False
    with pytest.raises(RequestError, match="starts from data: call prepare"):
        adapted.trainable()
