"""SparseAdapter and SparseLoRA against their formulas (the spec's "What must hold")."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.sparse import MaskedLinear, masked, masks, scores
from shared.errors import RequestError, WorkError
from shared.methods import SparseAdapter, SparseLoRA
from shared.methods.sparse_adapter import flow, survivors
from shared.sites import Site, Sites
from shared.store import read_header
from tests.shared.hosts import HOSTS
from tests.shared.training.problem import Data, Head, Line

X, Y = torch.randn(32, 8), torch.randn(32, 8)


def chain(method=None, layers: int = 3, seed: int = 0):
    """Frozen layers with an adapter after each, and the loss of a regression."""
    torch.manual_seed(seed)
    host = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    sites = Sites([Site("mlp.down", i, str(i), layer, width=8) for i, layer in enumerate(host)])
    model = adapt(host, method or SparseAdapter(width=4, where=("mlp",), density=0.5), sites=sites, example=(X,))
    return model, lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def bank(model) -> Any:
    return model.bank["default"]


def tensors(model) -> list[Tensor]:
    return [w for w, _ in masked(bank(model)).values()]


def test_the_worked_example():
    (mask,) = masks([torch.tensor([1.0, 4.0, 2.0, 3.0])], 0.5, "global")
    assert mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.25, 0.4, 0.5, 0.77, 0.999, 1.0])
def test_how_many_are_kept(density):
    given = [torch.randn(7, 5), torch.randn(5, 7), torch.randn(30)]
    total = sum(int(m.sum()) for m in masks(given, density, "global"))
    assert total == 100 - math.ceil((1 - density) * 100)
    for score, mask in zip(given, masks(given, density, "local"), strict=True):
        assert int(mask.sum()) == score.numel() - int((1 - density) * score.numel())
    assert all(bool(m.all()) for m in masks(given, 1.0, "global"))


def test_global_masks_differ_in_density_and_local_ones_do_not():
    densities = {}
    for scope in ("global", "local"):
        model, loss = chain(SparseAdapter(width=4, where=("mlp",), density=0.5, scope=scope))
        model.prepare([(X, Y)], loss)
        densities[scope] = {round(m.float().mean().item(), 3) for _, m in masked(bank(model)).values()}
        assert survivors(bank(model)) == {"weights": 192, "survive": 96, "density": 0.5, "sparse_ratio": 0.5}
    assert densities["local"] == {0.5}
    assert len(densities["global"]) > 2


def test_snip_is_weight_times_gradient():
    model, loss = chain()
    gradients = torch.autograd.grad(loss((X, Y)), tensors(model))
    expected = [(w * g).abs() for w, g in zip(tensors(model), gradients, strict=True)]
    ratios = torch.cat(
        [(s / e).flatten() for s, e in zip(scores("snip", tensors(model), [(X, Y)], loss), expected, strict=True)]
    )
    ratios = ratios[ratios.isfinite()]
    assert ratios.min() > 0
    assert torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-4)
    # Gradients add up over batches before the absolute value: of two that cancel nothing is left.
    pair = [(1.0, X), (-1.0, X)]
    cancelled = scores("snip", tensors(model), pair, lambda batch: batch[0] * model(batch[1]).sum())
    assert all(not score.any() for score in cancelled)


def test_grasp_is_the_hessian_times_the_gradient():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]])
    (score,) = scores("grasp", [weight], [1.0, 2.0], lambda scale: scale * weight @ hessian @ weight / 2)
    expected = weight * (3 * hessian @ (3 * hessian @ weight))
    assert torch.allclose(score, expected / expected.sum().abs(), atol=1e-6)


def drawn(model):
    """The model, all of its adapter drawn anew and every third entry a zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in bank(model).parameters():
            weight.normal_().view(-1)[1::3] = 0
    return model


def ran(*_: Any) -> Tensor:
    raise AssertionError("SynFlow runs neither the backbone nor the loss")


def masks_of(model) -> list[Tensor]:
    return [mask for _, mask in masked(bank(model)).values()]


@pytest.mark.parametrize("norm", ["in", "out", "none"])
def test_synflow_of_bottlenecks(norm):
    model = drawn(chain(SparseAdapter(width=4, where=("mlp",), norm=norm, scale="learned", pruner="synflow"))[0])
    expected = []
    for name in ("0", "1", "2"):
        branch = bank(model)[name].branch
        down, up, low = (t.detach().abs() for t in (branch.down.weight, branch.up.weight, branch.down.bias))
        s = abs(branch.scale.item()) / 8  # the mean of 8 outputs, each a sum over j of up_kj (sum_i down_ji + low_j)
        expected += [s * down * up.sum(0)[:, None], s * up * (down.sum(1) + low)]
    given = scores("synflow", tensors(model), [bank(model)], flow)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(given, expected, strict=True))
    # Scores that tie at the limit all go: with a third and more of zeros, more than the tenth asked for.
    zeros = sum(int((score == 0).sum()) for score in expected)
    assert sum(int(mask.sum()) for mask in masks(given, 0.9, "global")) == 192 - zeros < 0.7 * 192
    before = copy.deepcopy(model.state_dict())
    model.backbone.register_forward_pre_hook(ran)
    model.prepare([], ran)
    assert all(torch.equal(a, b) for a, b in zip(masks_of(model), masks(expected, 0.6, "global"), strict=True))
    for key, value in model.state_dict().items():  # every sign too, and the zeros
        assert key.endswith("_mask") or torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())
    assert not any(mask[weight == 0].any() for weight, mask in masked(bank(model)).values())
    assert survivors(bank(model))["survive"] == 192 - math.ceil(0.4 * 192)


def test_synflow_of_low_rank_factors():
    for density, scope in ((0.2, "global"), (0.5, "local")):
        method = SparseLoRA(rank=4, roles=("linear",), density=density, scope=scope, pruner="synflow")
        model = drawn(adapt(nn.Linear(8, 6), method, example=(X,)))
        change = bank(model)["model"]
        down, up = change.down.detach().clone(), change.up.detach().clone()
        # 6 outputs of scale 32 / 4, each a sum over r of up_rk sum_i down_ri
        expected = [8 / 6 * down.abs() * up.abs().sum(1)[:, None], 8 / 6 * up.abs() * down.abs().sum(1)[:, None]]
        given = scores("synflow", tensors(model), [bank(model)], flow)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given, expected, strict=True))
        model.prepare([], ran)
        assert torch.equal(change.down, down)
        assert torch.equal(change.up, up)
        assert survivors(bank(model))["survive"] == (56 - math.ceil(0.8 * 56) if scope == "global" else 28)
        assert all(torch.equal(a, b) for a, b in zip(masks_of(model), masks(expected, density, scope), strict=True))


def test_the_published_synflow_of_a_norm_is_zero():
    branch = bank(chain()[0])["0"].branch
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.abs_()
    branch(torch.ones(1, 8)).mean().backward()
    assert not branch.down.weight.grad.any()
    assert not branch.up.weight.grad.any()


def test_scoring_leaves_everything_else_alone():
    for pruner in ("random", "magnitude", "snip", "grasp", "synflow"):
        model, loss = chain(SparseAdapter(width=4, where=("mlp",), density=0.5, pruner=pruner, dropout=0.3))
        model.train()
        before = copy.deepcopy(dict(model.named_parameters()))
        modes = [m.training for m in model.modules()]
        model.prepare([(X, Y)], loss)
        assert [m.training for m in model.modules()] == modes
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
            assert parameter.requires_grad == before[name].requires_grad
            assert parameter.grad is None
    model, loss = chain()
    state = torch.get_rng_state()
    model.prepare([(X, Y)], loss)
    assert torch.equal(torch.get_rng_state(), state)


def test_pruned_weights_have_no_gradient_no_influence_and_no_place_in_the_file(tmp_path):
    model, loss = chain()
    model.prepare([(X, Y)], loss)
    loss((X, Y)).backward()
    bare = model(X).detach()
    for weight, mask in masked(bank(model)).values():
        assert not weight.grad[~mask].any()
        assert weight.grad[mask].count_nonzero() > 0.4 * mask.sum()
        with torch.no_grad():
            weight[~mask] = 1e3
    assert torch.equal(model(X), bare)
    model.save(tmp_path / "a.safetensors")
    shapes = [t["shape"] for n, t in read_header(tmp_path / "a.safetensors")["tensors"].items() if "up.weight" in n]
    assert sum(shape[0] for shape in shapes if len(shape) == 1) < 3 * 32
    other, _ = chain(seed=1)
    other.load(tmp_path / "a.safetensors", other_backbone=True)
    other.backbone.load_state_dict(model.backbone.state_dict())
    assert torch.equal(other(X), bare)
    for (weight, mask), (_, theirs) in zip(masked(bank(other)).values(), masked(bank(model)).values(), strict=True):
        assert torch.equal(mask, theirs)
        assert not weight[~mask].any()


def test_a_sparse_file_is_smaller_by_its_share(tmp_path):
    sizes = {}
    for density in (1.0, 0.1):
        method = SparseAdapter(width=512, where=("mlp",), density=density, pruner="magnitude")
        model, loss = chain(method)
        model.prepare([(X, Y)], loss)
        model.save(tmp_path / "a.safetensors")
        sizes[density] = (tmp_path / "a.safetensors").stat().st_size
    weights = 3 * 2 * 8 * 512
    assert sizes[1.0] - sizes[0.1] == pytest.approx(4 * 0.9 * weights, abs=200)


def prunable(model) -> int:
    return sum(weight.numel() for weight in tensors(model))


def roberta():
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        return TransformersText(name="roberta-base", weights="random")


def test_counts_on_roberta_base():
    model = adapt(roberta(), SparseAdapter())
    assert model.count()["adapter"] == 2_416_128
    assert prunable(model) == 2_359_296
    assert 2_359_296 - math.ceil(0.8 * 2_359_296) == 471_859
    assert adapt(roberta(), SparseAdapter(form="pfeiffer")).count()["adapter"] == 2_416_128 // 2
    # Large-Sparse: f times the width at a density of 1 / f keeps the weights of the narrow one.
    for factor in (2, 4):
        wide = prunable(adapt(roberta(), SparseAdapter(width=64 * factor, density=1 / factor)))
        assert wide - math.ceil((1 - 1 / factor) * wide) == 2_359_296


def test_large_sparse_keeps_what_the_narrow_one_has():
    kept = []
    for factor in (1, 2, 4):
        model, loss = chain(SparseAdapter(width=4 * factor, where=("mlp",), density=1 / factor))
        model.prepare([(X, Y)], loss)
        kept.append(survivors(bank(model))["survive"])
    assert kept == [192, 192, 192]


def test_the_three_forms_are_three_functions():
    def branch(module: Any, x: Tensor) -> Tensor:
        h = nn.functional.layer_norm(x, x.shape[-1:], module.norm.weight, module.norm.bias)
        h = torch.relu(h @ (module.down.weight * module.down.weight_mask).T + module.down.bias)
        return h @ (module.up.weight * module.up.weight_mask).T + module.up.bias

    backbone, _, _ = HOSTS["bert"]()
    layer = backbone.model.encoder.layer[1].output
    u, x = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    h = layer.dense(u)
    for form, key in (("sequential", "output/dense"), ("pfeiffer", "output/LayerNorm")):
        model = adapt(backbone, SparseAdapter(width=3, form=form, where=("mlp",), density=0.5), name=form)
        added = model.bank[form][f"model/encoder/layer/1/{key}"].branch  # type: ignore[index]
        nn.init.normal_(added.up.weight)
        model.prepare([backbone.example()], lambda batch, model=model: model(*batch).states.square().sum())
        ours = layer(u, x)
        if form == "sequential":
            expected = layer.LayerNorm(x + h + branch(added, h))
        else:
            with model.disabled():
                norm = layer.LayerNorm
                expected = norm(x + h + branch(added, norm(x + h)))
        assert torch.allclose(ours, expected, atol=1e-5)
        model.remove(form)

    vit, _, _ = HOSTS["vit"]()
    model = adapt(vit, SparseAdapter(width=3, form="parallel", scale=0.5))
    mlp, x = vit.model.blocks[0].mlp, torch.randn(2, 5, 24)
    with model.disabled():
        plain = mlp(x)
    assert torch.allclose(mlp(x), plain + 0.5 * branch(bank(model)["model/blocks/0/mlp"].branch, x), atol=1e-6)


def test_a_masked_lora_is_the_product_of_masked_factors():
    linear = nn.Linear(8, 6)
    model = adapt(linear, SparseLoRA(rank=4, roles=("linear",), sparse_ratio=0.5), example=(X,))
    model.prepare([(X,)], lambda batch: model(*batch).square().mean())
    change = bank(model)["model"]
    weight = linear._parameters["weight"] + 8 * (change.up * change.up_mask).T @ (change.down * change.down_mask)
    expected = nn.functional.linear(X, weight, linear.bias)
    assert torch.allclose(model(X), expected, atol=1e-5)
    model.merge()
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert survivors(bank(model)) == {"weights": 56, "survive": 28, "density": 0.5, "sparse_ratio": 0.5}


def test_the_two_names_of_one_number():
    assert SparseAdapter(density=0.25).kept == SparseAdapter(sparse_ratio=0.75).kept == 0.25
    assert SparseAdapter().kept == 0.6
    assert json.dumps(SparseAdapter(sparse_ratio=0.8).arguments())


def test_snip_trains_better_than_chance():
    """Mean over seeds of the loss after training, at half density, where three of four channels carry nothing."""
    ends: dict[str, list[float]] = {"snip": [], "random": []}
    for seed in range(6):
        drawn = torch.Generator().manual_seed(seed)
        x = torch.randn(128, 32, generator=drawn)
        label = (torch.sin(x[:, :8]) @ torch.randn(8, 3, generator=drawn)).argmax(1)
        x[:, 8:] = 0
        for pruner, losses in ends.items():
            torch.manual_seed(seed)
            host = nn.Sequential(nn.Identity(), nn.Identity())
            sites = Sites([Site("mlp.down", i, str(i), m, None, width=32) for i, m in enumerate(host)])
            method = SparseAdapter(width=4, where=("mlp",), density=0.5, pruner=pruner, norm="none")
            model = adapt(host, method, sites=sites, head=Head(32, 3))

            def loss(batch: tuple[Tensor, Tensor], model: Any = model) -> Tensor:
                return nn.functional.cross_entropy(model(batch[0]), batch[1])

            model.prepare([(x, label)], loss)
            optimiser = torch.optim.Adam(model.trainable().values(), lr=1e-2)
            for _ in range(60):
                optimiser.zero_grad()
                loss((x, label)).backward()
                optimiser.step()
            losses.append(loss((x, label)).item())
    assert sum(ends["snip"]) < 0.9 * sum(ends["random"]), ends


def test_a_resumed_run_keeps_its_masks(tmp_path):
    from shared.training import Engine, Optimiser, fit
    from tests.shared.training.test_fit import Interrupted, interrupt

    def task() -> Line:
        torch.manual_seed(3)
        host = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        sites = Sites([Site("mlp.down", 0, "0", host[0], width=16)])
        model = adapt(host, SparseAdapter(width=8, where=("mlp",), density=0.3), head=Head(16, 1), sites=sites)
        return Line(model, Optimiser(learning_rate=1e-2))

    def train(made: Line, output, seed: int, **more) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        random.seed(str(output))  # whatever else was drawn before
        fit(made, Data(noisy=True), Engine(epochs=3), output, **more)
        return torch.load(output / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    whole = train(task(), tmp_path / "whole", 11)
    with pytest.raises(Interrupted):
        train(interrupt(task(), epoch=2), tmp_path / "cut", 11)
    again = train(task(), tmp_path / "cut", 99, resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert whole["adapter.default.0.branch.down.weight_mask"].float().mean() < 0.6


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: SparseAdapter(density=0.5, sparse_ratio=0.5), "density is the kept share, sparse_ratio the pruned"),
        (lambda: SparseAdapter(density=0.0), r"SparseAdapter: density 0 \(1 - sparse_ratio\): use a share above 0"),
        (lambda: SparseAdapter(density=1.1), "density 1.1"),
        (lambda: SparseLoRA(sparse_ratio=1.0), "SparseLoRA: density 0"),
        (lambda: SparseAdapter(batches=0), "SparseAdapter batches 0"),
        (lambda: SparseLoRA(dropout=1.0), "SparseLoRA dropout 1.0"),
        (lambda: chain(SparseAdapter(width=0, where=("mlp",))), "SparseAdapter width 0 at 0"),
        (lambda: adapt(HOSTS["llama"]()[0], SparseAdapter(form="pfeiffer")), "llama has no norm behind its MLPs"),
        (lambda: adapt(HOSTS["vit"]()[0], SparseLoRA(rank=99)), "rank 99 at"),
        (lambda: chain()[0].prepare([], lambda batch: torch.zeros(())), "at least one batch: there is none"),
    ],
)
def test_wrong_requests_are_one_line(act, message):
    with pytest.raises(RequestError, match=message):
        act()


def test_scores_that_say_nothing_are_one_line():
    model, _ = chain()
    with pytest.raises(WorkError, match="pruner 'snip': scores are not finite"):
        model.prepare([X], lambda batch: model(batch).sum() * math.nan)
    with pytest.raises(WorkError, match="pruning leaves no weight"):
        model.prepare([X], lambda batch: model(batch).sum() * 0)
    assert model.unprepared() == ["default"]
    for method in (SparseAdapter(start="zero", pruner="synflow"), SparseLoRA(start="zero", pruner="synflow")):
        model = adapt(HOSTS["vit"]()[0], method)
        with pytest.raises(WorkError, match=r"pruning leaves no weight: .* all scores are equal \(zero, say\)"):
            model.prepare([], ran)
        assert model.unprepared() == ["default"]
    layer = MaskedLinear(3, 2)
    assert torch.equal(layer(X[:, :3]), nn.functional.linear(X[:, :3], layer.weight, layer.bias))
