"""Every method on backbones of maps, channels first (LowFormer), last (Hiera) or of tokens that stay a grid (MiT): it
acts, or is refused in one line.

A method joins by existing. ``SETTINGS`` makes it small, and on LowFormer names roles that this has; ``REFUSED`` holds
what each refusal says. What is in neither must work.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from shared import catalog
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.methods import (
    BertBottleneck,
    Compacter,
    Hyperformer,
    LowRankAdapter,
    MoSA,
    ParallelAdapter,
    Pfeiffer,
    SeriesAdapter,
    SparseAdapter,
    VLAdapter,
)
from shared.sites import Site, Sites
from tests.modalities.images.test_lowformer import tiny as lowformer
from tests.modalities.images.test_mit import tiny as mit
from tests.modalities.images.test_timm_hiera import tiny as hiera
from tests.shared.hosts import HOSTS, Host
from tests.shared.test_capabilities import out, rows

MAPS = {"lowformer": lowformer, "hiera": hiera, "mit": mit}
# Of every method that has a field of this name; maps are 16 x 24, 8 x 12, 4 x 6 and 2 x 3, no side the channels of its
# stage, so that a layout taken for another fails.
SMALL: dict[str, Any] = {
    "width": 5, "rank": 2, "reduction": 2, "count": 2, "tokens": 6, "predictor": 16, "middle": (5, 6, 7), "lut": 8,
    "embedding": 6, "hidden": 7, "projected": 5, "prompts": 2, "prompt_rank": 2, "rank_min": 2, "rank_max": 2, "n": 2,
    "groups": 2, "dropout": 0.0,
}  # fmt: skip
ENCODER = {"patch_size": 8, "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "AdapterFusion": {"members": dict.fromkeys("abc")},
    "BertBottleneck": {"place": "houlsby"},
    "BlackVIP": {"encoder": "vit_tiny_patch16_224", "encoder_weights": "random", "encoder_args": ENCODER,
                 "image_size": 64, "trigger": 232},
    "Compacter": {"rank": 1},
    "ComposableSFT": {"epochs": 1, "share": 0.9},
    "Imported": {"changes": {}},
    "MoLA": {"experts": "2"},
}  # fmt: skip
MLP = ("mlp.up", "mlp.down")
ON_LOWFORMER: dict[str, dict[str, Any]] = {
    **{name: {"sublayers": ("mlp",)} for name in ("Compacter", "LowRankAdapter", "VLAdapter")},
    **{name: {"roles": MLP} for name in ("LoRA", "DoRA", "DyLoRA", "BinaryLoRA", "MoSL", "SparseLoRA", "IA3", "CorDA",
                                         "Hydra", "MoLA", "SketchTune")},
    "Hyperformer": {"sublayers": ("mlp",), "depth": "last 1"},
    "MoSA": {"norm": False},
    "S2A": {"depth": [3, 5]},
    "SparseAdapter": {"where": ("mlp",)},
}  # fmt: skip
ON_HIERA: dict[str, dict[str, Any]] = {"Hyperformer": {"depth": "last 1"}}
ON_MIT: dict[str, dict[str, Any]] = {**ON_HIERA, "RAWAdapter": {"head_sees": "plain"}}
REFUSED: dict[str, dict[str, str]] = {
    "AdapterShadow": dict.fromkeys(MAPS, "AdapterShadow is for the backbone SAM"),
    "BinaryAdaptFormer": {"lowformer": "no site of lowformer_b1 has role 'norm' .* with tags .'norm2'"},
    "CloudAdapter": {
        "lowformer": "acts on tokens .BNC or BHWC.; .* has BCHW",
        "mit": "acts on tokens .BNC or BHWC.; .* has B.HW.C",
    },
    "CoOp": dict.fromkeys(MAPS, "no site with role 'embedding'"),
    "CorDA": {"lowformer": "weight of Conv2d; only inputs of linear layers that are called can be measured"},
    "EarthAdapter": dict.fromkeys(MAPS, "acts on tokens; .* gives maps"),
    "Hydra": {"lowformer": "it goes around a linear layer that is called, and this is Conv2d"},
    "MoLA": {"lowformer": "MoLA adapts linear layers"},
    "Pfeiffer": {"lowformer": "has layout BCHW: channels must come last .BNC, BHWC."},
    "Prefix": {"lowformer": "Prefix at .*attn.*: keys .* are no heads of 12 channels .*; use another method"},
    "I2VAdapter": dict.fromkeys(MAPS, "has role 'attention' at depth 'all' with tags .'self'"),
    "MVAdapter": dict.fromkeys(MAPS, "has role 'attention' at depth 'all' with tags .'self'"),
    "Prompt": {
        "lowformer": "BCHW: prompts go between tokens .BNC.",
        "hiera": "BHWC: prompts go between tokens",
        "mit": "B.HW.C: prompts go between tokens",
    },
    "ResAdapter": dict.fromkeys(MAPS, "has role 'conv' at depth 'all' with tags .'resample'"),
    "S2A": {"hiera": "layout BHWC: prompts go between tokens .BNC.", "mit": "layout B.HW.C: prompts go between tokens"},
    "SketchTune": {"lowformer": "SketchTune compresses whole linear layers that are called"},
}
REFUSED["AdapterFusion"] = REFUSED["Pfeiffer"]
NOTHING = ("Full", "Probe", "Imported")  # attach nothing by themselves


def settings(kind: type, host: str) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    own = {"lowformer": ON_LOWFORMER, "hiera": ON_HIERA, "mit": ON_MIT}[host].get(kind.__name__, {})
    small = {n: v for n, v in SMALL.items() if n in fields}
    return small | SETTINGS.get(kind.__name__, {}) | own


def adapted(name: str, host: str) -> tuple[Adapted, tuple[Tensor, ...], Tensor]:
    """The model with the method's adapters moved from their start, its inputs, and what it gave bare."""
    kind = catalog.find(name, "method").load()
    backbone: Any = MAPS[host]()
    inputs = (torch.rand(2, 3, 64, 64 if name == "BlackVIP" else 96),)
    bare, model = out(backbone, inputs), Adapted(backbone)
    if name == "AdapterFusion":
        for member in "abc":
            moved(model, member, Pfeiffer(reduction=2))
    moved(model, "default", kind(**settings(kind, host)), inputs)
    return model.eval(), inputs, bare


def moved(model: Adapted, name: str, method: Any, inputs: tuple[Tensor, ...] | None = None) -> None:
    model.add(method, name=name, example=inputs)
    model.prepare([inputs], lambda batch: rows(model(*batch)).square().mean())
    with torch.no_grad():
        for parameter in model.bank[name].parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)


@pytest.mark.parametrize("host", MAPS)
@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries("method") if entry.name not in NOTHING])
def test_a_method_acts_on_maps_or_is_refused_in_one_line(name: str, host: str) -> None:
    if expected := REFUSED.get(name, {}).get(host):
        with pytest.raises(RequestError, match=expected) as refused:
            adapted(name, host)
        assert "\n" not in str(refused.value)
        return
    model, inputs, bare = adapted(name, host)
    found = out(model, inputs)
    assert torch.isfinite(found).all()
    assert found.shape[1] >= bare.shape[1]
    assert not torch.equal(found[:, : bare.shape[1]], bare)


def test_the_table_names_methods_that_there_are() -> None:
    there = {entry.name for entry in catalog.entries("method")}
    assert {*REFUSED, *SETTINGS, *ON_LOWFORMER, *ON_MIT, *NOTHING} <= there


# -- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        Compacter(n=2, reduction=2, sublayers=("mlp",)),
        LowRankAdapter(reduction=2, sublayers=("mlp",)),
        VLAdapter(reduction=2, sublayers=("mlp",), norm_before=True, norm_after=True),
        Hyperformer(reduction=2, embedding=6, hidden=7, projected=5, norm_before=True, sublayers=("mlp",), depth=5),
        SparseAdapter(width=5, where=("mlp",)),
        SparseAdapter(width=5, form="parallel", norm="out"),
        BertBottleneck(width=5, place="houlsby"),
        MoSA(width=5, norm=False),
        MoSA(width=5, style="pfeiffer"),
        SeriesAdapter(width=5),
        ParallelAdapter(width=5, roles=MLP),
    ],
    ids=lambda method: type(method).__name__,
)
def test_channels_first_gives_what_channels_last_gives(method: Any) -> None:
    """Each adapter of LowFormer's MLPs, against one of the same tensors for maps whose channels come last."""
    sites = method.sites(lowformer().sites())
    first = built(method, sites)
    last = built(method, Sites([dataclasses.replace(site, layout="BHWC") for site in sites]))
    for site in sites:
        x = torch.randn(2, inputs_of(site), 3, 5)
        base = torch.randn(site.width, x.shape[1])
        ours = first[site.key](lambda x, base=base: torch.einsum("oc,bchw->bohw", base, x), x)
        theirs = last[site.key](lambda x, base=base: x @ base.T, x.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(ours, theirs)
        assert (ours - torch.einsum("oc,bchw->bohw", base, x)).abs().max() > 1e-3


def built(method: Any, sites: Sites) -> dict[str, Any]:
    torch.manual_seed(3)
    modules = method.build_all(sites)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.eval().parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return modules


def inputs_of(site: Site) -> int:
    return site.weight.shape[1] if site.parameter else site.width


# -- CLIP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ParallelAdapter", {}, "ParallelAdapter at image/.*query.*: it goes around linear layers that are called, and "
         "1 x 1 convolutions; this is MultiheadAttention, whose weight is read without a call: use roles such"),
        ("SeriesAdapter", {"roles": ("attention.output",)}, "SeriesAdapter at image/.*out_proj .attention.output.: .* "
         "whose weight is read without a call: use roles such as mlp.up and mlp.down"),
        ("SketchTune", {"roles": ("attention.output",)}, "out_proj .attention.output.: SketchTune compresses whole "
         "linear layers that are called"),
        ("Rein", {"link": True}, "Rein link: the model gives Embeddings, no maps for a mask head; use link=false"),
        ("MoSA", {"style": "houlsby"}, "MoSA: text.*resblocks.0.mlp of ViT-B-32 lies in no block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_both_towers_of_clip_says_what_would(name: str, arguments: Any, message: str) -> None:
    backbone, inputs, _ = open_clip()
    model = Adapted(backbone)
    with pytest.raises(RequestError, match=message):
        model.add(catalog.find(name, "method").load()(**arguments), example=inputs)
    assert not model.methods
    assert not any("_port" in module.__dict__ for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "arguments", "modules"),
    [
        ("MoSA", {"width": 5, "dropout": 0.0}, 2 * 2 * 2),
        ("MoSA", {"width": 5, "style": "pfeiffer"}, 2 * 2),
        ("ParallelAdapter", {"width": 5, "roles": MLP}, 2 * 2 * 2),
        ("ParallelAdapter", {"width": 5, "activation": "none"}, 2 * 2 * 3),
        ("Rein", {"tokens": 6, "rank": 2, "link": False}, 2),
    ],
)
def test_what_fits_clip_changes_the_embeddings_of_each_tower_it_adapts(name, arguments, modules) -> None:
    backbone, inputs, _ = open_clip()
    model = Adapted(backbone)
    bare = model(*inputs)
    model.add(catalog.find(name, "method").load()(**arguments), example=inputs)
    assert len(model.bank["default"]) == modules
    with torch.no_grad():
        for parameter in model.bank["default"].parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        found = model.eval()(*inputs)
    assert not torch.equal(found.image, bare.image)
    assert torch.equal(found.text, bare.text) is (name == "Rein")


def open_clip() -> Host:
    return HOSTS["open_clip"]()
