"""The small network of AdapterShadow that prompts: an EfficientNet with a light decoder, image to one map of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones.inputs import library, nearest
from shared import weights as w
from shared.errors import RequestError

WIDTH = 128  # channels the decoder begins with


class Up(nn.Module):
    """To the size of a finer map, joined with it, then two 3 x 3 convolutions with batch norm and leaky ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self._net = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        x = F.interpolate(x, finer.shape[-2:], mode="bilinear", align_corners=True)
        return self._net(torch.cat([x, finer], 1))


class ShadowDetector(nn.Module):
    """Image (B, 3, h, w) to logits (B, 1, *size). Module names are those of the released weights.

    It reads an EfficientNet's maps at strides 2, 4, 8 and 16 and, at 32, its last convolution before the norm.

    name: timm's, of an EfficientNet.  weights: "pretrained" (``checkpoint``, else timm's hub) or "random" (``seed``).
    train_encoder: whether the EfficientNet trains; if not it also stays in eval mode.

    Raises RequestError where the name or the weights do not fit.
    """

    def __init__(self, name: str, weights: str, checkpoint: str | None, seed: int, train_encoder: bool):
        super().__init__()
        self.encoder: Any = _encoder(name, weights, checkpoint, seed)
        self.train_encoder = train_encoder
        self.encoder.requires_grad_(train_encoder)
        self.encoder.bn2.requires_grad_(False)  # it comes after the last map that is read
        stages = {each["module"]: each["num_chs"] for each in self.encoder.feature_info if each["reduction"] <= 16}
        self.stages = tuple(int(module.rpartition(".")[2]) for module in stages)
        finer = list(stages.values())
        self.conv = nn.Conv2d(self.encoder.conv_head.out_channels, WIDTH, 1, padding=1)
        widths = [WIDTH >> i for i in range(5)]
        self.up1, self.up2, self.up3, self.up4 = (
            Up(widths[i] + skip, widths[i + 1]) for i, skip in enumerate(reversed(finer))
        )
        self.align4 = nn.Sequential(nn.Conv2d(widths[4], 32, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU())
        self.predict_mask = nn.Sequential(
            nn.Conv2d(32, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Conv2d(8, 1, 1)
        )

    def train(self, mode: bool = True) -> ShadowDetector:
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        return self

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        maps, last = self._encode(image)
        x = self.conv(last)
        for up, finer in zip((self.up1, self.up2, self.up3, self.up4), reversed(maps), strict=True):
            x = up(x, finer)
        return F.interpolate(self.predict_mask(self.align4(x)), size, mode="bilinear", align_corners=True)

    def _encode(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """The four finer maps, and the last convolution's output."""
        x, maps = self.encoder.bn1(self.encoder.conv_stem(image)), []
        for place, stage in enumerate(self.encoder.blocks):
            x = stage(x)
            if place in self.stages:
                maps.append(x)
        return maps, self.encoder.conv_head(x)


def _encoder(name: str, weights: str, checkpoint: str | None, seed: int) -> Any:
    """timm's EfficientNet without what comes after its last convolution."""
    timm = library("timm")
    known = [model for model in timm.list_models("*efficientnet*") if timm.is_model(model)]
    if name.partition(".")[0] not in known:
        raise RequestError(f"detector {name}: no EfficientNet of timm{nearest(name.partition('.')[0], known)}")
    model = w.build(lambda: timm.create_model(name, pretrained=False, num_classes=0, global_pool=""), seed)
    stages = [each["module"] for each in getattr(model, "feature_info", ())]
    if len(stages) != 5 or not all(s.startswith("blocks.") for s in stages) or not hasattr(model, "conv_head"):
        raise RequestError(f"detector {name}: five stages and a last convolution are needed, as in tf_efficientnet_b1")
    if weights == "pretrained" and not w.is_meta(model):
        config = timm.get_pretrained_cfg(name)
        if checkpoint is None and not (config and config.hf_hub_id):
            raise RequestError(f"detector {name}: timm has no weights for it; give detector_checkpoint=FILE")
        files = ("model.safetensors", "pytorch_model.bin")
        file = Path(checkpoint) if checkpoint is not None else w.fetch(name, config.hf_hub_id, files)
        state = {key: tensor for key, tensor in w.read(file).items() if not key.startswith("classifier.")}
        w.fill(model, state, f"detector {name}", f"file: {file}")
    return model
