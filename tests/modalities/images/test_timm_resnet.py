"""ResNet: timm's own features, sites that are what they say, frozen norms, weights of both namings."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from modalities.images.backbones import TimmResNet
from shared import adapt
from shared.errors import RequestError
from shared.methods import Full, LoRA

SMALL = {"layers": (1, 1, 2, 1), "channels": (8, 12, 16, 20)}


def small(**options: Any) -> TimmResNet:
    return TimmResNet(3, name="resnet18", **{"weights": "random", "model_args": SMALL, **options}).eval()


@pytest.mark.parametrize(
    ("name", "count", "channels"),
    [("resnet18", 11_176_512, (64, 128, 256, 512)), ("resnet50", 23_508_032, (256, 512, 1024, 2048))],
)
def test_published_counts_and_channels(name, count, channels) -> None:
    with torch.device("meta"):
        backbone = TimmResNet(3, name=name)
    assert sum(p.numel() for p in backbone.parameters()) == count
    assert backbone.channels == channels


def test_maps_and_summary_are_timms() -> None:
    ours, image = small(seed=3), torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        features = ours(image)
        intermediate = ours.model.forward_intermediates(image, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features.maps, intermediate[-4:], strict=True))
        assert torch.allclose(features.summary, ours.model(image), atol=1e-6)
    assert [m.shape[1] for m in features.maps] == list(ours.channels)
    assert [tuple(m.shape[2:]) for m in features.maps] == [(13, 18), (7, 9), (4, 5), (2, 3)]


def test_sites_are_where_they_say() -> None:
    backbone = small()
    sites = backbone.sites()
    assert all(backbone.get_submodule(site.path) is site.module for site in sites)
    assert len({site.key for site in sites}) == len(sites)
    blocks = sites.select("block")
    assert [site.tags[0] for site in blocks] == ["stage0", "stage1", "stage2", "stage2", "stage3"]
    widths: list[int] = []
    for site in blocks:
        site.module.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    backbone(torch.randn(1, 3, 64, 64))
    assert widths == [site.width for site in blocks]
    convolutions = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(sites.select("conv")) == len(convolutions)
    assert len(sites.select("conv", tags="downsample")) == 4  # the first stage changes its width here


def test_low_rank_convolutions_attach() -> None:
    model = adapt(small(), LoRA(rank=2, roles=("conv",)))
    model.train()
    model(torch.randn(2, 3, 64, 64)).maps[-1].square().sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())
    assert not any(m.training for m in model.backbone.modules())


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norms_keep_their_statistics_where_asked(norm_eval) -> None:
    model = adapt(small(norm_eval=norm_eval), Full()).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.training for m in norms} == {not norm_eval}
    assert all(p.requires_grad for m in norms for p in m.parameters())
    assert model.backbone.model.layer1.training


def test_a_checkpoint_with_a_classifier_loads(tmp_path) -> None:
    whole = timm.create_model("resnet18", num_classes=5, **SMALL)
    state = whole.state_dict()
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    for name, kept in (("new", state), ("old", old)):
        torch.save(kept, tmp_path / f"{name}.pth")
        ours = small(weights="pretrained", checkpoint=str(tmp_path / f"{name}.pth"))
        assert torch.equal(ours.model.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    torch.save({n: t for n, t in state.items() if n != "layer1.0.bn1.bias"}, tmp_path / "less.pth")
    with pytest.raises(RequestError, match="1 missing .*layer1.0.bn1.bias"):
        small(weights="pretrained", checkpoint=str(tmp_path / "less.pth"))


def test_other_bands_take_an_rgb_kernel(tmp_path) -> None:
    state = timm.create_model("resnet18", num_classes=0, **SMALL).state_dict()
    torch.save(state, tmp_path / "a.pth")
    ours = TimmResNet(6, name="resnet18", checkpoint=str(tmp_path / "a.pth"), model_args=SMALL)
    assert torch.allclose(ours.model.conv1.weight[:, :3], state["conv1.weight"] / 2)
    assert ours.statistics is None
    assert small().statistics is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet19"}, "no ResNet of timm; nearest"),
        ({"name": "vit_tiny_patch16_224"}, "no ResNet of timm"),
        ({"weights": "random", "checkpoint": "a.pth"}, "exclude each other"),
        ({"weights": "random", "model_args": {"in_chans": 3}}, "use the arguments bands"),
        ({"weights": "random", "model_args": {"depth": 3}}, "timm refuses"),
    ],
)
def test_what_is_refused(options, words) -> None:
    with pytest.raises(RequestError, match=words):
        TimmResNet(3, **options)
