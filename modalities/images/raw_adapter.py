"""RAW-Adapter: a learnable image-signal-processor, and side features of its stages merged into the network's.

Cui & Harada, RAW-Adapter: Adapting Pre-trained Visual Model to Camera RAW Images, ECCV 2024 (arXiv 2408.14802).
Module names are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modalities.images.raw_isp import InputAdapter
from shared import weights
from shared.adapter import Adapter, WeightAdapter
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.taxonomy import Record

RANGE = 1e-3  # beyond 0 and 1 that a resampled image may be by rounding
MERGED = 3  # stages whose outputs are merged with the side features


class SideBlock(nn.Module):
    """A basic block (He et al., 2016) that keeps its channels."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()


class ModelAdapter(nn.Module):
    """Images (B, 3, H, W), as many as given, to side features (B, width, H / 4, W / 4), sizes rounded up."""

    def __init__(self, images: int, width: int):
        super().__init__()
        self.images = images
        for i in range(images):
            self.add_module(f"conv_{i + 1}", nn.Conv2d(3, 3, 3, 2, 1, bias=False))
        self.uni_conv = nn.Conv2d(3 * images, width, 7, 2, 3, bias=False)
        self.res_1, self.res_2 = SideBlock(width), SideBlock(width)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        halves = [self.get_submodule(f"conv_{i + 1}")(image) for i, image in enumerate(images[: self.images])]
        return self.res_2(self.res_1(self.uni_conv(torch.cat(halves, 1))))


class Develop(Adapter):
    """Around the whole network: it sees the processed image; the side features start from those before it."""

    def __init__(self, pre_encoder: InputAdapter, model_adapter: ModelAdapter):
        super().__init__()
        self.pre_encoder, self.model_adapter = pre_encoder, model_adapter

    def forward(self, base: Callable[..., Any], image: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_compiling() or vars(self.context).get("any_range")):
            check_range(image)
        images = self.pre_encoder(image)
        self.context.raw_side = self.model_adapter(images)
        return base(images[-1], *args, **kwargs)


def check_range(image: Tensor) -> None:
    """Raises RequestError unless the values are linear ones from 0 to 1, but for rounding: others train wrongly, and
    without a word, since the stages cut what is outside."""
    least, most = (float(value) for value in image.detach().aminmax())
    if not (least >= -RANGE and most <= 1 + RANGE):
        found = "NaN" if least != least or most != most else f"values from {least:.4g} to {most:.4g}"
        raise RequestError(
            f"RAWAdapter: the image holds {found}; it takes linear values from 0 (black level) to 1 (white level): use "
            "the data RawFolders with the sensor's black and white, or normalisation {mean: [0, 0, 0], std: [255, 255, "
            "255]} for demosaiced images"
        )


class Merge(Adapter):
    """After a stage: ``m = conv_1(cat[F, A])``, then ``F + ratio * conv_2(m)``, and ``conv_3(m)`` for the next stage.

    features: channels of F.  side: of A.  middle: of m.  last: there is no next one.  layout: of F, BCHW or BHWC.
    before: it is around the next stage's first block, whose input it merges, instead of the stage's last.
    """

    def __init__(
        self, features: int, side: int, middle: int, *, ratio: float, last: bool, layout: str, before: bool = False
    ):
        super().__init__()
        self.ratio, self.channels_last, self.before = ratio, layout == "BHWC", before
        self.conv_1 = nn.Conv2d(features + side, middle, 1, bias=False)
        self.conv_2 = nn.Conv2d(middle, features, 1, bias=False)
        self.conv_3 = None if last else nn.Conv2d(middle, 2 * side, 3, 2, 1, bias=False)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.before:
            return base(self._merged(args[0]), *args[1:], **kwargs)
        return self._merged(base(*args, **kwargs))

    def _merged(self, features: Tensor) -> Tensor:
        features = features.permute(0, 3, 1, 2) if self.channels_last else features
        features, self.context.raw_side = self.merge(features, self.context.raw_side)
        return features.permute(0, 2, 3, 1) if self.channels_last else features

    def merge(self, features: Tensor, side: Tensor) -> tuple[Tensor, Tensor | None]:
        """features (B, C, h, w) merged, and side (B, a, h, w) at half the sides; None after the last merge."""
        if features.shape[2:] != side.shape[2:]:
            have, want = (f"{height} x {width}" for height, width in (features.shape[2:], side.shape[2:]))
            raise RequestError(
                f"RAWAdapter: a stage's grid is {have}, the side features' {want}: it takes strides of 4, 8 and 16 and "
                "images whose sides are multiples of 32, or grids that are rounded up"
            )
        mixed = self.conv_1(torch.cat([features, side.to(features.dtype)], 1))
        further = None if self.conv_3 is None else self.conv_3(mixed)
        return features + self.ratio * self.conv_2(mixed), further


@dataclass(frozen=True, kw_only=True)
class RAWAdapter(Method):
    """The published system, on any network of four stages at strides 4, 8, 16 and 32. Not the identity at the start.

    Its input is a demosaiced RAW image, linear, in values from 0 to 1.

    width: channels of the first side features, doubled from stage to stage (paper: 24 on ResNet-50, 12 on ResNet-18, 16
    on MiT-B3 and B5, 8 on MiT-B0).  middle: of each merge (paper: 64, 64, 128 on ResNet-50).  kernel: side of the blur
    (paper: 3, on LOD 9).  lut: hidden width of the colour look-up (paper: 32), None for none (normal light).
    gain, train_gain: what the gain starts from, and whether that trains. Published: 1, trained, though the low-light
    models of detection mean 3: their configurations pass the mode as a dict, which the code takes for "not low". Low
    light on ADE20K has 3, trained; in the detection code's own low mode it is 3, fixed.
    ratio: of what a merge adds (paper: 1).  predictor: width of the attention predictors (paper: 64).
    head_sees: the maps of stages "merged", as in the published ResNets, or "plain", as in the published MiTs, where the
    next stage alone sees what is merged; that takes a network whose stages begin with their downsampling (``MiT``).
    freeze_backbone: the adapter alone trains; off, all weights do, as published.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="sequential", mergeable="no",
        trains="285 * predictor ** 2 // 16 + 40 * predictor + 2 + train_gain + (3 * lut ** 2 + 10 * lut + 3 if lut else"
        " 0) + (4 if lut else 3) * (81 + 147 * width) + 36 * width ** 2 + 8 * width if site.role == 'model' else"
        " middle[int(site.tags[0][5:])] * (2 * site.width + width * 2 ** int(site.tags[0][5:])"
        " * (19 if int(site.tags[0][5:]) < 2 else 1))",
        modality="images", spec="raw_adapter",
    )  # fmt: skip

    width: int = 24
    middle: Sequence[int] = (64, 64, 128)
    kernel: int = 3
    lut: int | None = 32
    gain: float = 1.0
    train_gain: bool = True
    ratio: float = 1.0
    predictor: int = 64
    head_sees: Literal["merged", "plain"] = "merged"
    freeze_backbone: bool = True

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("lut", 1 if self.lut is None else self.lut)):
            if value < 1:
                raise RequestError(f"RAWAdapter {name} {value}: use at least 1")
        if len(self.middle) != MERGED or min(self.middle) < 1:
            raise RequestError(f"RAWAdapter middle {list(self.middle)}: use a number above 0 for each of 3 stages")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise RequestError(f"RAWAdapter kernel {self.kernel}: use an odd number of pixels")
        if self.predictor < 8 or self.predictor % 8:
            raise RequestError(f"RAWAdapter predictor {self.predictor}: use a multiple of 8")

    @property
    def trains_backbone(self) -> bool:  # type: ignore[override]
        return not self.freeze_backbone

    @property
    def by_block(self) -> bool:
        return False

    def example(self) -> dict[str, Any]:
        return {"any_range": True}  # the proof of effect's images are of unit variance

    def sites(self, sites: Sites) -> Sites:
        """The network, and of its first three stages the last block, or the next one's first, with their width."""
        stages: dict[str, list[Site]] = {}
        for site in sites:
            if site.role == "block" and site.tags and site.tags[0].startswith("stage"):
                stages.setdefault(site.tags[0], []).append(site)
        if len(stages) < MERGED + (self.head_sees == "plain"):
            raise RequestError(f"RAWAdapter needs a network of 4 stages (ResNet, LowFormer, EfficientMod, MiT); "
                               f"{sites.owner} has {len(stages)}")  # fmt: skip
        (whole,) = sites.select("model")
        if whole.width != 3:
            raise RequestError(
                f"RAWAdapter takes images of 3 bands (demosaiced RAW); {sites.owner} takes {whole.width}"
            )
        chosen = [stages[f"stage{s}"][-1] for s in range(MERGED)]
        if self.head_sees == "merged" and "(" in chosen[0].layout:
            raise RequestError(f"RAWAdapter head_sees merged: the norm that ends a stage of {sites.owner} comes behind "
                               "its blocks; use head_sees=plain, as published")  # fmt: skip
        if self.head_sees == "plain":
            entries = {tag: site for site in sites if "downsample" in site.tags and site.role == "conv"
                       for tag in site.tags if tag.startswith("stage")}  # fmt: skip
            after = [entries.get(f"stage{s + 1}") or stages[f"stage{s + 1}"][0] for s in range(MERGED)]
            chosen = [replace(a, width=c.width, tags=c.tags) for a, c in zip(after, chosen, strict=True)]
        return Sites([whole, *chosen], sites.owner)

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        whole, *stages = sites
        isp = InputAdapter(width=self.predictor, kernel=self.kernel, lut=self.lut, gain=self.gain,
                           train_gain=self.train_gain)  # fmt: skip
        built: dict[str, Adapter | WeightAdapter] = {
            whole.key: Develop(isp, ModelAdapter(4 if self.lut else 3, self.width))
        }
        for s, (site, middle) in enumerate(zip(stages, self.middle, strict=True)):
            side, last = self.width * 2**s, s == MERGED - 1
            built[site.key] = Merge(
                site.width, side, middle, ratio=self.ratio, last=last, layout=site.layout,
                before=self.head_sees == "plain",
            )  # fmt: skip
        return built


def from_official(name: str, sites: Sequence[str]) -> str:
    """Our name of a released tensor (without ``backbone.``). sites: the adapter's site keys, in order."""
    part, _, rest = name.partition(".")
    if part in ("pre_encoder", "model_adapter"):
        return f"{sites[0]}.{name}"
    index = part.removeprefix("merge_")
    if index == part or index not in ("1", "2", "3"):
        raise RequestError(f"{name}: no RAW-Adapter tensor")
    return f"{sites[int(index)]}.{rest}"


def load_official(model: Any, path: str | Path) -> list[str]:
    """Fill the active RAW-Adapter of ``model`` from a released checkpoint, strictly.

    Returns the names left aside: the backbone's and the head's, which belong to other modules. Raises RequestError
    where a tensor of the adapter is missing, unknown or of another shape.
    """
    state, name = weights.read(path), model.active[0]
    keys, ours, rest = list(model.bank[name]), {}, []
    for full, tensor in state.items():
        inner = full.removeprefix("backbone.")
        if inner.startswith(("pre_encoder.", "model_adapter.", "merge_")):
            ours[f"adapter.{name}.{from_official(inner, keys)}"] = tensor
        else:
            rest.append(full)
    if not ours:
        raise RequestError(f"{path}: none of its {len(state)} tensors is a RAW-Adapter's (pre_encoder.…)")
    kept = {n: t for n, t in model.trained_state().items() if not n.startswith(f"adapter.{name}.")}
    model.load_trained_state(ours | kept, str(path))
    return rest
