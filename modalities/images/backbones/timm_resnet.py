"""timm's ResNets (He et al., 2016) as a frozen backbone of four maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from torch import Tensor, nn

from modalities.images.backbones.inputs import check_image, library
from modalities.images.backbones.timm_stages import _TimmStages
from shared.backbone import Features
from shared.sites import Site, Sites, norm_sites


class TimmResNet(_TimmStages):
    """timm's ``ResNet`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, and the last one's mean
    as the summary. Sizes that the strides do not divide are rounded up by the convolutions.

    bands: channels of the image.
    """

    kind, family, entry = "ResNet of timm", "resnet", "conv1.weight"

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
        super().__init__(bands, name, weights, checkpoint, seed, model_args)
        self.channels, self.norm_eval = self.channels[-4:], norm_eval  # the first is the stem's

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

    def create(self, name: str, **arguments: Any) -> Any:
        # timm starts the last norm of each branch at zero: frozen, such a random network would never use its branches.
        return library("timm").create_model(name, num_classes=0, **{"zero_init_last": False, **arguments})

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old files have no count of batches, which only norms without a momentum of their own need."""
        mine = self.model.state_dict()
        return {**state, **{n: t for n, t in mine.items() if n.endswith("num_batches_tracked") and n not in state}}

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)


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
