"""timm's ResNets (He et al., 2016) as a frozen backbone of four maps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modalities.images.backbones.inputs import byte_statistics, check_image, library, nearest
from modalities.images.backbones.timm_hub import load
from shared import weights as w
from shared.backbone import Backbone, Features
from shared.errors import RequestError
from shared.sites import Site, Sites, norm_sites

ENTRY = "conv1.weight"


class TimmResNet(Backbone):
    """timm's ``ResNet`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, and the last one's mean
    as the summary. Sizes that the strides do not divide are rounded up by the convolutions.

    bands: channels of the image.
    """

    model: Any

    def __init__(
        self,
        bands: int,
        *,
        name: str = "resnet50",
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
        norm_eval: bool = False,
        model_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: timm's model name, with a weights tag where wanted ("resnet50.tv_in1k", torchvision's first).
            weights: "pretrained" (``checkpoint``, else timm's hub) or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file, named as timm or torchvision do.
            seed: of the random weights.
            norm_eval: batch norms keep their running statistics where the backbone trains, as in detection.
            model_args: further arguments of timm's class, such as layers, channels.

        Raises RequestError where the name, an argument or the weights do not fit.
        """
        if bands < 1:
            raise RequestError(f"{name}: bands {bands}: at least 1 is needed")
        if weights == "random" and checkpoint is not None:
            raise RequestError(f"{name}: weights 'random' and checkpoint {checkpoint!r} exclude each other")
        super().__init__(name)
        self.model = w.build(lambda: _create(name, bands, model_args or {}), seed)
        self.bands, self.norm_eval = bands, norm_eval
        self.channels = tuple(stage["num_chs"] for stage in self.model.feature_info[-4:])
        self.statistics = byte_statistics(self.model.pretrained_cfg, bands)
        self.source = f"random (seed {seed})"
        if weights == "pretrained":
            renamed = partial(_renamed, self.model)
            self.source = load(self.model, name, bands, checkpoint, entry=ENTRY, renamed=renamed)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to maps (B, channels[s], H / 2^(s+2), W / 2^(s+2)), sizes rounded up."""
        check_image(self.name, image, self.bands)
        model, maps = self.model, []
        x = model.maxpool(model.act1(model.bn1(model.conv1(image))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of 64 x 96 pixels, of about unit variance."""
        image = torch.randn(2, self.bands, 64, 96, generator=torch.Generator().manual_seed(0), device="cpu")
        return (image.to(next(self.model.parameters())),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.bands} bands, weights: {self.source})"


def _create(name: str, bands: int, model_args: dict[str, Any]) -> Any:
    timm = library("timm")
    known = timm.list_models(module="resnet")
    if name.partition(".")[0] not in known:
        raise RequestError(f"{name}: no ResNet of timm{nearest(name, known)}")
    if taken := [key for key in model_args if key in ("in_chans", "num_classes", "pretrained", "output_stride")]:
        raise RequestError(f"{name}: model_args {taken}: use the arguments bands and weights; strides are fixed")
    try:
        # timm starts the last norm of each branch at zero: frozen, such a random network would never use its branches.
        return timm.create_model(name, in_chans=bands, num_classes=0, **{"zero_init_last": False, **model_args})
    except (TypeError, AssertionError, ValueError, IndexError, RuntimeError) as error:
        raise RequestError(f"{name}: timm refuses {model_args}: {error}") from error


def _renamed(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old files have no count of batches, which only norms without a momentum of their own need."""
    counts = {n: t for n, t in model.state_dict().items() if n.endswith("num_batches_tracked") and n not in state}
    return {**state, **counts}


def _sites(backbone: TimmResNet) -> Iterator[Site]:
    model, depth = backbone.model, -1
    yield Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands)
    yield from _layers("model.conv1", model.conv1, depth, "patch_embed")
    yield from _layers("model.bn1", model.bn1, depth, "patch_embed")
    for s in range(4):
        for i, block in enumerate(model.get_submodule(f"layer{s + 1}")):
            depth += 1
            path, width = f"model.layer{s + 1}.{i}", backbone.channels[s]
            more: dict[str, Any] = {"inputs": block.conv1.in_channels, "tags": (f"stage{s}",)}
            yield Site("block", depth, path, block, parameter=None, layout="BCHW", width=width, **more)
            for name, part in block.named_children():
                yield from _layers(f"{path}.{name}", part, depth, *(("downsample",) if name == "downsample" else ()))


def _layers(path: str, part: nn.Module, depth: int, *tags: str) -> Iterator[Site]:
    """The convolutions and batch norms of a part."""
    for name, module in part.named_modules():
        where = f"{path}.{name}".rstrip(".")
        if isinstance(module, nn.Conv2d):
            yield Site("conv", depth, where, module, layout="BCHW", width=module.out_channels, tags=tags)
        elif isinstance(module, nn.BatchNorm2d):
            yield from norm_sites(where, module, depth, 0, *tags, layout="BCHW")
