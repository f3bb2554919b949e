"""LLM-Adapters on single linear layers, against the formulas written out (its spec's "What must hold")."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import LoRA, ParallelAdapter, Prefix, SeriesAdapter
from shared.sites import Site, Sites

X = torch.randn(2, 5, 8)


def model(method, role: str = "mlp.up", rows: tuple[int, int] | None = None):
    torch.manual_seed(3)
    linear = nn.Linear(8, 12)
    sites = Sites([Site(role, 0, "", linear, rows=rows)])
    return linear, adapt(linear, method, sites=sites, example=(X,))


KINDS = {
    "before": (SeriesAdapter, "mlp.up"),
    "after": (SeriesAdapter, "mlp.down"),
    "beside": (ParallelAdapter, "mlp.up"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_zero_start_is_the_base_and_normal_start_is_near(kind):
    method, role = KINDS[kind]
    _, zero = model(method(width=4, start="zero", roles=role), role)
    with zero.disabled():
        bare = zero(X)
    assert torch.equal(zero(X), bare)
    _, near = model(method(width=4, roles=role), role)
    gap = ((near(X) - bare).norm() / bare.norm()).item()
    assert 0 < gap < 0.02


def test_the_three_places_are_three_functions():
    weight = torch.randn(4, 12), torch.randn(12, 4)
    outputs = []
    for kind, (method, role) in KINDS.items():
        linear, adapted = model(method(width=4, roles=role, scale=0.7), role)
        branch = adapted.bank["default"]["model"].branch
        inner = linear.in_features if kind != "after" else 12
        outer = 8 if kind == "before" else 12
        with torch.no_grad():
            branch.down.weight.copy_(weight[0][:, :inner])
            branch.up.weight.copy_(weight[1][:outer])

        def unit(x, down=branch.down.weight, up=branch.up.weight):
            return 0.7 * torch.tanh(x @ down.T) @ up.T

        plain = X @ linear.weight.T + linear.bias
        if kind == "before":
            expected = (X + unit(X)) @ linear.weight.T + linear.bias
        else:
            expected = plain + unit(plain if kind == "after" else X)
        assert torch.allclose(adapted(X), expected, atol=1e-5)
        with adapted.disabled():
            assert torch.equal(adapted(X), nn.functional.linear(X, linear.weight, linear.bias))
        outputs.append(adapted(X))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-2)


def test_only_the_adapter_trains_by_the_formula():
    for method, role, count in (
        (SeriesAdapter, "mlp.up", 64),
        (SeriesAdapter, "mlp.down", 96),
        (ParallelAdapter, "mlp.up", 80),
    ):
        linear, adapted = model(method(width=4, roles=role), role)
        assert adapted.count()["trainable"] == count
        assert not any(p.requires_grad for p in linear.parameters())


def test_a_learned_scale_trains_and_is_saved(tmp_path):
    _, adapted = model(ParallelAdapter(width=4, roles="mlp.up", scale="learned"))
    adapted(X).square().mean().backward()
    name = "adapter.default.model.branch.scale"
    assert adapted.trainable()[name].grad is not None
    with torch.no_grad():
        adapted.trainable()[name].fill_(2.5)
    adapted.save(tmp_path / "a.safetensors")
    _, other = model(ParallelAdapter(width=4, roles="mlp.up", scale="learned"))
    other.load(tmp_path / "a.safetensors")
    assert float(other.trainable()[name].detach()) == 2.5
    assert torch.equal(adapted(X), other(X))


def test_an_integer_is_a_scale():
    a, b = (model(ParallelAdapter(width=4, roles="mlp.up", scale=scale))[1](X) for scale in (2, 2.0))
    assert torch.equal(a, b)


def test_the_linear_parallel_form_merges():
    linear, adapted = model(ParallelAdapter(width=4, roles="mlp.up", activation="none", scale=0.5))
    change = adapted.bank["default"]["model"]
    weight = linear._parameters["weight"].detach() + 0.5 * change.up.detach().t() @ change.down.detach()
    expected = nn.functional.linear(X, weight, linear.bias)
    assert torch.allclose(adapted(X), expected, atol=1e-6)
    adapted.merge()
    assert torch.allclose(linear._parameters["weight"], weight, atol=1e-7)
    adapted.unmerge()
    _, curved = model(ParallelAdapter(width=4, roles="mlp.up"))
    with pytest.raises(RequestError, match="cannot be merged: it acts on activations"):
        curved.merge()


def test_rows_of_a_fused_projection_are_adapted_alone():
    linear, adapted = model(ParallelAdapter(width=4, roles="attention.key"), "attention.key", (4, 8))
    change = adapted(X) - nn.functional.linear(X, linear.weight, linear.bias)
    assert change[..., 4:8].abs().max() > 0
    assert change[..., :4].abs().max() == change[..., 8:].abs().max() == 0
    with pytest.raises(RequestError, match="attention.key shares its input with others; adapt the whole projection"):
        model(SeriesAdapter(width=4, roles="attention.key"), "attention.key", (4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "bottleneck width 0 at model: use at least 1"),
        ({"activation": "sine"}, "activation 'sine' at model: use one of relu"),
        ({"dropout": 1.0}, "ParallelAdapter dropout 1.0"),
        ({"roles": "mlp.gate"}, "no site with role 'mlp.gate'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        model(ParallelAdapter(**{"roles": "mlp.up", **arguments}))


# -- on the language models it was published for -----------------------------------------------------------------------

# What the published code wraps before (mh_adapter) and after (output_adapter) the layer, by its names.
TABLE = {
    "llama": (("gate_proj", "up_proj"), "down_proj"),
    "bloom": (("dense_h_to_4h",), "dense_4h_to_h"),
    "opt": (("fc1",), "fc2"),
    "gptj": (("fc_in",), "fc_out"),
}


@pytest.mark.parametrize("family", TABLE)
def test_each_layer_is_adapted_on_the_side_of_the_published_table(family):
    from shared.blocks.placement import After, Before
    from tests.shared.methods.test_prefix import text

    before, after = TABLE[family]
    adapted = adapt(text(family), SeriesAdapter(width=3))
    sides = {key.rpartition("/")[2]: type(module) for key, module in adapted.bank["default"].items()}
    assert sides == {**dict.fromkeys(before, Before), after: After}
    assert len(adapted.bank["default"]) == 2 * len(sides)
    pfeiffer = adapt(text(family), SeriesAdapter(width=3, roles="mlp.down"))
    assert {key.rpartition("/")[2] for key in pfeiffer.bank["default"]} == {after}
    beside = adapt(text(family), ParallelAdapter(width=3))
    names = {key.rpartition("/")[2] for key in beside.bank["default"]}
    assert names == ({"query_key_value"} if family == "bloom" else {"q_proj", "k_proj", "v_proj"})


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (SeriesAdapter(roles=("mlp.up", "mlp.gate")), 134_217_728),
        (ParallelAdapter(roles=("mlp.up", "mlp.down")), 247_463_936),
        (
            LoRA(
                rank=32,
                alpha=64,
                roles=("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down"),
            ),
            56_098_816,
        ),
        (Prefix(count=10), 2_621_440),
    ],
)
def test_published_counts_on_llama_7b(method, count):
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        backbone = TransformersText(name="huggyllama/llama-7b", weights="random")
        assert adapt(backbone, method).count()["trainable"] == count


# -- the ranking -------------------------------------------------------------------------------------------------------

LINEAR = ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down")
# The published placements, narrower; learning rates ten times the published ones but for the prefix's, which is high.
PLACED = {
    "LoRA": (LoRA(rank=8, alpha=16, roles=LINEAR), 3e-3),
    "parallel": (ParallelAdapter(width=16, roles=("mlp.up", "mlp.down")), 3e-3),
    "series": (SeriesAdapter(width=16, roles=("mlp.up", "mlp.gate")), 3e-3),
    "prefix": (Prefix(count=10), 3e-2),
}


def sum_of_two_digits(method, learning_rate: float, seed: int) -> tuple[float, float]:
    """Loss and accuracy on sums modulo 5 that a small random LLaMA is adapted to in 150 steps."""
    from tests.shared.methods.test_prefix import text

    torch.manual_seed(seed)
    adapted, head = adapt(text("llama"), method), nn.Linear(32, 5)
    random = torch.Generator().manual_seed(seed)

    def batch(count: int):
        digits = torch.randint(1, 6, (count, 2), generator=random)
        return torch.cat([digits, torch.full((count, 1), 9)], 1), digits.sum(1) % 5

    optimiser = torch.optim.AdamW([*adapted.trainable().values(), *head.parameters()], lr=learning_rate)
    for _ in range(150):
        questions, answers = batch(64)
        nn.functional.cross_entropy(head(adapted(questions).states[:, -1]), answers).backward()
        optimiser.step()
        optimiser.zero_grad()
    questions, answers = batch(512)
    with torch.no_grad():
        scores = head(adapted.eval()(questions).states[:, -1])
    return nn.functional.cross_entropy(scores, answers).item(), (scores.argmax(1) == answers).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_toy_of_reasoning_they_rank_as_published(seed):
    found = {name: sum_of_two_digits(*placed, seed) for name, placed in PLACED.items()}
    losses = [loss for loss, _ in found.values()]
    assert losses == sorted(losses), found
    assert min(found[name][1] for name in ("LoRA", "parallel", "series")) > 0.6
    assert found["prefix"][1] < 0.35  # chance is 0.2
