"""open_clip image towers: the vision transformer of a CLIP model, with its projected embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modalities.images.backbones.inputs import (
    byte_statistics,
    check_image,
    check_multiple,
    evenly_spaced,
    example_images,
    fit_bands,
    library,
    nearest,
    pair,
)
from modalities.images.backbones.sites import open_clip_sites
from shared import weights as w
from shared.backbone import Embedded, TokenBackbone
from shared.errors import RequestError
from shared.sites import Sites


class OpenClipTower(TokenBackbone):
    """The image tower of an open_clip model (Radford et al., 2021; Cherti et al., 2023), the library's own modules.

    It lies at ``self.tower``. The summary is what ``encode_image`` gives before normalisation: pooled and projected,
    of ``summary_width`` channels. Images must have the size the tower was made for, as in open_clip.
    ``config`` is open_clip's configuration it was made of, ``file`` what its weights were read from (None: random).

    bands: channels of the image.
    """

    tower: Any  # open_clip's class, known only where open_clip is installed

    def __init__(
        self,
        bands: int,
        *,
        name: str,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        depths: Sequence[int] | None = None,
        normed: bool = True,
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            name: open_clip's model name ("ViT-B-16").
            pretrained: one of open_clip's tags for that name ("laion2b_s34b_b88k"), or "random" (seeded).
            checkpoint: a .safetensors, .pt, .pth or .bin file of the whole CLIP model or of its image tower; with a tag
                in ``pretrained``, a file of those weights, which sets the activation they were trained with.
            image_size: pixels, one side or (height, width); None means the model's own. Positions are resampled.
            depths: blocks (0-based) whose output becomes a map; None means four evenly spaced, the last included.
            normed: apply the norm after the last block to the maps, unless an attention pool stands before that norm.
            seed: of the random weights.
            model_args: changes of the configuration: embed_dim, quick_gelu and the fields of ``vision_cfg``.

        Raises RequestError where the name, the tag, the size, an argument or the weights do not fit.
        """
        config = _config(name, model_args or {})
        if (pretrained is None and checkpoint is None) or (pretrained == "random" and checkpoint is not None):
            tags = ", ".join(library("open_clip").list_pretrained_tags_by_model(name)) or "none"
            raise RequestError(f"{name}: give a checkpoint, a tag as pretrained ({tags}), or pretrained='random' alone")
        tag = {} if pretrained in (None, "random") else _tag(name, pretrained)
        if tag and "quick_gelu" not in (model_args or {}):
            config["quick_gelu"] = tag.get("quick_gelu", False)  # the activation these weights were trained with
        if image_size is not None:
            config["vision_cfg"]["image_size"] = pair(image_size)
        tower = w.build(lambda: _create(name, bands, config), seed)
        total = len(tower.transformer.resblocks)
        depths = evenly_spaced(total) if depths is None else depths
        super().__init__(name, depths=depths, total=total, width=tower.conv1.out_channels, prefix=1, normed=normed)
        self.tower, self.bands, self.config = tower, bands, config
        self.file: Path | None = None  # what the weights were read from
        self.image_size, self.patch_size, self.summary_width = tower.image_size, tower.patch_size, tower.output_dim
        clip = {"mean": library("open_clip").OPENAI_DATASET_MEAN, "std": library("open_clip").OPENAI_DATASET_STD}
        self.statistics = byte_statistics({**clip, **tag}, bands)
        if pretrained == "random":
            self.source = f"random (seed {seed})"
        else:
            self.source = f"file: {checkpoint}" if checkpoint is not None else f"open_clip: {pretrained}"
            self._load(Path(checkpoint) if checkpoint is not None else None, tag)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.tower.transformer.resblocks

    def embed(self, image: Tensor) -> Embedded:
        check_image(self.name, image, self.bands)
        if tuple(image.shape[2:]) != self.image_size:
            got, made = (" x ".join(map(str, size)) for size in (image.shape[2:], self.image_size))
            raise RequestError(f"{self.name}: image {got}, but the tower is made for {made}; give image_size=({got})")
        return Embedded(self.tower._embeds(image), self.tower.grid_size, {})

    def final(self, tokens: Tensor) -> Tensor:
        return tokens if self.tower.attn_pool is not None else self.tower.ln_post(tokens)

    def summarise(self, tokens: Tensor) -> Tensor:
        return self.tower._pool(tokens)[0] @ self.tower.proj

    def sites(self) -> Sites:
        return open_clip_sites(self)

    def example(self) -> tuple[Tensor]:
        """Two images (batch norms need more than one value) of the tower's size, of about unit variance."""
        return (example_images(self.tower, self.bands, *self.image_size),)

    def _load(self, file: Path | None, tag: dict[str, Any]) -> None:
        """Fill the tower from a file or, without one, from the tag's; on the meta device nothing is read."""
        if w.is_meta(self.tower):
            self.source += " (not loaded: meta device)"
            return
        self.file = file if file is not None else _fetch(self.name, tag)
        state = w.read(self.file)
        if any(key.startswith("visual.") for key in state):  # a whole CLIP model: the rest is its text tower
            state = {key.removeprefix("visual."): t for key, t in state.items() if key.startswith("visual.")}
        if "conv1.weight" in state:
            state["conv1.weight"] = fit_bands(state["conv1.weight"], self.bands, self.source)
        if {"class_embedding", "positional_embedding"} <= state.keys():  # a text tower has only the latter
            state["positional_embedding"] = self._positions(state["positional_embedding"])
        w.fill(self.tower, state, self.name, self.source)

    def _positions(self, table: Tensor) -> Tensor:
        """A table (1 + n*n, width) of a square grid for this tower's grid: bicubic, antialiased, as open_clip does.

        open_clip leaves a table of equal length as it is, which is wrong where a square grid meets another shape.
        """
        rows, columns = self.tower.grid_size
        side = round((len(table) - 1) ** 0.5)
        if side * side != len(table) - 1:
            if table.shape == self.tower.positional_embedding.shape:
                return table  # written by a tower of this very grid
            raise RequestError(f"{self.source}: {len(table) - 1} positions, which form no square grid to resample")
        resample = library("timm.layers").resample_abs_pos_embed
        return resample(table[None], new_size=[rows, columns], old_size=[side, side], num_prefix_tokens=1)[0]

    def __repr__(self) -> str:
        size, patch = (" x ".join(map(str, pixels)) for pixels in (self.image_size, self.patch_size))
        what = f"{self.name}, {self.bands} bands, image {size}, patch {patch}, maps after blocks {self.depths}"
        return f"{type(self).__name__}({what}, weights: {self.source})"


def _config(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """open_clip's configuration of a model (embed_dim, vision_cfg, quick_gelu) with changes."""
    open_clip = library("open_clip")
    found = open_clip.get_model_config(name)
    if found is None:
        raise RequestError(f"{name}: no model of open_clip{nearest(name, open_clip.list_models())}")
    config = {key: found[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in found}
    vision = config["vision_cfg"]
    if vision.get("timm_model_name") or not isinstance(vision.get("layers", 12), int):
        other = f"TimmViT(name={vision['timm_model_name']!r})" if vision.get("timm_model_name") else "another name"
        raise RequestError(f"{name}: its image tower is not open_clip's VisionTransformer; try {other}")
    fields = {field.name for field in dataclasses.fields(open_clip.CLIPVisionCfg)} - {"image_size", "timm_model_name"}
    for key, value in changes.items():
        if key not in {"embed_dim", "quick_gelu"} | fields:
            raise RequestError(f"{name}: model_args has no {key!r}{nearest(key, fields)}")
        (vision if key in fields else config)[key] = value
    return config


def _create(name: str, bands: int, config: dict[str, Any]) -> Any:
    """The image tower alone: the text tower of a CLIP model is never made."""
    try:
        tower = library("open_clip.model")._build_vision_tower(**config)
    except (TypeError, AssertionError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise RequestError(f"{name}: open_clip refuses {config}: {error}") from error
    if not hasattr(tower, "transformer"):
        raise RequestError(
            f"{name}: layers {config['vision_cfg']['layers']} make no vision transformer; use one number"
        )
    check_multiple(name, tower.image_size, tower.patch_size)
    if not all(isinstance(block.attn, nn.MultiheadAttention) for block in tower.transformer.resblocks):
        raise RequestError(f"{name}: only open_clip's default blocks are supported, not block_type 'custom'")
    if bands != 3:
        old = tower.conv1
        tower.conv1 = nn.Conv2d(bands, old.out_channels, old.kernel_size, old.stride, bias=False)  # type: ignore[arg-type]
    return tower


def _tag(name: str, tag: str) -> dict[str, Any]:
    open_clip = library("open_clip")
    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise RequestError(f"{name}: no weights {tag!r}; open_clip has {', '.join(tags) or 'none for it'}")
    return found


def _fetch(name: str, tag: dict[str, Any]) -> Path:
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        raise RequestError(f"{name}: not on the hub; download {tag.get('url')} and give it as checkpoint=FILE")
    file = file or "open_clip_pytorch_model.bin"
    # Converted weights stand beside the older file: open_clip_model.safetensors, or the same name.
    safe = file.replace("open_clip_pytorch_model", "open_clip_model").rpartition(".")[0] + ".safetensors"
    return w.fetch(name, repository, (safe, file))
