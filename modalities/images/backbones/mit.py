"""Mix Transformer, the encoder of SegFormer (Xie et al., NeurIPS 2021): transformers' own, with maps of four stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modalities.images.backbones.inputs import (
    byte_statistics,
    check_bands,
    check_image,
    example_images,
    fit_bands,
    nearest,
)
from shared import weights as w
from shared.backbone import Backbone, Features
from shared.errors import RequestError
from shared.sites import Site, Sites, norm_sites

LAYOUT = "B(HW)C"
WIDTHS = (64, 128, 320, 512)
SIZES: dict[str, dict[str, Any]] = {
    "mit_b0": {"hidden_sizes": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "mit_b1": {"hidden_sizes": WIDTHS, "depths": (2, 2, 2, 2)},
    "mit_b2": {"hidden_sizes": WIDTHS, "depths": (3, 4, 6, 3)},
    "mit_b3": {"hidden_sizes": WIDTHS, "depths": (3, 4, 18, 3)},
    "mit_b4": {"hidden_sizes": WIDTHS, "depths": (3, 8, 27, 3)},
    "mit_b5": {"hidden_sizes": WIDTHS, "depths": (3, 6, 40, 3)},
}
FILES = ("model.safetensors", "pytorch_model.bin")
ENTRY = "encoder.patch_embeddings.0.proj.weight"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class MiT(Backbone):
    """transformers' ``SegformerModel`` at ``self.model``: maps of its four stages at strides 4, 8, 16 and 32, each
    behind the stage's norm, and the last one's mean as the summary.

    Images of any size from 32 pixels a side are taken; strides round up. Inside a stage flow tokens of a grid that its
    convolutions know (layout "B(HW)C"), so none can be added.

    bands: channels of the image.
    """

    model: Any

    def __init__(
        self,
        bands: int,
        *,
        name: str = "mit_b0",
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: mit_b0 to mit_b5.
            weights: "pretrained" (``checkpoint``, else nvidia's on the hub) or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file of transformers' SegFormer, with a head or without.
            seed: of the random weights.
            model_args: further settings of transformers' ``SegformerConfig``, such as hidden_sizes, depths.

        Raises RequestError where the name, a setting or the weights do not fit.
        """
        check_bands(name, bands)
        w.check_choice(name, weights, checkpoint)
        super().__init__(name)
        self.model = w.build(lambda: _create(name, bands, model_args or {}), seed)
        self.bands, self.channels = bands, tuple(self.model.config.hidden_sizes)
        self.statistics = byte_statistics(IMAGENET, bands)
        self.source = f"random (seed {seed})"
        if weights == "pretrained":
            self._load(checkpoint)

    def forward(self, image: Tensor) -> Features:
        """image (B, bands, H, W) to maps (B, channels[s], H / 2^(s+2), W / 2^(s+2)), sizes rounded up."""
        check_image(self.name, image, self.bands)
        x, maps = image, []
        for stage in self.model.stages:
            x = stage(x)
            maps.append(x)
        return Features(tuple(maps), x.mean((2, 3)))

    def sites(self) -> Sites:
        return Sites(_sites(self), self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of 64 x 96 pixels, of about unit variance."""
        return (example_images(self.model, self.bands, 64, 96),)

    def _load(self, checkpoint: str | None) -> None:
        """Fill the model; on the meta device nothing is read."""
        repository = f"nvidia/{self.name.replace('_', '-')}"
        self.source = f"file: {checkpoint}" if checkpoint is not None else f"hub: {repository}"
        if w.is_meta(self.model):
            self.source += " (not loaded: meta device)"
            return
        file = Path(checkpoint) if checkpoint is not None else w.fetch(self.name, repository, FILES)
        state = {name.removeprefix("segformer."): tensor for name, tensor in w.read(file).items()}
        state = {name: t for name, t in state.items() if not name.startswith(("decode_head.", "classifier."))}
        if ENTRY in state:
            state[ENTRY] = fit_bands(state[ENTRY], self.bands, self.source)
        # transformers knows the names that its own older versions wrote; what it does not load, it tells.
        kind = type(self.model)
        try:
            loaded, told = kind.from_pretrained(
                None, config=self.model.config, state_dict=state, output_loading_info=True, dtype=torch.float32
            )
        except (RuntimeError, ValueError) as error:
            raise RequestError(
                f"{self.source}: it does not fit {self.name} ({' '.join(str(error).split())})"
            ) from error
        for what, names in told.items():
            if names and what != "error_msgs":
                first = sorted(map(str, names))[0]
                raise RequestError(f"{self.source}: no whole SegFormer of the size {self.name}: {what} such as {first}")
        self.model.load_state_dict(loaded.state_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.bands} bands, weights: {self.source})"


def _create(name: str, bands: int, model_args: dict[str, Any]) -> Any:
    if name not in SIZES:
        raise RequestError(f"{name}: no Mix Transformer{nearest(name, SIZES)}; there are {', '.join(SIZES)}")
    try:
        from transformers import SegformerConfig, SegformerModel
    except ImportError as error:
        raise RequestError(f"{name} needs transformers: pip install 'omniadapt[remote-sensing]'") from error
    heads = {"num_attention_heads": (1, 2, 5, 8), "hidden_dropout_prob": 0.0}
    settings = {**heads, **SIZES[name], **model_args}
    unknown = [key for key in model_args if not hasattr(SegformerConfig(), key)]
    if unknown:
        raise RequestError(f"{name}: model_args has no {unknown[0]!r}")
    try:
        return SegformerModel(SegformerConfig(num_channels=bands, **settings))
    except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise RequestError(f"{name}: transformers refuses {model_args}: {' '.join(str(error).split())}") from error


def _sites(backbone: MiT) -> Iterator[Site]:
    depth = -1
    yield Site("model", 0, "", backbone, parameter=None, layout="BCHW", width=backbone.bands)
    for s, stage in enumerate(backbone.model.stages):
        path, width = f"model.stages.{s}", backbone.channels[s]
        entry, tags = stage.patch_embeddings, ("downsample", f"stage{s}") if s else ("patch_embed", "stage0")
        yield Site("conv", depth, f"{path}.patch_embeddings.proj", entry.proj, layout="BCHW", width=width, tags=tags)
        yield from norm_sites(f"{path}.patch_embeddings.layer_norm", entry.layer_norm, depth, 0, *tags, layout=LAYOUT)
        for i, block in enumerate(stage.blocks):
            depth += 1
            at = f"{path}.blocks.{i}"
            yield Site("block", depth, at, block, parameter=None, layout=LAYOUT, width=width, tags=(f"stage{s}",))
            yield from _block(at, block, depth, width)
        ends = ("stage_end", "final") if s == len(backbone.channels) - 1 else ("stage_end",)
        yield from norm_sites(f"{path}.layer_norm", stage.layer_norm, depth, 0, *ends, layout=LAYOUT)


def _block(path: str, block: Any, depth: int, width: int) -> Iterator[Site]:
    def linear(role: str, name: str, layer: Any) -> Site:
        more: dict[str, Any] = {"width": layer.out_features, "inputs": layer.in_features}
        return Site(role, depth, f"{path}.{name}", layer, layout=LAYOUT, **more)

    attention, mlp = block.attention, block.mlp
    yield Site("attention", depth, f"{path}.attention", attention, parameter=None, layout=LAYOUT, width=width)
    for role, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        yield linear(f"attention.{role}", f"attention.{name}", getattr(attention, name))
    if attention.sequence_reduction_ratio > 1:
        reduce, at = attention.sequence_reduction, f"{path}.attention.sequence_reduction"
        conv = reduce.sequence_reduction
        yield Site("conv", depth, f"{at}.sequence_reduction", conv, layout="BCHW", width=width, tags=("reduction",))
        yield from norm_sites(f"{at}.layer_norm", reduce.layer_norm, depth, 0, "attention", layout=LAYOUT)
    yield Site("mlp", depth, f"{path}.mlp", mlp, parameter=None, layout=LAYOUT, width=width)
    yield linear("mlp.up", "mlp.fc1", mlp.fc1)
    yield linear("mlp.down", "mlp.fc2", mlp.fc2)
    inside, conv = mlp.fc1.out_features, mlp.dwconv.dwconv
    yield Site("conv", depth, f"{path}.mlp.dwconv.dwconv", conv, layout="BCHW", width=inside, tags=("depthwise",))
    for name, tag in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        yield from norm_sites(f"{path}.{name}", getattr(block, name), depth, 0, tag, layout=LAYOUT)
