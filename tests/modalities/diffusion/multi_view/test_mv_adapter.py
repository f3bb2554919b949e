"""MV-Adapter: what its publication says must hold, on small UNets of the two published kinds."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch

from modalities.diffusion.backbones.unet import DiffusersUNet
from modalities.diffusion.backbones.unet_sites import unet_sites
from modalities.diffusion.multi_view.attention import ViewAttention, attend, rows, rows_and_columns
from modalities.diffusion.multi_view.mv_adapter import MVAdapter
from shared import Adapted, adapt, taxonomy
from shared.errors import RequestError
from tests.modalities.diffusion.conftest import inputs, shake, tiny


def adapted(config: str = "tiny_sd21", scale: float = 0.2, **settings: Any) -> Adapted:
    """A small adapted UNet; scale: of the noise on its adapter, 0 leaves it as it starts."""
    unet = tiny(config).unet
    model = adapt(unet, MVAdapter(**settings), name="mv", sites=unet_sites(unet))
    if scale:
        shake(model, "mv", scale)
    return model.eval()


def attention(reference: bool = False, views: str = "row") -> tuple[Any, ViewAttention]:
    from diffusers.models.attention_processor import Attention

    frozen = Attention(8, heads=2, dim_head=4, bias=False)
    adapter = ViewAttention(frozen, "attn1.processor", views, reference)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    return frozen.requires_grad_(False), adapter


def told(adapter: ViewAttention, **values: Any) -> None:
    vars(adapter.context).clear()
    vars(adapter.context).update(values)


@torch.no_grad()
def call(model: Adapted, given: dict[str, Any], **wanted: Any) -> torch.Tensor:
    return model(**given, cross_attention_kwargs=wanted or None).sample


def different(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("config", ["tiny_sd21", "tiny_sdxl"])
@pytest.mark.parametrize("views", ["row", "row_column"])
def test_fresh_with_features_of_zero_or_none_it_is_the_base(config, views):
    model, given = adapted(config, 0.0, views=views, reference=True), inputs(tiny(config), batch=6)
    with torch.no_grad(), model.disabled():
        bare = model(**given).sample
    features = [torch.zeros(6, *shape) for shape in _shapes(config)]
    for wanted in ({}, {"control": features}, {"ref_latents": torch.randn(1, 4, 8, 8)}):
        assert torch.equal(call(model, given, num_views=6, **wanted), bare)
    model.remove("mv")
    assert not any("_port" in m.__dict__ for m in model.backbone.modules())
    with torch.no_grad():
        assert torch.equal(model.backbone(**given).sample, tiny(config)(**given).sample)


def _shapes(config: str) -> list[tuple[int, int, int]]:
    if config == "tiny_sdxl":
        return [(8, 4, 4), (16, 4, 4), (32, 2, 2), (32, 2, 2)]
    return [(8, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1)]


@pytest.mark.parametrize("config", ["tiny_sd21", "tiny_sdxl"])
def test_the_encoder_gives_features_of_these_shapes(config):
    model = adapted(config)
    encoder: Any = model.bank["mv"]["model"].encoder  # type: ignore[index]
    with torch.no_grad():
        assert [tuple(f.shape) for f in encoder(torch.rand(2, 6, 64, 64))] == [(2, *s) for s in _shapes(config)]


def test_one_view_attends_to_its_own_rows_alone():
    _, adapter = attention()
    x = torch.randn(1, 6, 8)
    told(adapter, num_views=1, latent_size=(2, 3))
    found = adapter.between_views(x)
    for row in (slice(0, 3), slice(3, 6)):
        part = x[:, row]
        alone = attend(adapter.to_q_mv(part), adapter.to_k_mv(part), adapter.to_v_mv(part), 2)
        torch.testing.assert_close(found[:, row], adapter.to_out_mv[0](alone))


def test_every_query_has_keys_of_all_views(monkeypatch):
    seen = []

    def spy(q, k, v):
        seen.append((q.shape, k.shape))
        return real(q, k, v)

    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    rows(*(torch.randn(2, 5, 3, 4, 8) for _ in range(3)), heads=2)
    assert [k[2] for _, k in seen] == [5 * 4]
    assert seen[0][0][0] == 2 * 3  # one sequence for each object and row


def test_rows_are_those_of_the_published_order():
    """Against the published recipe spelled out: keys of a row of all views, repeated for every view."""
    q, k, v = (torch.randn(2, 3, 2, 4, 8) for _ in range(3))
    found = rows(q, k, v, heads=2)
    for b in range(2):
        for view in range(3):
            for row in range(2):
                keys, values = (t[b, :, row].reshape(1, 12, 8) for t in (k, v))
                alone = attend(q[b, view, row][None], keys, values, 2)[0]
                torch.testing.assert_close(found[b, view, row], alone)


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (6, 3)])
def test_a_change_in_a_row_of_one_view_reaches_that_row_of_all_views_alone(size):
    _, adapter = attention()
    height, width = size
    told(adapter, num_views=3, latent_size=size)
    x = torch.randn(6, height * width, 8)
    changed = x.clone().reshape(2, 3, height, width, 8)
    changed[0, 1, 1, width // 2] += 1
    difference = adapter.between_views(changed.reshape(x.shape)) - adapter.between_views(x)
    moved = difference.reshape(2, 3, height, width, 8).abs().amax(-1) > 1e-6
    expected = torch.zeros(2, 3, height, width, dtype=torch.bool)
    expected[0, :, 1] = True
    assert torch.equal(moved, expected)


def test_a_reference_of_zeros_adds_the_bias():
    frozen, adapter = attention(reference=True)
    x = torch.randn(6, 9, 8)
    told(adapter, num_views=3, use_mv=False, ref_scale=0.3, ref_hidden_states={adapter.name: torch.zeros(6, 9, 8)})
    added = adapter(frozen, x) - frozen(x)
    torch.testing.assert_close(added, (0.3 * adapter.to_out_ref[0].bias).expand_as(added), atol=1e-6, rtol=0)


def test_without_both_branches_it_is_plain_attention_and_the_cache_holds_its_input():
    model, given = adapted(reference=True), inputs(tiny("tiny_sd21"), batch=2)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(functools.partial(_note, seen, path), with_kwargs=True)
        for path, module in model.backbone.named_modules()
        if path.endswith("attn1")
    ]
    cache: dict[str, torch.Tensor] = {}
    found = call(model, given, use_mv=False, use_ref=False, cache_hidden_states=cache)
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), model.disabled():
        assert torch.equal(found, model(**given).sample)
    assert len(cache) == 16
    assert cache.keys() == {f"{path}.processor" for path in seen}
    assert all(torch.equal(cache[f"{path}.processor"], x) for path, x in seen.items())


def _note(seen, path, module, args, kwargs):
    seen[path] = args[0] if args else kwargs["hidden_states"]


@pytest.mark.parametrize(
    ("config", "text", "image"), [("sdxl", 490_923_200, 900_606_400), ("sd21", 127_496_320, 177_070_400)]
)
def test_counts_of_the_published_shapes(config, text, image):
    for reference, number in ((False, text), (True, image)):
        with torch.device("meta"):
            model = adapt(DiffusersUNet(config=config), MVAdapter(reference=reference))
        method: Any = model.methods["default"]
        assert model.count()["adapter"] == number == model.count()["trainable"]
        assert taxonomy.count(method.record, method, method.sites(model.sites())) == number


@pytest.mark.parametrize("config", ["tiny_sd21", "tiny_sdxl"])
def test_gradients_reach_exactly_the_copies_and_the_encoder(config):
    model, given = adapted(config, reference=True), inputs(tiny(config), 16, 8, batch=4)
    model.train()
    wanted = {"num_views": 2, "control": torch.rand(2, 6, 128, 64), "ref_latents": torch.randn(2, 4, 16, 8)}
    model(**given, cross_attention_kwargs=wanted).sample.square().sum().backward()
    trained = model.trainable()
    assert all(("_mv." in n or "_ref." in n) == ("attn1" in n) and ("encoder." in n) != ("attn1" in n) for n in trained)
    assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in trained.values())
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())


def test_rows_and_columns_join_the_sides_that_meet():
    base = [torch.randn(1, 6, 3, 3, 8) for _ in range(3)]
    before = rows_and_columns(*base, heads=2)

    def reached(view: int, row: int, column: int) -> torch.Tensor:
        """Which tokens (6, 3, 3) a change of one token moves."""
        moved = [t.clone() for t in base]
        for t in moved:
            t[0, view, row, column] += 1
        return (rows_and_columns(*moved, heads=2) - before)[0].abs().amax(-1) > 1e-6

    expected = torch.zeros(6, 3, 3, dtype=torch.bool)
    expected[[2, 4, 5], :, 0] = True  # the column of top, bottom and back
    expected[0, :, 2] = True  # the front is mirrored
    assert torch.equal(reached(4, 1, 0), expected)
    assert not reached(4, 1, 0)[[1, 3]].any()
    assert not reached(5, 2, 1)[[1, 3]].any()
    expected = torch.zeros(6, 3, 3, dtype=torch.bool)
    expected[:4, 1] = True
    assert torch.equal(reached(1, 1, 2), expected)
    expected[0, :, 2] = expected[[2, 4, 5], :, 0] = True
    assert torch.equal(reached(0, 1, 2), expected)
    with pytest.raises(RequestError, match="num_views 4: .* for the 6 sides"):
        rows_and_columns(*(t[:, :4] for t in base), heads=2)


def test_a_front_that_is_mirrored_and_back_is_where_it_was():
    """With all else alike in a row, flipping the front's width flips its result: the flip is undone."""
    x = torch.randn(1, 6, 2, 3, 8)
    found = rows_and_columns(x, x, x, heads=2)
    row = rows(x[:, :4], x[:, :4], x[:, :4], heads=2)
    mirrored = torch.stack([x[:, 0].flip(2), x[:, 2], x[:, 4], x[:, 5]], 1)
    for column in range(3):
        tokens = mirrored[0, :, :, column].reshape(1, 8, 8)
        alone = attend(tokens, tokens, tokens, 2).reshape(4, 2, 8)
        there = 2 - column
        torch.testing.assert_close(found[0, 0, :, there], (row[0, 0, :, there] + alone[0]) / 2)
        torch.testing.assert_close(found[0, 5, :, column], alone[3])


@pytest.mark.parametrize("config", ["tiny_sd21", "tiny_sdxl"])
def test_control_maps_act_in_every_call(config):
    model, given, maps = adapted(config), inputs(tiny(config), 16, 8, batch=2), torch.rand(2, 6, 128, 64)
    without = call(model, given, num_views=2)
    first = call(model, given, num_views=2, control=maps)
    assert different(first, without) > 1e-3
    assert torch.equal(call(model, given, num_views=2, control=maps), first)
    encoder: Any = model.bank["mv"]["model"].encoder  # type: ignore[index]
    with torch.no_grad():
        features = [f / 2 for f in encoder(maps)]
    for _ in range(2):
        torch.testing.assert_close(call(model, given, num_views=2, control=features, control_scale=2.0), first)
    assert len(features) == 4
    assert torch.equal(call(model, given, num_views=2, control=maps, control_scale=0.0), without)


def test_control_acts_in_its_share_of_the_schedule():
    model, given, maps = adapted(), inputs(tiny("tiny_sd21"), batch=2), torch.rand(2, 6, 1, 1)
    wanted = {"num_views": 2, "control": maps, "control_factor": 0.5}
    for timestep, acts in ((981, True), (501, True), (499, False), (0, False)):
        now = {**given, "timestep": torch.tensor(timestep)}
        assert (different(call(model, now, **wanted), call(model, now, num_views=2)) > 1e-4) == acts
    spread = call(model, given, num_views=2, control=maps.expand(-1, -1, 64, 64))
    torch.testing.assert_close(call(model, given, num_views=2, control=maps), spread)


def test_residuals_of_another_adapter_add_up():
    model, given = adapted(), inputs(tiny("tiny_sd21"), batch=2)
    theirs, ours = ([torch.randn(2, *s) for s in _shapes("tiny_sd21")] for _ in range(2))
    with torch.no_grad():
        both = [a + b for a, b in zip(theirs, ours, strict=True)]
        expected = model(**given, down_intrablock_additional_residuals=both).sample
        wanted = {"down_intrablock_additional_residuals": theirs, "cross_attention_kwargs": {"control": ours}}
        torch.testing.assert_close(model(**given, **wanted).sample, expected)


def test_the_reference_is_seen_clean_at_step_0_and_the_unconditional_half_sees_zeros():
    model, given = adapted("tiny_sdxl", reference=True), inputs(tiny("tiny_sdxl"), batch=12)
    given["encoder_hidden_states"][:6] = 0.5  # uniform text of the unconditional half, two prompts of three views
    given["encoder_hidden_states"][6:9] = given["encoder_hidden_states"][6:7]
    given["encoder_hidden_states"][9:] = given["encoder_hidden_states"][9:10]
    latents = torch.randn(2, 4, 8, 8)
    found = call(model, given, num_views=3, ref_latents=latents)
    cache: dict[str, torch.Tensor] = {}
    text, extra = given["encoder_hidden_states"][[6, 9]], given["added_cond_kwargs"]
    asked = {"encoder_hidden_states": text, "added_cond_kwargs": {n: t[[6, 9]] for n, t in extra.items()}}
    look = {"sample": latents, "timestep": torch.tensor(0), **asked}
    call(model, look, use_mv=False, use_ref=False, cache_hidden_states=cache)
    states = {n: torch.cat([torch.zeros_like(t), t]).repeat_interleave(3, 0) for n, t in cache.items()}
    torch.testing.assert_close(call(model, given, num_views=3, ref_hidden_states=states), found)
    whole = call(model, given, num_views=3, ref_latents=latents, ref_scale=0.0)
    assert torch.equal(whole, call(model, given, num_views=3))
    moved = call(model, given, num_views=3, ref_latents=torch.cat([latents[:1], latents[1:] + 1]))
    assert (moved - found).abs().amax((1, 2, 3)).gt(1e-5).tolist() == [False] * 9 + [True] * 3
    half = {n: t[6:] if n in ("sample", "encoder_hidden_states") else t for n, t in given.items()}
    half["added_cond_kwargs"] = {n: t[6:] for n, t in extra.items()}
    torch.testing.assert_close(call(model, half, num_views=3, ref_latents=latents), found[6:])


def test_what_is_made_once_is_kept_for_falling_timesteps_of_the_same_tensors(monkeypatch):
    model, given = adapted(reference=True), inputs(tiny("tiny_sd21"), batch=2)
    condition: Any = model.bank["mv"]["model"]  # type: ignore[index]
    looks = []
    real = condition._look
    monkeypatch.setattr(condition, "_look", lambda *a: (looks.append(1), real(*a))[1])
    latents, maps = torch.randn(1, 4, 8, 8), torch.rand(2, 6, 1, 1)

    def at(timestep: int, **more: Any) -> torch.Tensor:
        wanted = {"num_views": 2, "control": maps, "ref_latents": latents, **more}
        return call(model, {**given, "timestep": torch.tensor(timestep)}, **wanted)

    first = [at(t) for t in (900, 500, 500)]
    assert len(looks) == 1
    assert torch.equal(first[1], first[2])
    at(900)  # another run begins
    assert len(looks) == 2
    latents.add_(1)
    changed = at(800)
    assert len(looks) == 3
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    assert torch.equal(at(800), changed)
    assert len(looks) == 4
    kept = condition._kept
    latents = torch.randn(1, 4, 8, 8)
    assert kept.value == (None, None)  # dropped with the tensor it was made of
    del kept
    model.train()
    model(**given, cross_attention_kwargs={"num_views": 2, "ref_latents": latents})
    assert condition._kept is None  # gradients are wanted: nothing is kept


def test_other_shapes_than_squares():
    model, given = adapted(), inputs(tiny("tiny_sd21"), 6, 10, batch=2)
    assert call(model, given, num_views=2).shape == (2, 4, 6, 10)
    _, adapter = attention()
    told(adapter, num_views=1)
    torch.testing.assert_close(adapter.between_views(torch.ones(1, 4, 8)), adapter.between_views(torch.ones(1, 4, 8)))
    with pytest.raises(RequestError, match="6 tokens are no square: say the size"):
        adapter.between_views(torch.randn(1, 6, 8))
    told(adapter, num_views=1, latent_size=(5, 7))
    assert adapter.between_views(torch.randn(1, 12, 8)).shape == (1, 12, 8)  # 3 x 4, half of it
    with pytest.raises(RequestError, match="10 tokens are no level of latents 5x7"):
        adapter.between_views(torch.randn(1, 10, 8))


@pytest.mark.parametrize(
    ("settings", "wanted", "message"),
    [
        ({}, {"num_views": 4}, "num_views 4: the batch of 6 is no whole number of objects"),
        ({}, {"num_views": 0}, "num_views 0: a whole number from 1"),
        ({"views": "row_column"}, {"num_views": 3}, "num_views 3: attention along rows and columns"),
        ({}, {"control": torch.rand(6, 6, 32, 32)}, "control maps of 6x32x32: latents of 8x8 want 6x64x64"),
        ({}, {"control": torch.rand(4, 6, 1, 1)}, "control of 4 rows does not go into a batch of 6"),
        ({"condition": False}, {"control": torch.rand(6, 6, 1, 1)}, "has no encoder"),
        ({}, {"ref_latents": torch.rand(1, 4, 8, 8)}, "has no branch for it"),
        ({"reference": True}, {"num_views": 3, "ref_latents": torch.rand(3, 4, 8, 8)}, "a batch of 9, or of 18"),
    ],
)
def test_what_does_not_fit_is_said(settings, wanted, message):
    model = adapted(**settings)
    with pytest.raises(RequestError, match=message):
        call(model, inputs(tiny("tiny_sd21"), batch=6), **wanted)


def test_a_unet_without_a_published_encoder():
    config = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8,
              "attention_head_dim": 4, "layers_per_block": 1, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}  # fmt: skip
    with pytest.raises(RequestError, match="no published encoder fits down blocks DownBlock2D, CrossAttnDownBlock2D"):
        adapt(DiffusersUNet(config=config), MVAdapter())
    assert adapt(DiffusersUNet(config=config), MVAdapter(condition=False)).count()["adapter"] > 0


def test_copies_pickles_and_files_carry_it(tmp_path):
    model, given = adapted(reference=True), inputs(tiny("tiny_sd21"), batch=2)
    wanted = {"num_views": 2, "control": torch.rand(2, 6, 1, 1), "ref_latents": torch.randn(1, 4, 8, 8)}
    before = call(model, given, **wanted)
    assert torch.equal(call(copy.deepcopy(model), given, **wanted), before)
    assert torch.equal(call(pickle.loads(pickle.dumps(model)), given, **wanted), before)
    model.save(tmp_path / "mv.safetensors")
    other = adapted(scale=0.0, reference=True)
    other.load(tmp_path / "mv.safetensors")
    assert torch.equal(call(other, given, **wanted), before)


def test_values_of_a_call_may_come_as_its_context():
    model, given = adapted(), inputs(tiny("tiny_sd21"), batch=2)
    with torch.no_grad():
        told_so = model(**given, context={"num_views": 2, "mv_scale": 0.5}).sample
        assert not vars(model.context)
    assert torch.equal(told_so, call(model, given, num_views=2, mv_scale=0.5))
    assert different(told_so, call(model, given, num_views=1, mv_scale=0.5)) > 1e-4


def test_weights_start_as_copies_through_other_adapters():
    peft = pytest.importorskip("peft")
    backbone = tiny("tiny_sd21")
    frozen = backbone.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    backbone.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    model = adapt(backbone, MVAdapter())
    copied = model.bank["default"]["unet/mid_block/attentions/0/transformer_blocks/0/attn1"]  # type: ignore[index]
    assert torch.equal(copied.to_q_mv.weight, frozen)
    assert math.isclose(float(copied.to_out_mv[0].weight.detach().abs().sum()), 0)
