"""MiT: transformers' numbers, published counts, sites, files with a head or without, RAW-Adapter with SegFormer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from modalities.images.backbones import MiT
from modalities.images.raw_adapter import RAWAdapter
from modalities.remote_sensing.heads import LightDecoder
from shared import adapt
from shared.errors import RequestError
from shared.methods import AdaptFormer, LoRA, Prompt

TINY: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 2, 4]}
RAW: dict[str, Any] = {"width": 4, "middle": (5, 6, 7), "predictor": 16, "lut": 8, "head_sees": "plain"}


def tiny(**options: Any) -> MiT:
    return MiT(3, **{"weights": "random", "model_args": TINY, **options}).eval()


def segformer(**changes: Any) -> SegformerForSemanticSegmentation:
    torch.manual_seed(4)
    return SegformerForSemanticSegmentation(SegformerConfig(**{**TINY, "num_labels": 5, **changes})).eval()


def test_maps_are_those_transformers_gives_its_head() -> None:
    theirs, ours = segformer(), tiny()
    ours.model.load_state_dict(theirs.segformer.state_dict())
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = ours(image)
        expected = theirs.segformer(image, output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in features.maps] == [(2, c, 16 >> i, 24 >> i) for i, c in enumerate(ours.channels)]
    assert all(torch.equal(a, b) for a, b in zip(features.maps, expected, strict=True))
    assert torch.equal(features.summary, features.maps[-1].mean((2, 3)))


def test_published_sizes_and_what_raw_adapter_adds_to_them() -> None:
    for name, total in (("mit_b0", 3_319_392), ("mit_b3", 44_072_128), ("mit_b5", 81_443_008)):
        with torch.device("meta"):
            backbone = MiT(3, name=name)
        assert sum(p.numel() for p in backbone.parameters()) == total
        assert backbone.source == f"hub: nvidia/{name.replace('_', '-')} (not loaded: meta device)"
    for name, settings, total in (
        ("mit_b3", {"width": 16, "middle": (64, 96, 128)}, 298_709),
        ("mit_b5", {"width": 16, "middle": (64, 96, 128)}, 298_709),
    ):
        with torch.device("meta"):
            model = adapt(MiT(3, name=name), RAWAdapter(**settings, head_sees="plain"))
        kept = [b for n, b in model.bank.named_buffers() if n.endswith("_base")]
        assert sum(t.numel() for t in [*model.bank.parameters(), *kept]) == total


@pytest.mark.parametrize("head", [True, False])
def test_files_of_transformers_load_and_others_are_refused(head: bool, tmp_path: Path) -> None:
    theirs = segformer()
    (theirs if head else theirs.segformer).save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")
    ours = tiny(weights="pretrained", checkpoint=file)
    assert ours.source == f"file: {file}"
    mine, right = ours.model.state_dict(), theirs.segformer.state_dict()
    assert all(torch.equal(mine[n], t) for n, t in right.items())
    with pytest.raises(RequestError, match="no whole SegFormer of the size mit_b0|does not fit mit_b0"):
        tiny(weights="pretrained", checkpoint=file, model_args={**TINY, "hidden_sizes": [8, 12, 16, 24]})
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="no whole SegFormer of the size mit_b0"):
        tiny(weights="pretrained", checkpoint=str(tmp_path / "other.safetensors"))


def test_sites_are_what_they_say_and_adapters_act_on_each_role() -> None:
    backbone = tiny()
    sites = backbone.sites()
    assert all(backbone.get_submodule(site.path) is site.module for site in sites)
    assert len({site.key for site in sites}) == len(sites)
    assert [len(sites.select("block", tags=f"stage{s}")) for s in range(4)] == [1, 1, 2, 1]
    assert {site.path for site in sites.select("conv", tags="downsample")} == {
        f"model.stages.{s}.patch_embeddings.proj" for s in (1, 2, 3)
    }
    model = adapt(backbone, LoRA(rank=2, roles=("attention.query", "attention.output", "mlp.up", "conv")))
    assert len(list(model.bank["default"].children())) == 3 * 5 + 4 + 4 + 5  # three reductions and one more in stage 3
    assert len(adapt(tiny(), AdaptFormer(width=4)).bank["default"]) == 5
    with pytest.raises(RequestError, match="has layout B.HW.C: prompts go between tokens"):
        adapt(tiny(), Prompt(count=2))


def test_the_head_sees_the_plain_map_and_the_next_stage_the_merged_one() -> None:
    """As published for the MiTs: a stage's output is taken before it is merged."""
    model, bare = adapt(tiny(), RAWAdapter(**RAW)), tiny()
    image = torch.rand(2, 3, 64, 96)
    develop, *merges = model.bank["default"].values()
    with torch.no_grad():
        found = model.eval()(image).maps
        images = develop.pre_encoder(image)
        x, side, expected = images[-1], develop.model_adapter(images), []
        for s, stage in enumerate(bare.model.stages):
            x = stage(x)
            expected.append(x)
            if s < 3:
                x, side = merges[s].merge(x, side)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = [bare.model.stages[0](images[-1])]
    assert torch.equal(found[0], plain[0])
    with torch.no_grad():
        assert (found[1] - bare.model.stages[1](plain[0])).abs().max() > 1e-4
    with pytest.raises(RequestError, match="head_sees merged: .*; use head_sees=plain, as published"):
        adapt(tiny(), RAWAdapter(**{**RAW, "head_sees": "merged"}))


@pytest.mark.parametrize("frozen", [True, False])
def test_segmentation_of_raw_learns(frozen: bool) -> None:
    torch.manual_seed(0)
    backbone = tiny()
    model = adapt(backbone, RAWAdapter(**RAW, freeze_backbone=frozen), head=LightDecoder(backbone.channels, 2, width=8))
    model.train()
    image = 0.1 * torch.rand(2, 3, 64, 64)  # low light
    mask = (image.mean(1) > 0.05).long()
    image[:, :, :, 32:] *= 3
    mask[:, :, 32:], mask[:, :, :32] = 1, 0
    optimiser, losses = torch.optim.Adam(model.trainable().values(), 1e-2), []
    before = {n: p.clone() for n, p in backbone.named_parameters()}
    for _ in range(10):
        output = model(image)
        loss = F.cross_entropy(output, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    adapters = {n: p for n, p in model.trainable().items() if n.startswith("adapter.")}
    assert all(p.grad is not None for p in adapters.values())
    assert all(torch.equal(p, before[n]) for n, p in backbone.named_parameters()) is frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mit_b9"}, "mit_b9: no Mix Transformer; nearest: mit_b"),
        ({"model_args": {"widths": [1]}}, "model_args has no 'widths'"),
        ({"model_args": {"hidden_sizes": [8, 12]}}, "transformers refuses"),
        ({"checkpoint": "x.pth"}, "exclude each other"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(RequestError, match=message):
        tiny(**options)
