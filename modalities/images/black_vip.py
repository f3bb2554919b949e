"""BlackVIP (Oh et al., CVPR 2023, arXiv 2303.14773): a small network paints a prompt onto each image, for a model that
is known by its answers alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modalities.images.backbones import TimmResNet, TimmViT
from shared.adapter import Adapter
from shared.backbone import fingerprint
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

GROWTH = 32  # the decoder doubles the side five times
WIDTH = 64  # channels of its first layer


class Decoder(nn.Module):
    """features (B, F) and a trigger vector that all images share, reshaped into a cube of ``side`` x ``side`` places,
    to a prompt (B, bands, 32 * side, 32 * side). Names of the tensors are the published ones.

    groups: of the first layer; None: as many as the cube has channels.

    Raises RequestError where the two vectors do not fill such a cube, or its channels or the groups do not divide 64.
    """

    def __init__(self, features: int, trigger: int, side: int = 7, bands: int = 3, groups: int | None = None):
        super().__init__()
        channels, rest = divmod(features + trigger, side**2)
        if trigger < 1 or rest or not channels or WIDTH % channels:
            raise RequestError(
                f"BlackVIP trigger {trigger} beside {features} features: together they must be {side**2} "
                f"(places of the cube) times a divisor of {WIDTH}, as {_nearest(features, side)} would be"
            )
        groups = channels if groups is None else groups
        if groups < 1 or channels % groups or WIDTH % groups:
            raise RequestError(
                f"BlackVIP groups {groups}: use a divisor of the cube's {channels} channels and of {WIDTH}"
            )
        self.side = side
        self.p_trigger = nn.Parameter(torch.rand(1, trigger) / 10)
        layers: list[nn.Module] = [nn.ConvTranspose2d(channels, WIDTH, 2, 2, groups=groups)]
        widths = (WIDTH, 64, 32, 32, 16)
        for stage in range(4):
            if stage:
                layers.append(nn.ConvTranspose2d(widths[stage], widths[stage], 2, 2, groups=widths[stage]))
            inner, outer = widths[stage], widths[stage + 1]
            layers += [nn.ConvTranspose2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer), nn.GELU()]
        layers.append(nn.ConvTranspose2d(widths[-1], bands, 2, 2, bias=False))
        self.body = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        cube = torch.cat([z, self.p_trigger.to(z.dtype).expand(len(z), -1)], dim=1)
        return self.body(cube.view(len(z), -1, self.side, self.side))


def _nearest(features: int, side: int) -> str:
    """Trigger lengths that would fit."""
    whole = [side**2 * channels for channels in (1, 2, 4, 8, 16, 32, 64)]
    return ", ".join(str(size - features) for size in whole if size > features) or "fewer features with any"


class Encoder(nn.Module):
    """A frozen network that says what an image shows (B, width): of a vision transformer the class token before the
    last norm, or the mean of its tokens where it has none; of a ResNet the mean of its last map."""

    def __init__(self, backbone: TimmViT | TimmResNet):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.width = backbone.channels[-1]

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        if isinstance(self.backbone, TimmResNet):
            return self.backbone(image).summary
        tokens, _, extras = self.backbone.embed(image)
        for block in self.backbone.blocks:
            tokens = block(tokens, **extras)
        return tokens[:, 0] if self.backbone.prefix else tokens.mean(1)


class Coordinator(Adapter):
    """The frozen model sees the image plus a prompt that is made of it, within the range that pixels can have.

    low, high: of each band, after normalisation.  eps: strength of the prompt.  size: pixels a side.
    The encoder stands beside the trained tensors: it is frozen, and no file holds it.
    """

    low: Tensor
    high: Tensor

    def __init__(self, encoder: Encoder, decoder: Decoder, low: Tensor, high: Tensor, eps: float, size: int):
        super().__init__()
        self.decoder, self.eps, self.size = decoder, eps, size
        self._frozen = (encoder,)  # a tuple, so that it is no part of this module
        self._seen: tuple[Tensor, int, Tensor] | None = None
        self.register_buffer("low", low.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("high", high.view(1, -1, 1, 1), persistent=False)

    @property
    def encoder(self) -> Encoder:
        return self._frozen[0]

    def forward(self, base: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base(self.prompted(image), *args, **kwargs)

    def prompted(self, image: Tensor) -> Tensor:
        """image (B, bands, size, size) with its prompt. Raises RequestError where it has another size."""
        if image.shape[2:] != (self.size, self.size):
            got = " x ".join(map(str, image.shape[2:]))
            raise RequestError(f"BlackVIP paints {self.size} x {self.size} pixels, the image has {got}: set image_size")
        painted = image + self.eps * self.decoder(self._features(image))
        return torch.minimum(torch.maximum(painted, self.low), self.high)

    def _features(self, image: Tensor) -> Tensor:
        """The encoder's; in training those of the last batch are kept, since a step runs one batch many times."""
        if not self.training or torch.compiler.is_compiling():
            return self.encoder(image)
        if self._seen is None or self._seen[0] is not image or self._seen[1] != image._version:
            self._seen = (image, image._version, self.encoder(image))
        return self._seen[2]

    def train(self, mode: bool = True) -> Coordinator:
        self._seen = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Coordinator:
        self._seen = None
        self.encoder._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class BlackVIP(Method):
    """A prompt as large as the image, painted for each image by a decoder of some 10,000 weights on a frozen encoder.

    Meant for ``BlackBox`` and trained with ``optimiser.type SPSA``; in front of a model that has gradients it can be
    trained by them too. Images must be normalised by the backbone's statistics, which give the range of pixels.
    encoder: timm's name of a vision transformer (published: MAE's ViT-B, also a supervised one) or of a ResNet
    (published too: resnet50 with DINO's weights, which ``encoder_checkpoint`` names, trigger 1088 and groups 32).
    encoder_checkpoint, encoder_weights: as ``TimmViT`` and ``TimmResNet`` take them.  encoder_args: their other
    arguments (patch_size, seed, model_args).
    image_size: pixels a side, a multiple of 32 (published: 224).
    trigger: length of the trained vector beside the encoder's (published: 800 beside 768; in all 1,568 = 32 x 7 x 7).
    groups: of the decoder's first layer; None: as many as the cube has channels (published with transformers).
    eps: strength of the prompt (published: 0.2 to 1 by data set).
    """

    record: ClassVar[Record] = Record(
        categories=("additive/soft prompt", "system/off-site"), acts_on="inputs", form="sequential", mergeable="no",
        trains="trigger + 8928 + 64 * site.width + (256 * (64 // groups - 1) if groups else 0)",
        backward=False, modality="images", spec="blackvip",
        why="its prompt is pixels, not tokens; with SPSA a step only runs the model forward, which may be anywhere; "
        "with groups the formula counts a cube of 64 channels",
    )  # fmt: skip

    encoder: str = "vit_base_patch16_224.mae"
    encoder_checkpoint: str | None = None
    encoder_weights: Literal["pretrained", "random"] = "pretrained"
    encoder_args: dict[str, Any] | None = None
    image_size: int = 224
    trigger: int = 800
    groups: int | None = None
    eps: float = 1.0

    def __post_init__(self) -> None:
        if self.image_size < GROWTH or self.image_size % GROWTH:
            raise RequestError(f"BlackVIP image_size {self.image_size}: use a multiple of {GROWTH}")
        if not 0 <= self.eps < math.inf:
            raise RequestError(f"BlackVIP eps {self.eps}: use a number of at least 0")

    def sites(self, sites: Sites) -> Sites:
        return Sites([site for site in sites if site.role == "model"], sites.owner)

    def build(self, site: Site) -> Coordinator:
        statistics = getattr(site.module, "statistics", None)
        if statistics is None:
            raise RequestError("BlackVIP needs the backbone's mean and deviation of each band; this one states none")
        mean, std = (torch.tensor(values) for values in statistics)
        encoder = Encoder(self._encoder(len(mean)))
        decoder = Decoder(encoder.width, self.trigger, self.image_size // GROWTH, len(mean), self.groups)
        return Coordinator(encoder, decoder, -mean / std, (255 - mean) / std, self.eps, self.image_size)

    def _encoder(self, bands: int) -> TimmViT | TimmResNet:
        kind = TimmResNet if self.encoder.startswith(("resnet", "wide_resnet", "resnext")) else TimmViT
        sized = {} if kind is TimmResNet else {"image_size": self.image_size, "depths": [-1]}
        arguments: dict[str, Any] = {**sized, **(self.encoder_args or {})}
        try:
            return kind(
                bands, name=self.encoder, weights=self.encoder_weights, checkpoint=self.encoder_checkpoint, **arguments
            )
        except RequestError as error:
            told = str(error).replace("checkpoint=FILE", "method.encoder_checkpoint=FILE")
            raise RequestError(f"its encoder: {told}") from error
        except TypeError as error:
            raise RequestError(f"encoder_args {self.encoder_args}: {error}") from error

    def digests(self, model: Any) -> dict[str, str]:
        """The encoder's weights, which a file does not hold."""
        name = next(name for name, method in model.methods.items() if method is self)
        return {"encoder": fingerprint(next(iter(model.bank[name].values())).encoder)}
