"""Frozen weights in half precision: what is stored so, what stays, what small changes become, and what files say."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import half
from shared.adapted import Adapted, adapt
from shared.errors import RequestError
from shared.linear import Piece, linear_beside
from shared.methods import AdaptFormer, BitFit, Full, LoRA, Probe, Prompt
from shared.training import Engine, fit
from tests.shared.hosts import HOSTS
from tests.shared.training import in_processes
from tests.shared.training.problem import Data

BF = torch.bfloat16


def vit(method) -> tuple[Adapted, Tensor]:
    torch.manual_seed(1)
    backbone, (image,), _ = HOSTS["vit"]()
    return adapt(backbone, method), image


def test_products_are_stored_in_half_and_nothing_else():
    model, _ = vit(LoRA(rank=2))
    size = sum(p.nbytes for p in model.backbone.parameters())
    half.halve(model)
    for path, parameter in _stored(model.backbone):
        owner, _, name = path.rpartition(".")
        product = isinstance(model.backbone.get_submodule(owner), (nn.Linear, nn.Conv2d)) and name == "weight"
        assert parameter.dtype == (BF if product else torch.float32), path
        assert not parameter.requires_grad
    assert sum(p.nbytes for p in model.backbone.parameters()) < 0.6 * size
    assert model.dtype == torch.float32
    before = list(model.backbone.parameters())
    half.halve(model)  # nothing more to do
    assert all(a is b for a, b in zip(before, model.backbone.parameters(), strict=True))


def test_the_residual_stream_adapters_and_the_output_are_float32():
    model, image = vit(AdaptFormer(width=4))
    seen: dict[str, set[torch.dtype]] = {}

    def see(name: str) -> Any:
        return lambda _, args, out: seen.setdefault(name, set()).update({args[0].dtype, out.dtype})

    half.halve(model)
    for role in ("block", "mlp.up", "norm"):
        for site in model.sites().select(role, "all"):
            site.module.register_forward_hook(see(role))
    for module in model.bank.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(see("adapter"))
    output = model(image)
    assert seen["block"] == {torch.float32}
    assert seen["norm"] == {torch.float32}
    assert BF in seen["mlp.up"]
    assert seen["adapter"] == {torch.float32}
    assert all(t.dtype == torch.float32 for t in (*output.maps, output.summary))


def test_a_small_change_is_not_lost_beside_a_half_precision_weight():
    torch.manual_seed(0)
    layer = nn.Linear(256, 64)
    model = adapt(nn.Sequential(layer), LoRA(rank=2, roles=("linear",)), example=(torch.randn(3, 256),)).eval()
    half.halve(model)
    adapter: Any = next(iter(model.bank["default"].values()))  # type: ignore[operator]
    with torch.no_grad():  # a thousandth of the product
        nn.init.normal_(adapter.down, std=0.004)
        nn.init.normal_(adapter.up, std=0.004)
    x, weight = torch.randn(2000, 256), layer._parameters["weight"]
    assert weight is not None
    scale, change = adapter.factors().scale, (adapter.up.t() @ adapter.down).detach()
    with torch.no_grad():
        bare = F.linear(x.to(BF).float(), weight.float(), layer.bias)
        moved, exact = model(x) - bare, scale * x @ change.t()
        folded = F.linear(x, (weight.float() + scale * change).to(BF).float() - weight.float())
    kept = [float((found * exact).sum() / exact.square().sum()) for found in (moved, folded)]
    assert kept[0] == pytest.approx(1, abs=0.1)
    assert kept[1] < 0.8  # what folding would keep of it


def test_the_low_rank_product_and_its_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 50, 24), torch.randn(36, 24) * 0.2, torch.randn(36)
    factors = [torch.randn(3, n) * 0.3 for n in (24, 12, 24, 24)]
    leaves = [t.requires_grad_() for t in (x, bias, *factors)]
    down, up, second, wide = factors
    pieces = [Piece((12, 24), down, up, 0.7, 0.0), Piece((0, 24), second, wide, 1.5, 0.0)]
    ours = half.linear_in_half(x, weight.to(BF), bias, pieces, True)
    halved = weight.to(BF).float()
    right = linear_beside(x, F.linear(x, halved, bias), pieces, True)
    assert ours.dtype == BF
    upstream = torch.randn(right.shape)
    found = torch.autograd.grad(ours.float(), leaves, upstream)
    exact = torch.autograd.grad(right, leaves, upstream)
    for a, b in zip((ours.detach().float(), *found), (right.detach(), *exact), strict=True):
        assert float((a - b).norm()) < 0.01 * float(b.norm())
    assert all(g.dtype == torch.float32 for g in found)


@pytest.mark.parametrize("method", [LoRA(rank=2), AdaptFormer(width=4), Prompt(count=2), Probe(), BitFit()])
def test_files_fit_models_of_either_precision(tmp_path, method):
    whole, _ = vit(method)
    coarse, image = vit(method)
    half.halve(coarse)
    for parameter in whole.bank.parameters():
        nn.init.normal_(parameter, std=0.1)
    whole.head = coarse.head = None
    if whole.bank["default"]:
        whole.save(tmp_path / "a.safetensors")
        coarse.load(tmp_path / "a.safetensors")
        coarse.save(tmp_path / "b.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with torch.no_grad():
        right, near = whole.eval()(image).summary, coarse.eval()(image).summary
    assert whole.fingerprint == coarse.fingerprint
    assert 0 < float((near - right).norm()) < 0.02 * float(right.norm())


def test_what_is_read_without_a_call_or_is_no_product_stays_in_float32():
    backbone, inputs, sites = HOSTS["attention"]()
    read = adapt(backbone, LoRA(rank=2, roles=("attention.query",)), sites=sites, example=inputs)
    half.halve(read)
    stored = {name: parameter.dtype for name, parameter in _stored(backbone)}
    assert stored["attention.in_proj_weight"] == torch.float32
    assert stored["attention.out_proj.weight"] == BF


def _stored(model: nn.Module):
    """The parameters themselves: reading one of a host gives what adapters make of it."""
    for path, module in model.named_modules():
        yield from ((f"{path}.{name}", p) for name, p in module._parameters.items() if p is not None)


def test_an_adapter_that_comes_too_late_is_refused_and_leaves_nothing():
    backbone, inputs, sites = HOSTS["attention"]()
    model = adapt(backbone, LoRA(rank=2, roles=("attention.output",)), sites=sites, example=inputs)
    model.remove()
    half.halve(model)
    with pytest.raises(RequestError, match="in_proj_weight is stored in torch.bfloat16 already: attach"):
        model.add(LoRA(rank=2, roles=("attention.query",)), name="late", example=inputs)
    assert not model.methods


def test_wrong_requests_are_one_line():
    model, _ = vit(Full())
    with pytest.raises(RequestError, match="trains the backbone, whose weights therefore cannot be"):
        half.halve(model)
    with pytest.raises(RequestError, match=r"trainer\.frozen 'bfloat16' with precision '64'"):
        Engine(epochs=1, precision="64", frozen="bfloat16")
    with pytest.raises(RequestError, match="do not go with 'fsdp': use 'ddp'"):
        Engine(epochs=1, devices=2, strategy="fsdp", recompute=True)
    merged, _ = vit(LoRA(rank=2))
    merged.merge()
    with pytest.raises(RequestError, match="merged"):
        half.halve(merged)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_training_is_near_that_of_whole_weights(tmp_path, precision):
    def trained(frozen: Literal["float32", "bfloat16"]) -> tuple[float, Tensor]:
        task = in_processes.line()
        torch.manual_seed(11)
        engine = Engine(epochs=6, device="cpu", frozen=frozen, precision=precision)
        found = fit(task, Data(), engine, tmp_path / frozen)
        return found["test"]["loss"], torch.cat([t.flatten() for t in task.state_dict().values()])

    (loss, state), (near, coarse) = trained("float32"), trained("bfloat16")
    assert coarse.dtype == torch.float32
    assert 0 < float((coarse - state).norm()) < 0.05 * float(state.norm())
    assert near == pytest.approx(loss, rel=0.05)


def test_a_run_and_its_prediction_are_in_half_precision_and_files_say_what_was_loaded(tmp_path):
    from shared import recipe, run
    from shared.store import read_header

    settings = ("trainer.frozen=bfloat16", "trainer.recompute=true")
    chosen = recipe.load("images/quickstart_images", settings, tiny=True)
    run.run(chosen, tmp_path / "run")
    trained = run.load(tmp_path / "run")
    model = trained.task.model
    assert model.state.half == BF
    assert any(p.dtype == BF for _, p in _stored(model.backbone))
    whole = run.build(recipe.load("images/quickstart_images", tiny=True), _data(trained))
    named = read_header(tmp_path / "run" / run.ADAPTER)["backbone"]["fingerprint"]
    assert named == model.fingerprint == whole.fingerprint
    with pytest.raises(RequestError, match=r"trainer: codes of 3 bits"):
        run.build(recipe.load("images/quickstart_images", ("trainer.saved_bits=3",), tiny=True), _data(trained))


def _data(trained: Any) -> Any:
    from types import SimpleNamespace

    bands = len(trained.described["band_names"]) if "band_names" in trained.described else 3
    return SimpleNamespace(**{**trained.described, "bands": bands})
