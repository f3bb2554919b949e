"""The library's model of each size, with random weights or those of a file, for any bands and image size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from modalities.images.backbones.inputs import check_bands, check_multiple, fit_bands, library
from shared import weights as w
from shared.errors import RequestError

# Of red, green and blue in 0 to 255, as the published weights were trained.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Shape(NamedTuple):
    """Sizes of a model. width, depth, heads, global_blocks, window, patch: of the encoder, whose other blocks attend
    within windows.  image_size: pixels.  embedding, decoder_mlp, decoder_heads: channels and heads of the decoder."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    url: str = ""
    window: int = 14
    patch: int = 16
    image_size: int = 1024
    embedding: int = 256
    decoder_mlp: int = 2048
    decoder_heads: int = 8


_FILES = "https://dl.fbaipublicfiles.com/segment_anything/"
SHAPES = {
    "vit_b": Shape(768, 12, 12, (2, 5, 8, 11), _FILES + "sam_vit_b_01ec64.pth"),
    "vit_l": Shape(1024, 24, 16, (5, 11, 17, 23), _FILES + "sam_vit_l_0b3195.pth"),
    "vit_h": Shape(1280, 32, 16, (7, 15, 23, 31), _FILES + "sam_vit_h_4b8939.pth"),
    "small": Shape(96, 4, 3, (1, 3), "", 8, 8, 256, 64, 128, 4),  # ours, for trials and quick trainings
    "tiny": Shape(32, 4, 2, (1, 3), "", 3, 8, 64, 32, 64, 2),
}


def shape_of(size: str, image_size: int | None) -> Shape:
    if size not in SHAPES:
        raise RequestError(f"size {size!r}: no SAM of ours; there are {', '.join(SHAPES)}")
    shape = SHAPES[size]
    if image_size is None:
        return shape
    check_multiple(f"sam_{size}", (image_size, image_size), (shape.patch, shape.patch))
    return shape._replace(image_size=image_size)


def built(
    name: str, shape: Shape, bands: int, weights: str, checkpoint: str | None, seed: int, encoder: bool = False
) -> tuple[Any, str]:
    """The library's model, filled, and where its weights come from.

    encoder: only the encoder's weights need to be there.
    """
    check_bands(name, bands)
    w.check_choice(name, weights, checkpoint)
    sam = w.build(lambda: _model(shape, bands), seed)
    if weights == "random":
        return sam, f"random (seed {seed})"
    source = f"file: {checkpoint}"
    if w.is_meta(sam):
        return sam, f"{source} (not loaded: meta device)"
    if checkpoint is None:
        where = f"download {shape.url} and give it as checkpoint=FILE" if shape.url else "give checkpoint=FILE"
        raise RequestError(f"{name}: no weights: {where}, or weights='random'")
    state = w.read(checkpoint)
    whole, prefix = any(key.startswith("image_encoder.") for key in state), "image_encoder."
    if encoder and whole:
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    target, at = (sam.image_encoder, "") if encoder else (sam, prefix)
    if f"{at}patch_embed.proj.weight" in state:
        state[f"{at}patch_embed.proj.weight"] = fit_bands(state[f"{at}patch_embed.proj.weight"], bands, source)
    w.fill(target, _fitted(state, target), name, source)
    return sam, source


def _model(shape: Shape, bands: int) -> Any:
    """``segment_anything.modeling.Sam`` in eval mode. Positions, which the library starts at zero, are random."""
    parts = library("segment_anything.modeling")
    grid = shape.image_size // shape.patch
    rgb = bands == 3
    encoder = parts.ImageEncoderViT(
        img_size=shape.image_size, patch_size=shape.patch, in_chans=bands, embed_dim=shape.width, depth=shape.depth,
        num_heads=shape.heads, mlp_ratio=4, out_chans=shape.embedding, qkv_bias=True, use_rel_pos=True,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        window_size=shape.window, global_attn_indexes=shape.global_blocks,
    )  # fmt: skip
    prompts = parts.PromptEncoder(shape.embedding, (grid, grid), (shape.image_size, shape.image_size), 16)
    transformer = parts.TwoWayTransformer(2, shape.embedding, shape.decoder_heads, shape.decoder_mlp)
    decoder = parts.MaskDecoder(
        transformer_dim=shape.embedding, transformer=transformer, iou_head_hidden_dim=shape.embedding
    )
    # Other bands come normalised by the data: SamPredictor leaves them as they are.
    mean, std = (MEAN, STD) if rgb else ((0.0,) * bands, (1.0,) * bands)
    sam = parts.Sam(encoder, prompts, decoder, pixel_mean=list(mean), pixel_std=list(std))
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.rpartition(".")[2] in ("pos_embed", "rel_pos_h", "rel_pos_w"):
            nn.init.normal_(parameter, std=0.02)
    return sam.eval()


def _fitted(state: dict[str, Tensor], target: nn.Module) -> dict[str, Tensor]:
    """``state`` with its positions, absolute and relative, resampled where ``target`` is for another image size."""
    shapes = {key: tensor.shape for key, tensor in target.state_dict().items()}
    fitted = dict(state)
    for key, tensor in state.items():
        wanted, own = shapes.get(key), key.rpartition(".")[2]
        if wanted is None or wanted == tensor.shape:
            continue
        if own == "pos_embed" and tensor.ndim == 4 and tensor.shape[-1] == wanted[-1]:
            fitted[key] = resampled(tensor, (wanted[1], wanted[2]))
        elif own in ("rel_pos_h", "rel_pos_w") and tensor.ndim == 2 and tensor.shape[1] == wanted[1]:
            fitted[key] = F.interpolate(tensor.t()[None], wanted[0], mode="linear")[0].t()  # as the library does
    return fitted


def resampled(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position grid (1, h, w, C) of another size: bicubic, antialiased, as timm resamples those of its models."""
    enlarged = F.interpolate(positions.permute(0, 3, 1, 2).float(), grid, mode="bicubic", antialias=True)
    return enlarged.permute(0, 2, 3, 1).to(positions.dtype)
