"""AdapterShadow: two bottlenecks in each block of Segment Anything, prompted by a small network with a grid of points.

Jie and Zhang, AdapterShadow: Adapting Segment Anything Model for Shadow Detection, 2023 (arXiv 2311.08891).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones import Prompts
from modalities.images.shadow_detector import ShadowDetector
from shared.adapter import Adapter, WeightAdapter
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.low_rank import Replacement
from shared.blocks.placement import After, Beside
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites, every_parameter
from shared.taxonomy import Record

# What the path from points to one mask uses of the prompt encoder and the mask decoder; the rest has no gradient.
TRAINED = (
    "prompt_encoder.point_embeddings.0.", "prompt_encoder.point_embeddings.1.", "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.no_mask_embed.", "mask_decoder.transformer.", "mask_decoder.iou_token.",
    "mask_decoder.mask_tokens.", "mask_decoder.output_upscaling.", "mask_decoder.output_hypernetworks_mlps.0.",
)  # fmt: skip


class ShadowMasks(NamedTuple):
    """logits: (B, 1, h, w), the answer.  coarse: (B, 1, H, W), the logits of the network that prompts.
    points: (B, G * G, 2), as they were sent, in pixels.  labels: (B, G * G), 1 on a shadow, else 0."""

    logits: Tensor
    coarse: Tensor
    points: Tensor
    labels: Tensor


def grid_points(coarse: Tensor, cells: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The highest pixel of each cell of a map of logits (B, 1, H, W), cells in row-major order.

    Returns rows and columns (B, cells^2, 2), labels (B, cells^2) that are 1 where the logit exceeds ``threshold``, and
    the logits themselves.
    """
    values, indices = F.adaptive_max_pool2d(coarse, cells, return_indices=True)
    values, indices = values.flatten(1), indices.flatten(1)
    places = torch.stack([indices // coarse.shape[3], indices % coarse.shape[3]], -1)
    return places, (values > threshold).to(coarse.dtype), values


class NormedPadding(After):
    """Behind a windowed attention whose windows are filled up with the bias of the norm before it.

    So does the published block, which normalises within the windows; SAM fills up with zeros, after the norm.
    """

    def __init__(self, branch: nn.Module, norm: nn.Module, window: int):
        super().__init__(branch)
        self.frozen: tuple[Any] = (norm,)  # in a tuple, since it is the backbone's
        self.window = window

    def forward(self, base: Callable[..., Any], x: Tensor) -> Any:
        return super().forward(base, filled(x, self.frozen[0].bias, self.context.grid, self.window))


def filled(x: Tensor, value: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Windows (B * n, window, window, C) of a token grid (h, w) with ``value`` (C,) where they reach beyond it."""
    rows, columns = (-(-side // window) for side in grid)
    inside = torch.zeros(rows * window, columns * window, dtype=torch.bool, device=x.device)
    inside[: grid[0], : grid[1]] = True
    inside = inside.view(rows, window, columns, window).transpose(1, 2).reshape(1, -1, window, window, 1)
    return torch.where(inside, x.unflatten(0, (-1, rows * columns)), value).flatten(0, 1)


class AutoPrompt(Adapter):
    """Around the whole model: it looks at the image first, and asks the model about the points it finds.

    The prompts of the caller are left aside. No gradient comes back through the points.
    """

    def __init__(self, detector: ShadowDetector, method: AdapterShadow):
        super().__init__()
        self.detector, self.cells, self.threshold = detector, method.grid, method.threshold
        self.subsample, self.subsample_in_eval, self.order = method.subsample, method.subsample_in_eval, method.order

    def forward(
        self, base: Callable[..., Any], image: Tensor, prompts: Prompts | None = None, multimask: bool = False
    ) -> ShadowMasks:
        if self.order == "rc" and image.shape[2] != image.shape[3]:
            raise RequestError("AdapterShadow order 'rc', rows sent as x, is for square images alone")
        step = self.subsample if self.training or self.subsample_in_eval else 1
        coarse = self.detector(image[:, :, ::step, ::step], (image.shape[2], image.shape[3]))
        places, labels, _ = grid_points(coarse.detach(), self.cells, self.threshold)
        if vars(self.context).get("both_labels"):
            labels = (torch.arange(labels.shape[1], device=labels.device) % 2).to(labels).expand_as(labels)
        points = (places.flip(-1) if self.order == "xy" else places).to(image.dtype)
        masks = base(image, Prompts(points[:, None], labels[:, None]), False)
        return ShadowMasks(masks.logits[:, 0], coarse, points, labels)


@dataclass(frozen=True, kw_only=True)
class AdapterShadow(Method):
    """The published system on a ``SAM`` backbone. Not the identity at the start.

    In each block of the image encoder one bottleneck stands behind the attention, inside its windows, with a skip, and
    one beside the MLP. The prompting network's decoder trains with them, and of SAM's prompt encoder and mask decoder
    all that the path uses, in place of the frozen tensors.

    ratio: of a bottleneck's width to the tokens' (paper: 0.25).  scale: of the branch beside the MLP (paper: 0.5).
    depth: adapted blocks (paper: all).  space, mlp: the two bottlenecks (paper: both).
    grid: G of the G x G points (paper: 16).  threshold: of the logit above which a point is a shadow (published: 0.9).
    subsample: every how many pixels the prompting network sees (published, in training: 4).  subsample_in_eval: at
    inference too; the published test script shows it the whole image, which it was not trained on.
    padding: what a window beyond the image holds, "zeros" as SAM was trained, or the "norm" of zeros, the bias of the
    norm before the attention, as in the published code; the released weights need that.
    order: of a point's coordinates. "xy" is what SAM reads; the released weights were trained with "rc", rows first.
    detector: timm's name of an EfficientNet.  detector_weights: "pretrained" (``detector_checkpoint``, else timm's hub)
    or "random" (seeded by ``detector_seed``).  train_detector: its encoder too (published: frozen, and here its batch
    norms stay as they are).
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="activations", form="parallel", mergeable="no",
        trains="2 * site.width * int(ratio * site.width) + int(ratio * site.width) + site.width"
        " if site.role in ('attention', 'mlp') and not site.parameter else size if site.parameter else 394857",
        modality="images", spec="adapter_shadow",
        why="the decoder of the prompting network is counted for EfficientNets b0 and b1",
    )  # fmt: skip

    ratio: float = 0.25
    scale: float = 0.5
    depth: str | int | Sequence[int] = "all"
    space: bool = True
    mlp: bool = True
    grid: int = 16
    threshold: float = 0.9
    padding: Literal["zeros", "norm"] = "zeros"
    subsample: int = 4
    subsample_in_eval: bool = True
    order: Literal["xy", "rc"] = "xy"
    detector: str = "tf_efficientnet_b1.ap_in1k"
    detector_weights: Literal["pretrained", "random"] = "pretrained"
    detector_checkpoint: str | None = None
    detector_seed: int = 0
    train_detector: bool = False

    def __post_init__(self) -> None:
        if not (self.space or self.mlp):
            raise RequestError("AdapterShadow with neither space nor mlp: switch one of them on")
        if not self.ratio > 0 or self.grid < 1 or self.subsample < 1:
            settings = f"ratio {self.ratio}, grid {self.grid} and subsample {self.subsample}"
            raise RequestError(f"AdapterShadow {settings}: above 0, at least 1 and 1")

    def sites(self, sites: Sites) -> Sites:
        whole = sites.select("model")
        if not hasattr(whole[0].module, "sam"):
            raise RequestError(f"AdapterShadow is for the backbone SAM; {sites.owner} has no prompts to answer")
        roles = [role for role, on in (("attention", self.space), ("mlp", self.mlp)) if on]
        blocks = sites.select(roles, self.depth, "encoder")
        trained = [site for site in every_parameter(sites) if f"{site.path}.".startswith(_below("sam.", TRAINED))]
        return Sites([*whole, *blocks, *trained], sites.owner)

    def build_all(self, sites: Sites) -> dict[str, Adapter | WeightAdapter]:
        root = sites[0].module
        return {site.key: self.build(site, _block(root, site)) for site in sites}

    def build(self, site: Site, block: Any = None) -> Adapter | WeightAdapter:
        """block: the one of the library that an attention stands in."""
        if site.parameter:
            return Replacement(site.weight)
        if site.role == "model":
            detector = ShadowDetector(
                self.detector, self.detector_weights, self.detector_checkpoint, self.detector_seed, self.train_detector
            )
            return AutoPrompt(detector, self)
        width = int(self.ratio * site.width)
        if width < 1:
            raise RequestError(f"AdapterShadow ratio {self.ratio} at {site.key}: of {site.width} channels none is left")
        layers = nn.Linear(site.width, width), nn.Linear(width, site.width)
        space = site.role == "attention"
        branch = Bottleneck(
            site.width, site.width, width, activation="gelu", layers=layers, scale=1.0 if space else self.scale
        )
        if space and self.padding == "norm" and block.window_size:
            return NormedPadding(branch, block.norm1, block.window_size)
        return After(branch) if space else Beside(branch)

    def example(self) -> dict[str, Any]:
        """Both labels occur, so that both of their embeddings have an effect to prove."""
        return {"both_labels": True}


def _block(root: nn.Module, site: Site) -> Any:
    return root.get_submodule(site.path.rpartition(".")[0]) if site.role == "attention" else None


def _below(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


# -- losses ------------------------------------------------------------------------------------------------------------


def focal_loss(logits: Tensor, truth: Tensor, alpha: float = 8 / 9, gamma: float = 2.0) -> Tensor:
    """Mean focal loss (Lin et al., 2017) of logits (B, 1, h, w), resized to the truth (B, 1, H, W) of zeros and ones.

    Probabilities are kept within 1e-5 of 0 and 1, as published, so that the gradient beyond is exactly 0.
    """
    p = _resized(logits, truth).sigmoid().clamp(1e-5, 0.99999)
    shadow = alpha * (1 - p) ** gamma * truth * p.log()
    lit = (1 - alpha) * p**gamma * (1 - truth) * (1 - p).log()
    return -(shadow + lit).mean()


def weighted_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of logits (B, 1, h, w), resized to the truth (B, 1, H, W), where shadow and light weigh the same.

    Counts are of the batch: a shadow pixel weighs the share of light, a lit one the share of shadows.
    """
    shadow, lit = truth.sum() + 1e-10, (1 - truth).sum() + 1e-10
    entropy = F.binary_cross_entropy_with_logits(_resized(logits, truth), truth, pos_weight=lit / shadow)
    return shadow / (shadow + lit) * entropy


def _resized(logits: Tensor, truth: Tensor) -> Tensor:
    size = truth.shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=True)


# -- the released weights ----------------------------------------------------------------------------------------------


def from_official(name: str, model: Any) -> tuple[str, str] | None:
    """(site key, tensor name) of ours for a released tensor (without the prefix ``model.``); None for a frozen one.

    model: with an AdapterShadow as its first active adapter.
    """
    bank = model.bank[model.active[0]]
    if name.startswith("mask_generator."):
        rest = name.removeprefix("mask_generator.").replace("efficient_encoder.original_model.", "encoder.")
        return None if rest.startswith(("align1.", "align2.", "align3.")) else ("model", f"detector.{rest}")
    for part, module, side in (("Space_Adapter", "attn", "down"), ("MLP_Adapter", "mlp", "down")):
        head, _, layer = name.partition(f".{part}.")
        if layer:
            side = {"D_fc1": "down", "D_fc2": "up"}[layer.partition(".")[0]]
            return f"sam.{head}.{module}".replace(".", "/"), f"branch.{side}.{layer.partition('.')[2]}"
    path, _, parameter = f"sam.{name}".rpartition(".")
    key = path.replace(".", "/") + ("" if parameter == "weight" else f":{parameter}")
    return (key, "value") if key in bank else None


def load_official(model: Any, path: Any) -> list[str]:
    """Fill the active AdapterShadow of ``model`` from a released checkpoint, strictly.

    Returns the names left aside, which must be SAM's own frozen tensors or layers that the published code never runs.

    Raises RequestError where a tensor is missing, unknown or of another shape.
    """
    from shared import weights as w

    state: Mapping[str, Tensor] = w.read(path)
    name, ours, aside = model.active[0], {}, []
    frozen = model.backbone.sam.state_dict()
    for official, tensor in state.items():
        found = from_official(official, model)
        if found is not None:
            ours[f"adapter.{name}.{found[0]}.{found[1]}"] = tensor
        elif official in frozen or official.startswith("mask_generator.align"):
            aside.append(official)
        else:
            raise RequestError(f"{path}: {official} is no tensor of AdapterShadow nor of {model.backbone_name}")
    model.load_trained_state(ours, str(path))
    return aside
