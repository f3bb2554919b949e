"""What must hold of ResAdapter on small UNets of both kinds: where it acts, what trains, strengths, merging, undo."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.res_adapter import ResAdapter, set_norm_strength
from shared import LoRA, adapt, trainable
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import inputs, shake, tiny

SMALL = ResAdapter(rank=4, alpha=2.0)


def run(model, **given):
    with torch.no_grad():
        return model(**given).sample


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (24, 16)])
def test_untrained_it_changes_no_bit_at_any_size(backbone, size):
    given = inputs(backbone, *size)
    expected = run(backbone, **given)
    model = adapt(backbone, SMALL)
    assert torch.equal(run(model, **given), expected)
    assert torch.equal(model(**given).sample.detach(), expected)  # with gradients: the branch beside the product


@pytest.mark.parametrize(
    ("config", "method", "convolutions", "norms", "adapter"),
    [
        ("sd15", ResAdapter(), 6, 44, 970_240),
        ("sdxl", ResAdapter(), 4, 34, 527_360),
        ("sdxl", ResAdapter(rank=32), 4, 34, 921_600 + 66_560),
        ("sd15", ResAdapter(norms=False), 6, 0, 870_400),
        ("sdxl", ResAdapter(convolutions=False), 0, 34, 66_560),
    ],
)
def test_numbers_of_the_published_settings(config, method, convolutions, norms, adapter):
    with torch.device("meta"):
        backbone = DiffusersUNet(config=config)
    frozen = sum(p.numel() for p in backbone.parameters())
    model = adapt(backbone, method)
    assert model.count() == {"trainable": adapter, "adapter": adapter, "head": 0, "frozen": frozen}
    kinds = [type(host).__name__ for host in backbone.modules() if "_port" in host.__dict__]
    assert (kinds.count("Conv2d"), kinds.count("GroupNorm")) == (convolutions, norms)


def test_only_the_resampling_convolutions_and_resnet_norms_are_touched(backbone):
    model = adapt(backbone, SMALL)
    expected = {
        name
        for name, _ in backbone.named_modules()
        if name.endswith("samplers.0.conv") or (".resnets." in name and name.rpartition(".")[2] in ("norm1", "norm2"))
    }
    assert set(model.hosts()) == expected


def test_gradient_reaches_the_adapter_alone(backbone):
    model = adapt(backbone, SMALL)
    shake(model, "default")
    model.train()
    model(**inputs(backbone, batch=2)).sample.square().mean().backward()
    names = trainable(model)
    assert len(names) == len(model.bank["default"]) + len(model.sites().select("conv", tags="resample"))
    assert all(p.grad is not None and p.grad.count_nonzero() > 0 for p in names.values())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, 2.0, 0.5), (8, 2.0, 0.25)])
def test_the_scale_is_strength_times_alpha_over_rank(rank, alpha, scale):
    backbone = tiny("tiny_sd15")
    model = adapt(backbone, ResAdapter(rank=rank, alpha=alpha, norms=False))
    shake(model, "default")
    conv, part = backbone.unet.down_blocks[0].downsamplers[0].conv, next(iter(model.bank["default"].values()))
    before = conv._parameters["weight"]
    product = torch.einsum("ko,ki->oi", part.up, part.down).reshape(before.shape)
    for strength in (1.0, 0.7):
        model.activate("default", strength=strength)
        with torch.no_grad():
            torch.testing.assert_close(conv.weight, before + strength * scale * product)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_folded_beside_and_merged_agree_and_unmerging_restores(backbone, strength):
    given, state = inputs(backbone, 16, 8), copy.deepcopy(backbone.state_dict())
    model = adapt(backbone, SMALL)
    shake(model, "default")
    model.activate("default", strength=strength)
    folded = run(model, **given)
    beside = model(**given).sample.detach()
    model.merge()
    merged = run(model, **given)
    limit = 1e-5 * float(folded.abs().max())
    assert float((folded - beside).abs().max()) <= limit
    assert torch.equal(folded, merged)
    assert not torch.equal(
        state["unet.mid_block.resnets.0.norm1.weight"], backbone.unet.mid_block.resnets[0].norm1.weight
    )
    model.unmerge()
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


def test_the_norms_do_not_follow_the_strength(backbone):
    given = inputs(backbone)
    base = run(backbone, **given)
    model = adapt(backbone, SMALL)
    shake(model, "default")
    model.activate("default", strength=0.0)
    norms_only = run(model, **given)
    assert float((norms_only - base).abs().max()) > 1e-3
    set_norm_strength(model, 0.0)
    assert torch.equal(run(model, **given), base)
    set_norm_strength(model, 1.0)
    assert torch.equal(run(model, **given), norms_only)
    model.activate("default")
    assert not torch.equal(run(model, **given), norms_only)


@pytest.fixture(scope="module")
def blended():
    model = adapt(tiny("tiny_sd15"), ResAdapter(rank=2))
    shake(model, "default", 1.0)
    return model


@given(strength=st.floats(0, 1, width=32))
@settings(max_examples=20, deadline=None)
def test_norm_strength_blends_old_and_new(blended, strength):
    set_norm_strength(blended, strength)
    norm = blended.backbone.unet.mid_block.resnets[0].norm1
    old, new = norm._parameters["weight"], blended.bank["default"]["unet/mid_block/resnets/0/norm1"].value
    with torch.no_grad():
        torch.testing.assert_close(norm.weight, (1 - strength) * old + strength * new, rtol=1e-5, atol=1e-6)
    assert blended.methods["default"].norm_strength == strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_removing_restores_every_bit(backbone, dtype):
    unet = backbone.unet.to(dtype)
    before, kinds = copy.deepcopy(unet.state_dict()), [type(m) for m in unet.modules()]
    model = adapt(unet, SMALL, sites=unet_sites(unet))
    shake(model, "default")
    model.merge()
    model.remove()
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert [type(m) for m in unet.modules()] == kinds
    assert all(p.requires_grad for p in unet.parameters())


def test_a_bare_unet_is_adapted_in_place(backbone):
    given = inputs(backbone)
    unet = backbone.unet
    model = adapt(unet, SMALL, sites=unet_sites(unet))
    shake(model, "default")
    assert torch.equal(run(model, **given), run(unet, **given))
    with model.disabled():
        base = run(unet, **given)
    assert float((run(unet, **given) - base).abs().max()) > 1e-3


def test_two_active_adapters_add_their_convolutions(backbone):
    model = adapt(backbone, ResAdapter(rank=4, alpha=2.0, norms=False), name="res")
    shake(model, "res")
    model.add(LoRA(rank=2, roles=("conv", "attention.query")), name="style")
    shake(model, "style")
    conv = backbone.unet.down_blocks[0].downsamplers[0].conv
    base = conv._parameters["weight"]
    seen = {}
    with torch.no_grad():
        for names in (("res",), ("style",), ("res", "style"), ("style", "res")):
            model.activate(*names)
            seen[names] = conv.weight.clone()
    both = base + (seen["res",] - base) + (seen["style",] - base)
    torch.testing.assert_close(seen["res", "style"], both, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["style", "res"], both, rtol=1e-5, atol=1e-6)
    given = inputs(backbone)
    model.activate("res", "style", strength={"res": 1.0, "style": 0.0})
    only = run(model, **given)
    model.activate("res")
    torch.testing.assert_close(run(model, **given), only, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(backbone, tmp_path):
    given = inputs(backbone, 8, 16)
    model = adapt(backbone, SMALL)
    shake(model, "default")
    expected = run(model, **given)
    model.save(tmp_path / "adapter.safetensors")
    model.remove()
    again = adapt(backbone, SMALL)
    header = again.load(tmp_path / "adapter.safetensors")
    assert torch.equal(run(again, **given), expected)
    assert header["method"]["arguments"] == SMALL.arguments()


def test_wrong_settings_are_named(backbone):
    with pytest.raises(RequestError, match="neither convolutions nor norms"):
        ResAdapter(convolutions=False, norms=False)
    with pytest.raises(RequestError, match=r"norm_strength 1.5: use 0"):
        ResAdapter(norm_strength=1.5)
    with pytest.raises(RequestError, match=r"rank 100 at unet/down_blocks/0/downsamplers/0/conv: .* use 1 to 8"):
        adapt(backbone, ResAdapter(rank=100))
    with pytest.raises(RequestError, match="has no site with role 'conv'"):
        adapt(torch.nn.Linear(2, 2), ResAdapter())
    model = adapt(backbone, SMALL, name="res")
    with pytest.raises(RequestError, match="no ResAdapter 'other'; loaded: res"):
        set_norm_strength(model, 0.5, name="other")
    model.merge()
    with pytest.raises(RequestError, match=r"unmerge\(\) before changing"):
        set_norm_strength(model, 0.5)
