"""Failures that adapter libraries let pass in silence, each here as a test that must hold.

Sources: fused encoder path (pytorch issue 132700), uncalled output projection (peft issue 761), renamed keys (peft
issue 2699), unmerging inside a forward, rounding by repeated merges (peft issue 1388), reentrant checkpointing of
frozen inputs (transformers issue 23170), a pattern that matches nothing among patterns that do.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared import LoRA, RequestError, WorkError, adapt, trainable
from tests.shared.hosts import SelfAttention


def perturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.3)
    return model


def test_the_fused_encoder_layer_sees_lora_on_its_linears_at_test_time() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = layer(x)
    model = perturbed(adapt(layer, LoRA(rank=2, roles="linear"), example=(x,))).eval()
    with_gradients = model(x).detach()
    with torch.no_grad(), torch.profiler.profile() as trace:
        fused = model(x)
    assert any("_transformer_encoder_layer_fwd" in event.key for event in trace.key_averages())  # the path was taken
    assert float((fused - base).abs().max()) > 0.1
    assert torch.allclose(fused, with_gradients, atol=2e-6)


def test_lora_on_the_uncalled_output_projection_acts_and_trains() -> None:
    host, x = SelfAttention().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        base = host(x)
    model = perturbed(adapt(host, LoRA(rank=2, roles="attention.output"), example=(x,)))
    with torch.no_grad():
        assert float((model(x) - base).abs().max()) > 0.05
    model(x).sum().backward()
    assert all(bool(p.grad.count_nonzero()) for p in trainable(model).values())


def test_renamed_keys_are_an_error_and_change_nothing(tmp_path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = perturbed(adapt(SelfAttention(), LoRA(rank=2)))
    model.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = file.metadata()
    renamed = {f"lora.{name}": t for name, t in load_file(tmp_path / "a.safetensors").items()}
    save_file(renamed, tmp_path / "b.safetensors", metadata=header)
    before = {n: p.clone() for n, p in trainable(model).items()}
    with pytest.raises(RequestError, match="0 of its 4 tensors fit this model; 4 missing"):
        model.load(tmp_path / "b.safetensors")
    assert all(torch.equal(before[n], p) for n, p in trainable(model).items())


def test_disabling_while_merged_leaves_the_model_merged() -> None:
    host, x = SelfAttention().eval(), torch.randn(2, 5, 16)
    stored = host.attention.in_proj_weight.clone()
    with torch.no_grad():
        base = host(x)
        model = perturbed(adapt(host, LoRA(rank=2)))
        model.merge()
        merged = host.state_dict()["attention.in_proj_weight"].clone()
        with model.disabled():
            assert torch.equal(model(x), base)
        assert torch.equal(host.state_dict()["attention.in_proj_weight"], merged)
        assert not torch.equal(merged, stored)


def test_running_never_changes_a_stored_weight() -> None:
    host, x = SelfAttention().eval(), torch.randn(2, 5, 16)
    before = {n: t.clone() for n, t in host.state_dict().items()}
    model = perturbed(adapt(host, LoRA(rank=2, roles=("attention.query", "attention.output")), example=(x,)))
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert all(torch.equal(before[n], t) for n, t in host.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_hundred_merges_do_not_drift(dtype) -> None:
    host = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    before = {n: t.clone() for n, t in host.state_dict().items()}
    model = perturbed(adapt(host, LoRA(rank=4, roles="linear")))
    for _ in range(100):
        model.merge()
        model.unmerge()
    assert all(torch.equal(before[n], t) for n, t in host.state_dict().items())


class Checkpointed(nn.Module):
    """Two linears inside an activation checkpoint, on an input that needs no gradient."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.body, self.reentrant = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_of_a_frozen_input_is_an_error_at_attach_time() -> None:
    with pytest.raises(WorkError, match="received no gradient: its output is not used at body/0, body/2"):
        adapt(Checkpointed(True), LoRA(rank=2, roles="linear"), example=(torch.randn(3, 8),))


def test_plain_checkpointing_of_a_frozen_input_trains() -> None:
    model = perturbed(adapt(Checkpointed(False), LoRA(rank=2, roles="linear"), example=(torch.randn(3, 8),)))
    model(torch.randn(3, 8)).sum().backward()
    assert all(bool(p.grad.count_nonzero()) for p in trainable(model).values())


def test_one_role_of_several_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"has no site with role 'attention.valeu'; nearest: 'attention.value'"):
        adapt(SelfAttention(), LoRA(rank=2, roles=("attention.query", "attention.valeu")))


def test_an_adapter_may_be_called_anything_even_lora_or_weight() -> None:
    x = torch.randn(2, 5, 16)
    for name in ("lora", "weight", "forward", "default", "LoRA/down"):
        model = adapt(SelfAttention(), LoRA(rank=2), name=name, example=(x,))
        assert len(trainable(model)) == 4
    with pytest.raises(RequestError, match="use a name without dots"):
        adapt(SelfAttention(), LoRA(rank=2), name="a.b")


def test_the_rank_of_a_grouped_convolution_need_not_divide_by_the_groups() -> None:
    host, x = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4)), torch.randn(2, 8, 6, 6)
    model = perturbed(adapt(host, LoRA(rank=3, roles="conv"), example=(x,)))
    folded = model(x).detach()
    with torch.no_grad():
        assert torch.allclose(model(x), folded, atol=1e-5)
