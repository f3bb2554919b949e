"""What must hold of Rein, and of its link to a mask head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modalities.images.backbones import TimmViT
from modalities.remote_sensing.heads import LightDecoder, Mask2FormerHead
from modalities.remote_sensing.rein import Rein, Reins, load_official
from shared import RequestError, Site, Sites, adapt
from shared.adapted import Adapted
from shared.backbone import Backbone, Features
from shared.methods import Probe
from shared.training import Optimiser

VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "weights": "random", "normed": False, "patch_size": 8, "image_size": 64,
    "model_args": {"embed_dim": 24, "depth": 4, "num_heads": 2},
}  # fmt: skip
HEAD: dict[str, Any] = {
    "queries": 7, "decoder_layers": 1, "encoder_layers": 1, "width": 32, "feedforward": 32, "points": 64,
    "encoder_feedforward": 32, "linked": True,
}  # fmt: skip
REIN: dict[str, Any] = {"tokens": 6, "rank": 2, "query_width": 32}


def small(linked: bool = False, **settings: Any) -> Adapted:
    backbone = TimmViT(3, **VIT)
    head = Mask2FormerHead(backbone.channels, 3, **HEAD) if linked else None
    return adapt(backbone, Rein(**{**REIN, **settings}), head=head)


def reins(model: Adapted) -> Reins:
    bank: Any = model.bank["default"]
    return bank["model/blocks/0"].reins


def layer(width: int = 8, **settings: Any) -> Reins:
    given = {"tokens": 5, "rank": 3, "patch": 16, "zero": False, "queries": 4, **settings}
    return Reins(3, width, **given).double()


# -- the mechanism -----------------------------------------------------------------------------------------------------


def test_a_block_computes_the_formula() -> None:
    module = layer()
    patches = torch.randn(2, 9, 8, dtype=torch.float64)
    assert isinstance(module.learnable_tokens_a, nn.Parameter)
    assert isinstance(module.learnable_tokens_b, nn.Parameter)
    tokens = module.learnable_tokens_a[1] @ module.learnable_tokens_b[1]
    shares = torch.softmax(torch.einsum("bne,me->bnm", patches, tokens) / math.sqrt(8), -1)
    token2feat, delta_f = module.mlp_token2feat, module.mlp_delta_f
    values = tokens[1:] @ token2feat.weight.t() + token2feat.bias
    delta = torch.einsum("bnm,me->bne", shares[:, :, 1:], values) + patches
    expected = patches + module.scale * (delta @ delta_f.weight.t() + delta_f.bias)
    torch.testing.assert_close(module(patches, 1), expected)


def test_the_first_token_acts_through_the_softmax_alone() -> None:
    """What Wt makes of it does not matter; its own value does, as a place where attention goes."""
    module = layer(rank=None)
    assert isinstance(module.learnable_tokens, nn.Parameter)
    patches, kept = torch.randn(2, 9, 8, dtype=torch.float64), module.learnable_tokens.data.clone()
    direction = torch.linalg.svd(kept[0, 1:])[2][-1]  # seen by no other token: Wt changes on the first one alone
    before = module(patches, 0)
    with torch.no_grad():
        image = module.mlp_token2feat(kept[0, 0])
        module.mlp_token2feat.weight += torch.outer(torch.randn(8, dtype=torch.float64), direction)
        assert not torch.allclose(module.mlp_token2feat(kept[0, 0]), image)
    torch.testing.assert_close(module(patches, 0), before)
    with torch.no_grad():
        module.learnable_tokens[0, 0] = 50 * patches[0, 0]
    after = module(patches, 0)
    assert not torch.allclose(after, before)
    # All attention of the first patch goes to it, and nothing comes back but the patch itself.
    alone = patches[0, 0] + module.scale * module.mlp_delta_f(patches[0, 0])
    torch.testing.assert_close(after[0, 0], alone)


def test_the_class_token_passes_untouched() -> None:
    model = small(link=False)
    module: Any = model.bank["default"]["model/blocks/2"]  # type: ignore[index]
    tokens = torch.randn(2, 65, 24)
    found = module(lambda x: x, tokens)
    assert torch.equal(found[:, 0], tokens[:, 0])
    assert (found[:, 1:] != tokens[:, 1:]).any()


@pytest.mark.parametrize(("rank", "inner"), [(16, math.sqrt(64 * 16)), (None, 64)])
def test_the_start(rank, inner) -> None:
    module = Reins(2, 64, tokens=100, rank=rank, patch=16, zero=False, queries=None)
    bound = math.sqrt(6 / (3 * 16**2 + inner))
    tokens = [p for n, p in module.named_parameters() if n.startswith("learnable_tokens")]
    assert len(tokens) == (1 if rank is None else 2)
    for part in tokens:
        assert 0.98 * bound < part.abs().max() < bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert module.scale == torch.tensor(0.001)
    for weight in (module.mlp_token2feat.weight, module.mlp_delta_f.weight):
        assert weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)  # Kaiming-uniform, a = sqrt 5: 1 / sqrt E


def test_zero_starts_as_the_identity_with_a_fixed_scale() -> None:
    model, image = small(link=False, zero=True).eval(), torch.randn(1, 3, 64, 64)
    assert reins(model).scale == 1.0
    assert not any("scale" in name for name in model.trainable())
    with torch.no_grad():
        ours = model(image)
        with model.disabled():
            frozen = model(image)
    assert all(torch.equal(a, b) for a, b in zip(ours.maps, frozen.maps, strict=True))


@pytest.mark.parametrize(("settings", "count"), [({}, 2_990_081), ({"rank": None}, 5_016_065)])
def test_published_counts(settings, count) -> None:
    with torch.device("meta"):
        model = adapt(TimmViT(3, name="vit_large_patch14_dinov2", image_size=512, patch_size=16), Rein(**settings))
    assert model.count()["adapter"] == count


def test_everything_but_tokens_is_one_for_all_blocks() -> None:
    model = small()
    bank: Any = model.bank["default"]
    assert len({id(adapter.reins.mlp_delta_f.weight) for key, adapter in bank.items() if key != "model"}) == 1
    names = {name.rpartition(".reins.")[2] for name in model.trainable()}
    assert names == {
        "scale", "learnable_tokens_a", "learnable_tokens_b", "mlp_token2feat.weight", "mlp_token2feat.bias",
        "mlp_delta_f.weight", "mlp_delta_f.bias", "transform.weight", "transform.bias", "merge.weight", "merge.bias",
    }  # fmt: skip


def test_tokens_and_scale_have_no_weight_decay() -> None:
    model = small(link=False)
    optimiser, _ = Optimiser(weight_decay=0.1).build(model, 10)
    free = {id(p) for group in optimiser.param_groups if not group["weight_decay"] for p in group["params"]}
    own = {n.rpartition(".reins.")[2] for n, p in model.trainable().items() if id(p) in free}
    assert own == {"scale", "learnable_tokens_a", "learnable_tokens_b", "mlp_token2feat.bias", "mlp_delta_f.bias"}


class Stages(Backbone):
    """A hierarchy of two stages with two blocks each, of 4 and 6 channels, on maps (B, C, h, w)."""

    def __init__(self) -> None:
        super().__init__("stages")
        self.blocks = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in (4, 4, 6, 6))
        self.stem, self.down = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)

    def sites(self) -> Sites:
        widths = (4, 4, 6, 6)
        blocks = [
            Site("block", i, f"blocks.{i}", block, None, layout="BCHW", width=widths[i])
            for i, block in enumerate(self.blocks)
        ]
        return Sites([Site("model", 0, "", self, None), *blocks])

    def forward(self, image: Tensor) -> Features:
        x, maps = self.stem(image), []
        for i, block in enumerate(self.blocks):
            x = block(self.down(x) if i == 2 else x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))


def test_a_hierarchy_has_one_rein_a_stage_and_sums_their_queries() -> None:
    model = adapt(Stages(), Rein(tokens=5, rank=2, query_width=7), example=(torch.randn(1, 3, 32, 32),)).eval()
    bank: Any = model.bank["default"]
    first, second = bank["blocks/0"].reins, bank["blocks/3"].reins
    assert first is bank["blocks/1"].reins
    assert second is bank["blocks/2"].reins
    assert (first.mlp_delta_f.in_features, second.mlp_delta_f.in_features) == (4, 6)
    features: Any = model(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape) for m in features.maps] == [(2, 4, 8, 8)] * 2 + [(2, 6, 4, 4)] * 2
    torch.testing.assert_close(features.queries[1], first.queries() + second.queries())
    maps = torch.randn(2, 6, 4, 4)
    refined = bank["blocks/3"](lambda x: x, maps)
    torch.testing.assert_close(refined.flatten(2).transpose(1, 2), second(maps.flatten(2).transpose(1, 2), 1))


# -- the link ----------------------------------------------------------------------------------------------------------


def test_queries_are_greatest_mean_and_last_of_each_channel_in_turn() -> None:
    module = layer()
    found = module.transform(module.tokens(slice(None)))  # (blocks, tokens, channels)
    columns = []
    for channel in range(4):
        own = found[:, :, channel]
        columns += [own.max(0).values, own.mean(0), own[-1]]
    torch.testing.assert_close(module.queries(), module.merge(torch.stack(columns, 1)))


def test_the_linked_head_answers_to_the_adapters_queries() -> None:
    model, image = small(linked=True).eval(), torch.randn(2, 3, 64, 64)
    output = model(image)
    assert [tuple(c.shape) for c in output.classes] == [(2, 6, 4)] * 2
    head: Any = model.head
    assert not any("queries_embedder" in name for name in model.trained_state())
    before = output.masks[-1].detach()
    with torch.no_grad():
        reins(model).merge.bias.add_(1.0)  # of the backbone's maps nothing depends on it
    assert not torch.allclose(model(image).masks[-1], before, atol=1e-4)
    # The decoder alone, with these queries as positions and their linear image as contents.
    features = model.backbone(image)
    queries = reins(model).queries()
    plain = Mask2FormerHead((24,) * 4, 3, **{**HEAD, "linked": False, "queries": 6}).eval()
    own = {n: t for n, t in head.state_dict().items() if not n.startswith("queries_to_features")}
    own |= {"transformer.queries_embedder.weight": queries.detach()}
    own |= {"transformer.queries_features.weight": head.queries_to_features(queries).detach()}
    plain.load_state_dict(own)
    again = plain(features, (64, 64))
    torch.testing.assert_close(again.masks[-1], model(image).masks[-1])


def test_every_tensor_of_adapter_and_linked_head_trains() -> None:
    model = small(linked=True).train()
    head: Any = model.head
    head.loss(model(torch.randn(2, 3, 64, 64)), torch.randint(0, 3, (2, 64, 64))).backward()
    assert [n for n, p in model.trainable().items() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_linked_head_without_queries_is_refused_in_training() -> None:
    backbone = TimmViT(3, **VIT)
    model = adapt(backbone, Probe(), head=Mask2FormerHead(backbone.channels, 3, **HEAD)).train()
    with pytest.raises(RequestError, match=r"head.linked: no adapter makes its queries"):
        model(torch.randn(1, 3, 64, 64))
    linked = small(linked=True).eval()
    with linked.disabled():  # the bare model answers to as many empty queries
        assert linked(torch.randn(1, 3, 64, 64)).classes[0].shape == (1, 7, 4)
    with pytest.raises(RequestError, match="head.width 32: the method makes queries of width 16"):
        small(linked=True, query_width=16)(torch.randn(1, 3, 64, 64))


def test_an_unlinked_head_takes_the_features_as_any_other() -> None:
    backbone = TimmViT(3, **VIT)
    model = adapt(backbone, Rein(**REIN), head=LightDecoder(backbone.channels, 3, width=8))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


# -- released weights --------------------------------------------------------------------------------------------------


def released(layers: int = 4, width: int = 24) -> dict[str, Tensor]:
    """The layout of the releases: adapter and head alone."""
    shapes = {
        "scale": (), "learnable_tokens_a": (layers, 6, 2), "learnable_tokens_b": (layers, 2, width),
        "mlp_token2feat.weight": (width, width), "mlp_token2feat.bias": (width,),
        "mlp_delta_f.weight": (width, width), "mlp_delta_f.bias": (width,),
        "transform.weight": (32, width), "transform.bias": (32,), "merge.weight": (32, 96), "merge.bias": (32,),
    }  # fmt: skip
    head = {"querys2feat.weight": (32, 32), "querys2feat.bias": (32,), "cls_embed.weight": (4, 32)}
    return {f"backbone.reins.{n}": torch.randn(s) for n, s in shapes.items()} | {
        f"decode_head.{n}": torch.randn(s) for n, s in head.items()
    }


def test_released_weights_load_by_their_names(tmp_path) -> None:
    model, state = small(linked=True), released()
    torch.save({"state_dict": state}, tmp_path / "released.pth")
    assert load_official(model, tmp_path / "released.pth") == ["decode_head.cls_embed.weight"]
    module, head = reins(model), model.head
    assert torch.equal(module.learnable_tokens_b, state["backbone.reins.learnable_tokens_b"])  # type: ignore[arg-type]
    assert torch.equal(module.merge.weight, state["backbone.reins.merge.weight"])
    assert torch.equal(head.queries_to_features.weight, state["decode_head.querys2feat.weight"])  # type: ignore[union-attr]
    headless = small()
    assert len(load_official(headless, tmp_path / "released.pth")) == 3
    assert torch.equal(reins(headless).mlp_delta_f.bias, state["backbone.reins.mlp_delta_f.bias"])


def test_released_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    model, state = small(), released()
    cases = {
        "1 missing": {n: t for n, t in state.items() if n != "backbone.reins.scale"},
        "of another shape": state | {"backbone.reins.merge.bias": torch.ones(3)},
        "1 unexpected": state | {"backbone.reins.other": torch.ones(3)},
        "is the adapter's": {"decode_head.a": torch.ones(1), "backbone.b": torch.ones(1)},
    }
    before = {n: t.clone() for n, t in model.trained_state().items()}
    for message, bad in cases.items():
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(RequestError, match=message):
            load_official(model, tmp_path / "bad.pth")
    assert all(torch.equal(before[n], t) for n, t in model.trained_state().items())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens": 1}, "tokens 1: use at least 2"),
        ({"rank": -1}, "rank -1: use at least 1"),
        ({"query_width": 0}, "query_width 0"),
        ({"patch": 0}, "patch 0"),
    ],
)
def test_impossible_settings(bad, message) -> None:
    with pytest.raises(RequestError, match=message):
        Rein(**bad)
