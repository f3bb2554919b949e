"""CorDA against its formulas (its spec's "What must hold"); its golden case is in tests/parity."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.adapted import adapt
from shared.blocks.decomposition import damp, decompose, without_smallest
from shared.errors import RequestError, WorkError
from shared.methods import CorDA, LoRA, Probe
from shared.methods.corda import load_official, to_lora
from tests.shared.hosts import HOSTS

MODES: Any = ("ipa", "kpa")


def calibration(inputs: int = 12, seed: int = 0) -> list[Tensor]:
    """Six samples of twenty tokens whose directions differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    spread = torch.logspace(0, -1.5, inputs)
    return list(torch.randn(6, 1, 20, inputs, generator=generator) * spread @ turn)


def layer(inputs: int = 12, outputs: int = 9, **arguments) -> tuple[nn.Linear, Any]:
    torch.manual_seed(3)
    linear = nn.Linear(inputs, outputs)
    model: Any = adapt(linear, CorDA(**{"rank": 3, **arguments}))
    return linear, model


def prepared(batches: list[Tensor] | None = None, **arguments) -> tuple[Tensor, Any, Any]:
    """The frozen weight, the model and its adapter."""
    linear, model = layer(**arguments)
    model.prepare(calibration() if batches is None else batches, lambda batch: model(batch).square().mean())
    return linear._parameters["weight"].detach(), model, model.bank["default"]["model"]  # type: ignore[union-attr]


def product(adapter: Any) -> Tensor:
    return (adapter.up.t() @ adapter.down).detach()


def residual(weight: Tensor, adapter: Any) -> Tensor:
    return weight - adapter.up_start.t() @ adapter.down_start


def train(model: Any, steps: int = 5) -> None:
    optimiser = torch.optim.Adam(model.trainable().values(), lr=0.02)
    for x in calibration(seed=9)[:steps]:
        optimiser.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_start_is_the_identity(mode, rank):
    weight, model, adapter = prepared(mode=mode, rank=rank)
    assert product(adapter).norm() > 0
    assert (residual(weight, adapter) + product(adapter) - weight).norm() / weight.norm() < 1e-5
    x = torch.randn(4, 12)
    with model.disabled():
        bare = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), bare)  # folded
    assert torch.allclose(model(x), bare, atol=1e-6)  # in training


@pytest.mark.parametrize("tokens", [2, 400])  # beside the product, folded into the weight
def test_a_backbone_in_half_precision_starts_as_it_is(tokens):
    torch.manual_seed(3)
    model: Any = adapt(nn.Linear(12, 9).bfloat16(), CorDA(rank=3))
    model.prepare([x.bfloat16() for x in calibration()], lambda batch: model(batch).float().sum())
    x = torch.randn(tokens, 12).bfloat16()
    with model.disabled():
        bare = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), bare)
    assert (model(x) - bare).abs().max() <= 2**-7 * bare.abs().max()
    assert model.bank["default"]["model"].up.dtype == torch.float32


def test_all_components_leave_no_residual():
    weight, _, adapter = prepared(mode="ipa", rank=9)
    assert residual(weight, adapter).abs().max() < 1e-5


def test_in_a_round_context_it_is_the_plain_decomposition():
    weight = torch.randn(9, 12)
    up, down = decompose(weight, 0.3 * torch.eye(12)).part("ipa", 3)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose((up.t() @ down).float(), left[:, :3] * values[:3] @ right[:3], atol=1e-5)
    # PiSSA's factors up to the balance: the context's size, damping included, goes half to either side.
    assert torch.allclose(up.abs().float(), (left[:, :3] * (values[:3] * 0.303).sqrt()).t().abs(), atol=1e-5)
    plain = decompose(weight, None).part("ipa", 3)[0]
    assert torch.allclose(plain.abs().float(), (left[:, :3] * values[:3].sqrt()).t().abs(), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_activations_does_not_matter(mode):
    found = [product(prepared([7.3**power * x for x in calibration()], mode=mode)[2]) for power in (-1, 0, 2)]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[2], found[1], atol=1e-5)


def test_the_modes_share_the_weight_between_them():
    weight, _, large = prepared(mode="ipa", rank=4)
    small = prepared(mode="kpa", rank=5)[2]
    assert torch.allclose(product(large) + product(small), weight, atol=1e-5)


def test_what_the_context_does_not_use_is_dropped_at_less_cost():
    x = torch.cat(calibration()).flatten(0, -2)
    for seed in range(5):
        weight = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed))
        for rank in (2, 4, 6):
            oriented = (x @ (weight - without_smallest(weight, rank, x.T @ x)).T).square().sum()
            plain = (x @ (weight - without_smallest(weight, rank)).T).square().sum()
            assert oriented < 0.6 * plain


def test_only_the_factors_train_and_the_stored_weight_stays():
    weight, model, adapter = prepared()
    before, start = weight.clone(), residual(weight, adapter)
    assert set(model.trainable()) == {f"adapter.default.model.{n}" for n in ("down", "up")}
    assert model.count()["adapter"] == adapt(nn.Linear(12, 9), LoRA(rank=3, roles="linear")).count()["adapter"] == 63
    train(model)
    assert torch.equal(weight, before)
    assert torch.equal(residual(weight, adapter), start)
    x = torch.randn(4, 12)
    expected = x @ (start + product(adapter)).T + model.backbone._parameters["bias"]
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.merge()
    assert torch.allclose(model.backbone._parameters["weight"], start + product(adapter), atol=1e-6)
    model.remove()
    assert torch.equal(model.backbone.weight, before)


def test_counts_of_llama_2_7b():
    from modalities.language.backbones import TransformersText

    with torch.device("meta"):
        model = adapt(TransformersText(name="Llama-2-7b-hf", weights="random", lm_head=True), CorDA())
    assert model.count()["adapter"] == 319_815_680


def test_a_plain_lora_of_twice_the_rank_does_the_same_on_the_original_weights(tmp_path):
    weight, model, _ = prepared(mode="kpa")
    train(model)
    x = torch.randn(5, 12)
    trained = model(x).detach()
    to_lora(model)
    assert model.active == ("lora",)
    assert torch.allclose(model(x), trained, atol=1e-6)
    model.save(tmp_path / "lora.safetensors")
    plain, _ = layer()
    original: Any = adapt(nn.Linear(12, 9).requires_grad_(False), LoRA(rank=6, roles="linear"))
    original.backbone._parameters["weight"].copy_(weight)
    original.backbone._parameters["bias"].copy_(plain._parameters["bias"])
    original.load(tmp_path / "lora.safetensors")
    assert torch.allclose(original(x), trained, atol=1e-6)


def test_a_file_loads_on_the_original_weights_and_training_goes_on_from_it(tmp_path):
    _, model, adapter = prepared()
    train(model)
    model.save(tmp_path / "a.safetensors")
    _, other = layer()
    assert other.unprepared() == ["default"]
    other.load(tmp_path / "a.safetensors")
    x = torch.randn(5, 12)
    assert torch.equal(model(x), other(x))
    train(model)
    train(other)
    assert torch.equal(product(adapter), product(other.bank["default"]["model"]))


def test_it_does_not_train_unprepared():
    with pytest.raises(RequestError, match=r"adapter 'default' \(CorDA\) starts from data: call prepare"):
        layer()[1].trainable()


def test_it_may_start_from_another_calibration(tmp_path):
    _, questions, adapter = prepared(mode="kpa")
    questions.save(tmp_path / "kept.safetensors")
    head = nn.Linear(9, 2)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = head

        def forward(self, x: Tensor, size: tuple) -> Tensor:
            return self.inner(x)

    linear, _ = layer()
    kept: Any = adapt(
        nn.Linear(12, 9), CorDA(rank=3, mode="kpa", start=str(tmp_path / "kept.safetensors")), head=Head()
    )
    with torch.no_grad():
        for n, p in kept.backbone._parameters.items():
            p.copy_(linear._parameters[n])
    before = head.weight.detach().clone()
    kept.prepare([], lambda batch: batch)  # it needs none
    assert torch.equal(product(kept.bank["default"]["model"]), product(adapter))
    assert torch.equal(head.weight, before)
    other: Any = adapt(nn.Linear(12, 9), CorDA(rank=3, start=str(tmp_path / "kept.safetensors")))
    with pytest.raises(RequestError, match="kept.safetensors: CorDA on Linear .*; start from CorDA on Linear"):
        other.prepare([], lambda batch: batch)


def test_the_divisor_and_the_balance_move_size_between_the_factors():
    _, _, constant = prepared()
    _, _, counted = prepared(divisor=None)  # 6 samples in place of 256
    ratio = (256 / 6) ** 0.5
    assert torch.allclose(product(constant), product(counted), atol=1e-5)
    assert torch.allclose(constant.up * ratio, counted.up, rtol=1e-3, atol=1e-5)
    assert torch.allclose(constant.down / ratio, counted.down, rtol=1e-3, atol=1e-4)
    _, _, even = prepared(balance=True)
    assert torch.allclose(product(even), product(constant), atol=1e-5)
    assert torch.allclose(even.up.norm(), even.down.norm(), rtol=1e-5)


def test_singular_values_go_to_either_side():
    for sides, name in (("up", "up"), ("down", "down")):
        _, _, adapter = prepared(singular_values=sides)
        assert torch.allclose(product(adapter), product(prepared()[2]), atol=1e-5)
        moment = torch.stack([(x / x.max()).flatten(0, 1).T @ (x / x.max()).flatten(0, 1) for x in calibration()])
        found = decompose(layer()[0]._parameters["weight"].detach(), moment.sum(0) / 256)  # type: ignore[union-attr]
        whole = (
            found.left[:, :3].t() * found.values[:3, None] if name == "up" else found.right[:3] * found.values[:3, None]
        )
        assert torch.allclose(getattr(adapter, name).abs(), whole.abs().float(), rtol=1e-3, atol=1e-5)


def test_biases_train_on_request():
    _, model, _ = prepared(bias=True)
    assert model.count()["adapter"] == 63 + 9
    with pytest.raises(RequestError, match="only a CorDA without bias is a plain LoRA"):
        to_lora(model)


def test_too_few_tokens_are_damped_and_told(caplog):
    few = calibration()[0][:, :3]  # three tokens for twelve inputs: C is singular
    moment = few[0].T @ few[0]
    damped, damping = damp(moment)
    assert damping == 0.01
    assert torch.allclose(damped, moment + 0.01 * moment.diagonal().mean() * torch.eye(12))
    turn = torch.linalg.qr(torch.randn(12, 12))[0]
    values = torch.ones(12)
    values[0] = -0.11 / 12.01  # rounding of that kind makes C singular once 0.01 of its mean is added: twice that is
    assert damp(turn * values @ turn.T)[1] == 0.02
    with caplog.at_level(logging.INFO, logger="omniadapt"):
        _, _, adapter = prepared([few, -few.abs()])
    assert float(adapter.damping) == pytest.approx(0.01)
    assert "CorDA: model: 6 tokens of 2 samples, damping 0.01" in caplog.text


def test_samples_without_a_positive_number_are_told(caplog):
    odd = -torch.rand(1, 4, 12)
    odd[0, 0, 0] = -1e-6
    prepared([*calibration(), odd])
    assert "1 of 7 samples have a maximum next to zero" in caplog.text


def test_padding_and_order_of_layers_in_a_language_model():
    backbone, (tokens, mask), _ = HOSTS["llama"]()
    model: Any = adapt(backbone, CorDA(rank=2, at_a_time=1))
    model.prepare([(tokens, mask)], lambda batch: model(*batch).states.sum())
    other_backbone, _, _ = HOSTS["llama"]()
    other_backbone.load_state_dict(backbone.state_dict())
    other: Any = adapt(other_backbone, CorDA(rank=2))
    changed = tokens.masked_fill(~mask, 7)  # another token where there is none
    other.prepare([(changed, mask)], lambda batch: other(*batch).states.sum())
    for key, adapter in model.bank["default"].items():
        assert torch.allclose(product(adapter), product(other.bank["default"][key]), atol=1e-4), key
    with model.disabled():
        bare = model(tokens, mask).states
    assert torch.equal(model(tokens, mask).states.detach()[mask].isfinite(), torch.ones_like(bare[mask]).bool())
    assert torch.allclose(model(tokens, mask).states, bare, atol=1e-5)


# -- released models ---------------------------------------------------------------------------------------------------


def llama(seed: int = 0) -> Any:
    from modalities.language.backbones import TransformersText

    size = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return TransformersText(
        name="llama", weights="random", seed=seed, lm_head=True,
        config={**size, "intermediate_size": 24, "num_key_value_heads": 1},
    )  # fmt: skip


def official(backbone: Any, rank: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A trained model in the official layout, and what its layers' weights are together, by path."""
    generator = torch.Generator().manual_seed(5)
    state, whole = {"lm_head.weight": backbone.lm_head.weight.detach()}, {}
    paths = {site.path: site.module for site in CorDA().sites(backbone.sites())}
    for name, tensor in backbone.model.state_dict().items():
        if f"model.{name.removesuffix('.weight')}" not in paths:
            state[f"model.{name}"] = tensor
    for path, module in paths.items():
        up, down = decompose(module.weight, None).part("kpa", rank)
        rest = module.weight.detach() - (up.t() @ down).float()
        a = up.t().float() + 0.05 * torch.randn(up.shape[::-1], generator=generator)
        b = down.float() + 0.05 * torch.randn(down.shape, generator=generator)
        state |= {f"{path}.weight_residual": rest, f"{path}.ALinear.weight": a, f"{path}.BLinear.weight": b}
        whole[path] = rest + a @ b
    return {n: t.contiguous().clone() for n, t in state.items()}, whole


@pytest.mark.parametrize("sharded", [False, True])
def test_a_released_model_loads_on_the_original_weights(sharded, tmp_path):
    backbone = llama()
    state, whole = official(backbone)
    path = tmp_path / "model.safetensors"
    if sharded:
        path = tmp_path
        names = sorted(state)
        save_file({n: state[n] for n in names[::2]}, tmp_path / "model-1.safetensors")
        save_file({n: state[n] for n in names[1::2]}, tmp_path / "model-2.safetensors")
    else:
        save_file(state, path)
    model: Any = adapt(backbone, CorDA(rank=3))
    left = load_official(model, path)
    assert len(left) == len(state) - 3 * 14
    assert "lm_head.weight" in left
    tokens = torch.randint(0, 50, (2, 7))
    expected = llama()
    with torch.no_grad():
        for site in CorDA().sites(expected.sites()):
            site.module.weight.copy_(whole[site.path])
        assert torch.allclose(model(tokens).states, expected(tokens).states, atol=1e-5)
    assert model.trainable()
    to_lora(model)
    assert torch.allclose(model(tokens).states, expected(tokens).states, atol=1e-5)
    model.activate("default")
    model.remove("lora")
    model.remove()
    assert torch.equal(model(tokens).states, llama()(tokens).states)


def test_a_released_model_that_does_not_fit_is_refused(tmp_path):
    state, _ = official(llama())
    model: Any = adapt(llama(), CorDA(rank=3))
    before = {n: t.clone() for n, t in model.trained_state().items()}
    gone = "model.layers.1.mlp.up_proj.BLinear.weight"
    extra = {"model.layers.7.mlp.up_proj.weight_residual": torch.zeros(3, 3)}
    cases = [
        (
            {n: t for n, t in state.items() if n != gone},
            r"layers.1.mlp.up_proj.BLinear.weight is missing; .* \(3, 16\)",
        ),
        (state | extra, r"1 tensors of layers that are not adapted here \(first: layers.7.mlp"),
    ]
    for number, (tensors, message) in enumerate(cases):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path / f"{number}.safetensors")
    save_file(state, tmp_path / "good.safetensors")
    with pytest.raises(RequestError, match=r"ALinear.weight is \(16, 3\); this CorDA needs \(16, 4\)"):
        load_official(adapt(llama(), CorDA(rank=4)), tmp_path / "good.safetensors")
    with pytest.raises(
        RequestError, match="differs from the weight here by more than rank 3 .*made from another model"
    ):
        load_official(adapt(llama(seed=1), CorDA(rank=3)), tmp_path / "good.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="a folder without .safetensors files"):
        load_official(model, tmp_path / "empty")
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())


@pytest.mark.parametrize("trained", [False, True])
def test_biases_of_a_released_model(trained, tmp_path):
    linear = nn.Linear(12, 9)
    sites = nn.Sequential(linear)
    up, down = (t.float() for t in decompose(linear.weight, None).part("ipa", 2))
    bias = linear.bias.detach() + (1.0 if trained else 0.0)
    state = {"weight_residual": linear.weight.detach() - up.t() @ down, "ALinear.weight": up.t().contiguous(),
             "BLinear.weight": down.contiguous(), "ALinear.bias": bias}  # fmt: skip
    save_file({f"0.{n}": t.contiguous() for n, t in state.items()}, tmp_path / "m.safetensors")
    x = torch.randn(3, 12)
    expected = linear(x).detach() + (1.0 if trained else 0.0)
    model: Any = adapt(sites, CorDA(rank=2, bias=trained))
    load_official(model, tmp_path / "m.safetensors")
    assert torch.allclose(model(x), expected, atol=1e-5)
    if trained:
        model.remove()
        with pytest.raises(RequestError, match=r"0 has a trained bias; attach CorDA\(bias=True\)"):
            load_official(adapt(sites, CorDA(rank=2)), tmp_path / "m.safetensors")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank 0 at model: its matrix is 9 x 12, so use 1 to 9"),
        ({"rank": 10}, "rank 10 at model"),
        ({"mode": "both"}, "CorDA mode 'both': use ipa or kpa"),
        ({"singular_values": "none"}, "CorDA singular_values 'none': use both or up or down"),
        ({"precision": "half"}, "CorDA precision 'half'"),
        ({"samples": 0}, "CorDA samples 0: use at least 1"),
        ({"divisor": 0}, "CorDA divisor 0: use at least 1"),
        ({"roles": "mlp.gate"}, "has no site with role 'mlp.gate'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(RequestError, match=message):
        layer(**arguments)


def test_bad_calibration_is_one_line():
    _, model = layer()
    for batches, error, message in (
        ([], RequestError, "there is no batch"),
        ([torch.full((1, 2, 12), torch.nan)], WorkError, "the input of the model is not finite"),
        ([torch.zeros(1, 2, 12)], WorkError, "the second moment of the inputs of model is zero"),
    ):
        with pytest.raises(error, match=message):
            model.prepare(batches, lambda batch: model(batch).sum())
        assert model.unprepared() == ["default"]
    with pytest.raises(RequestError, match="no linear layer to decompose"):
        adapt(nn.Sequential(nn.Conv2d(3, 3, 1)), CorDA())
    probed: Any = adapt(nn.Sequential(nn.Linear(2, 2)), Probe())
    with pytest.raises(RequestError, match="adapter 'default': only a CorDA without bias"):
        to_lora(probed)


# -- a toy of two tasks ------------------------------------------------------------------------------------------------


def toy(seed: int, kind: str) -> tuple[int, float]:
    """Steps to half of the second task's loss, and the error then on the first, whose inputs use six directions."""
    g = torch.Generator().manual_seed(seed)
    first, second = (torch.linalg.qr(torch.randn(16, 16, generator=g))[0] for _ in range(2))
    weight = torch.randn(16, 16, generator=g) / 4
    x1 = torch.randn(256, 16, generator=g) * torch.cat([torch.ones(6), torch.full((10,), 0.03)]) @ first.T
    x2 = torch.randn(256, 16, generator=g) * torch.logspace(0, -1, 16) @ second.T
    target = x2 @ (weight + torch.randn(16, 16, generator=g) / 8).T
    torch.manual_seed(seed)
    linear = nn.Linear(16, 16, bias=False)
    linear.weight.data.copy_(weight)
    method: Any = LoRA(rank=4, roles="linear") if kind == "lora" else CorDA(rank=4, mode=kind)  # type: ignore[arg-type]
    model: Any = adapt(linear, method)
    model.prepare(list((x1 if kind == "kpa" else x2)[:, None].split(64)), lambda batch: model(batch).sum())
    optimiser = torch.optim.Adam(model.trainable().values(), lr=3e-3)
    goal = 0.5 * float((x2 @ weight.T - target).square().mean())
    for step in range(300):
        loss = (model(x2) - target).square().mean()
        if loss.detach() < goal:
            return step, float((model(x1) - x1 @ weight.T).detach().square().mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    raise AssertionError(f"{kind} does not learn")


@pytest.mark.parametrize("seed", range(3))
def test_one_mode_forgets_less_and_the_other_learns_faster(seed):
    lora, ipa, kpa = (toy(seed, kind) for kind in ("lora", "ipa", "kpa"))
    assert kpa[1] < 0.2 * lora[1]
    assert kpa[1] < 0.2 * ipa[1]
    assert ipa[0] < 0.8 * lora[0]
