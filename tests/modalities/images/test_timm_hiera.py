"""SAM 2's Hiera: timm's numbers, sites that are what they say, adapters on them, the names of released files."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from modalities.images.backbones import TimmHiera
from modalities.remote_sensing.peftcd import PeftCD
from shared import adapt
from shared.errors import RequestError
from shared.methods import LoRA

# Four stages, of which the third sees everything in its last block; windows of 2 and 4 that a grid does not divide.
TINY: dict[str, Any] = {
    "embed_dim": 8, "num_heads": 1, "stages": (1, 2, 2, 1), "global_att_blocks": (4,), "window_spec": (8, 4, 4, 2),
}  # fmt: skip


def tiny(bands: int = 3, **options: Any) -> TimmHiera:
    return TimmHiera(bands, name="sam2_hiera_tiny", weights="random", model_args=TINY, **options).eval()


def test_channels_and_parameters_are_those_of_sam_2() -> None:
    with torch.device("meta"):
        large = TimmHiera(3, name="sam2_hiera_large")
    assert large.channels == (144, 288, 576, 1152)
    assert sum(p.numel() for p in large.parameters()) == 212_149_296
    assert [len([s for s in large.sites().select("block") if f"stage{i}" in s.tags]) for i in range(4)] == [2, 6, 36, 4]
    inputs = [site.inputs for site in large.sites().select("block")]
    assert inputs == [144] * 3 + [288] * 6 + [576] * 36 + [1152] * 3


def test_maps_are_timms_at_strides_of_4_to_32() -> None:
    ours, image = tiny(seed=3), torch.randn(2, 3, 64, 96)
    theirs: Any = timm.create_model("sam2_hiera_tiny", num_classes=0, **TINY).eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    with torch.no_grad():
        features = ours(image)
        expected = theirs.forward_intermediates(image, intermediates_only=True)
    for stage, (found, wanted) in enumerate(zip(features.maps, expected, strict=True)):
        assert torch.equal(found, wanted)
        assert found.shape == (2, ours.channels[stage], 64 >> (stage + 2), 96 >> (stage + 2))
    torch.testing.assert_close(features.summary, features.maps[-1].mean((2, 3)))


def test_sites_name_what_flows_there() -> None:
    backbone = tiny()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sites = [site for site in backbone.sites() if site.layout == "BHWC" and site.rows is None and site.role != "norm"]
    for site in sites:
        key = site.key
        site.module.register_forward_hook(lambda _, args, out, key=key: seen.update({key: (args[0], out)}))
    backbone(torch.randn(1, 3, 32, 64))
    assert len(sites) == 6 * 7 + 3
    for site in sites:
        given, out = seen[site.key]
        assert (given.ndim, out.ndim) == (4, 4)
        assert (given.shape[-1], out.shape[-1]) == (site.inputs or site.width, site.width), site.key


@pytest.mark.parametrize("method", [PeftCD(width=4), LoRA(rank=2, roles=("attention.query", "mlp.up", "linear"))])
def test_adapters_act_on_every_block_and_train_alone(method: Any) -> None:
    model = adapt(tiny(), method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), model.disabled():
        bare = model(image)
    found = model(image)
    assert all(float((a - b).abs().max().detach()) > 1e-4 for a, b in zip(found.maps, bare.maps, strict=True))
    torch.stack([m.sum() for m in found.maps]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.trainable().values())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_files_of_timm_and_of_sam_2_load_and_others_are_refused(tmp_path) -> None:
    source = tiny(seed=5)
    state = {name: tensor.contiguous() for name, tensor in source.model.state_dict().items()}
    save_file(state | {"head.norm.weight": torch.ones(64)}, tmp_path / "timm.safetensors")
    official = {f"image_encoder.trunk.{_named(name)}": tensor for name, tensor in state.items()}
    torch.save({"model": official | {"memory_encoder.weight": torch.ones(1)}}, tmp_path / "sam2.pt")
    image = torch.randn(1, 3, 32, 32)
    for file in ("timm.safetensors", "sam2.pt"):
        loaded = TimmHiera(3, name="sam2_hiera_tiny", checkpoint=str(tmp_path / file), model_args=TINY).eval()
        assert torch.equal(loaded(image).maps[-1], source(image).maps[-1])
    four = TimmHiera(4, name="sam2_hiera_tiny", checkpoint=str(tmp_path / "sam2.pt"), model_args=TINY)
    assert four.model.patch_embed.proj.weight.shape[1] == 4
    save_file({n: t for n, t in state.items() if n != "pos_embed"}, tmp_path / "short.safetensors")
    with pytest.raises(RequestError, match=r"1 missing \(pos_embed\)"):
        TimmHiera(3, name="sam2_hiera_tiny", checkpoint=str(tmp_path / "short.safetensors"), model_args=TINY)


def _named(name: str) -> str:
    return name.replace("mlp.fc1", "mlp.layers.0").replace("mlp.fc2", "mlp.layers.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sam2_hiera_huge"}, "sam2_hiera_huge: no Hiera of timm's SAM 2; nearest"),
        ({"bands": 0}, "bands 0: at least 1"),
        ({"weights": "random", "checkpoint": "a.pt"}, "exclude each other"),
        ({"model_args": {"in_chans": 4}}, "use the arguments bands and weights"),
        ({"weights": "random", "model_args": {"wide": 4}}, "timm refuses"),
    ],
)
def test_impossible_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TimmHiera(options.pop("bands", 3), **{"name": "sam2_hiera_tiny", **options})


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="image height 48 is no multiple of its patch of 32 pixels"):
        tiny()(torch.randn(1, 3, 48, 64))
    with pytest.raises(RequestError, match="3 bands"):
        tiny()(torch.randn(1, 4, 32, 32))
