"""Segment Anything (Kirillov et al., 2023): the promptable model, and its image encoder alone, at any image size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modalities.images.backbones.inputs import check_image, check_multiple, example_images
from modalities.images.backbones.sam.building import MEAN, STD, built, resampled, shape_of
from modalities.images.backbones.sam.prompts import Masks, Prompts, check_prompts, sized
from modalities.images.backbones.sam.sites import decoder_sites, encoder_sites
from shared.backbone import BlockBackbone, Embedded, Features, TokenBackbone
from shared.errors import RequestError
from shared.sites import Site, Sites


class SAM(BlockBackbone):
    """The whole model of the library ``segment_anything``, at ``self.sam``: image and prompts to masks.

    Images of any height and width that are multiples of the patch are taken as they are; the decoder's masks are a
    quarter of that. Positions are resampled where the size is not the stored one, at which everything equals the
    library's own. ``encode`` and ``decode`` are the two halves; SamPredictor works on ``self.sam`` (see
    ``modalities.images.sam_tools``). Its blocks are those of the image encoder, so that what is frozen of it is kept
    by ``shared.cache``: the embedding where adapters act in the decoder alone.

    bands: channels of the image, normalised; the RGB patch kernel is repeated for other than three.
    """

    sam: Any  # the library's class, known only where it is installed
    mapped = False

    def __init__(
        self,
        bands: int,
        *,
        size: Literal["vit_b", "vit_l", "vit_h", "small", "tiny"] = "vit_b",
        part: Literal["both", "encoder", "decoder"] = "both",
        image_size: int | None = None,
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
    ):
        """
        Args:
            size: the published "vit_b", "vit_l", "vit_h", or one of ours, of random weights.
            part: where a method finds sites: image encoder, mask decoder (its blocks are numbered after the encoder's
                where both are described).
            image_size: pixels of the side that positions are stored for, and of SamPredictor; None: the model's own.
            weights: "pretrained" (of ``checkpoint``) or "random" (seeded).
            checkpoint: a .pth, .pt or .safetensors file with the names of the published ones.
            seed: of the random weights.

        Raises RequestError where a size or the weights do not fit, or there are none.
        """
        super().__init__(f"sam_{size}")
        shape, self.part, self.bands = shape_of(size, image_size), part, bands
        self.sam, self.source = built(self.name, shape, bands, weights, checkpoint, seed)
        self.image_size, self.patch_size, self.width = shape.image_size, (shape.patch, shape.patch), shape.width
        self.channels = (shape.embedding,)
        self.statistics = (MEAN, STD) if bands == 3 else None

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.sam.image_encoder.blocks

    @property
    def later(self) -> Iterable[nn.Module]:
        return self.sam.prompt_encoder, self.sam.mask_decoder

    def embed(self, image: Tensor) -> Embedded:
        """image (B, bands, H, W) to tokens (B, h, w, width) with positions."""
        tokens = embedded(self, self.sam.image_encoder, image)
        return Embedded(tokens, (tokens.shape[1], tokens.shape[2]), {})

    def ended(self, outputs: Sequence[Tensor], tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.sam.image_encoder.neck(tokens.permute(0, 3, 1, 2))

    def finish(self, tokens: Tensor) -> Tensor:
        """The embedding, channels last."""
        return self.ended((), tokens, (tokens.shape[1], tokens.shape[2])).permute(0, 2, 3, 1)

    def rest(self, finished: Tensor) -> Tensor:
        return finished.permute(0, 3, 1, 2).contiguous()  # as the neck lays it out, so that all rounds alike

    def encode(self, image: Tensor) -> Tensor:
        """image (B, bands, H, W) to its embedding (B, C, H / patch, W / patch), all that the decoder sees of it."""
        return self.from_image(image)

    def decode(self, embedding: Tensor, prompts: Prompts | None = None, multimask: bool = False) -> Masks:
        """Masks of the objects that are asked about; of everything, without prompts.

        embedding: (B, C, h, w).  multimask: three masks for each object, from the whole to a part, instead of one.

        Raises RequestError where a prompt lies outside the image or does not fit the batch.
        """
        asked, grid = prompts or Prompts(), (embedding.shape[2], embedding.shape[3])
        pixels = (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1])
        check_prompts(asked, pixels, grid, len(embedding))
        positions = self.sam.prompt_encoder.pe_layer(grid)[None]
        found = []
        with sized(self.sam.prompt_encoder, grid, pixels):
            for one, whole in enumerate(embedding.split(1)):  # the library takes one image with its prompts at a time
                points, labels, boxes, masks = (None if each is None else each[one] for each in asked)
                sparse, dense = self.sam.prompt_encoder(
                    points=None if points is None else (points, labels), boxes=boxes, masks=masks
                )
                found.append(
                    self.sam.mask_decoder(
                        image_embeddings=whole, image_pe=positions, sparse_prompt_embeddings=sparse,
                        dense_prompt_embeddings=dense, multimask_output=multimask,
                    )
                )  # fmt: skip
        return Masks(*(torch.stack(each) for each in zip(*found, strict=True)))

    def forward(
        self, image: Tensor, prompts: Prompts | None = None, multimask: bool = False, *,
        part: Literal["both", "encoder", "decoder"] = "both",
    ) -> Any:  # fmt: skip
        """Masks of an image; of "encoder" alone its embedding, and by "decoder" alone the masks of an embedding."""
        if part == "decoder":
            return self.decode(image, prompts, multimask)
        embedding = self.encode(image)
        return embedding if part == "encoder" else self.decode(embedding, prompts, multimask)

    def check_halves(self) -> None:
        """Raises RequestError where an adapter acts around the whole model, which asks for it in one call."""
        port = vars(self).get("_port")
        if port is not None and port.around:
            raise RequestError(
                f"adapter {next(iter(port.around))!r} acts around all of {self.name}, which is used in two halves here"
            )

    def sites(self) -> Sites:
        sites = [Site("model", 0, "", self, parameter=None, layout="BCHW", width=self.bands)]
        first = 0
        if self.part != "decoder":
            sites += encoder_sites("sam.image_encoder", self.sam.image_encoder)
            first = len(self.sam.image_encoder.blocks)
        if self.part != "encoder":
            sites += decoder_sites("sam.mask_decoder", self.sam.mask_decoder, first)
        return Sites(sites, self.name)

    def example(self) -> tuple[Any, ...]:
        """Two small images, square, with a point on, a point off and a mask of one object in each."""
        image = _example(self, 2)
        (height, width), (down, across) = image.shape[2:], self.patch_size
        points = torch.tensor([[[[width / 4, height / 2], [width / 2, height / 4]]]]).to(image).repeat(2, 1, 1, 1)
        labels = torch.tensor([[[1, 0]]], device=image.device).repeat(2, 1, 1)
        masks = torch.randn(
            2, 1, 1, 4 * height // down, 4 * width // across, generator=torch.Generator().manual_seed(1), device="cpu"
        )
        return image, Prompts(points, labels, None, masks.to(image)), True

    def __repr__(self) -> str:
        what = f"{self.name}, {self.bands} bands, image {self.image_size}, sites: {self.part}"
        return f"{type(self).__name__}({what}, weights: {self.source})"


class SAMEncoder(TokenBackbone):
    """The image encoder of Segment Anything alone, for heads of dense prediction, at ``self.encoder``.

    Its maps are the tokens (B, width, h, w) after the blocks ``depths`` and, last, the embedding (B, C, h, w) of the
    neck; the summary is the mean of that. Tokens have the layout (B, h, w, width). Images of any size as in ``SAM``.

    bands: channels of the image, normalised.
    """

    encoder: Any

    def __init__(
        self,
        bands: int,
        *,
        size: Literal["vit_b", "vit_l", "vit_h", "small", "tiny"] = "vit_b",
        image_size: int | None = None,
        depths: Sequence[int] | None = None,
        neck: bool = True,
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        seed: int = 0,
    ):
        """
        Args:
            depths: blocks (0-based) whose output becomes a map; None: those with global attention.
            neck: give the neck's embedding as the last map; without it four depths make the four maps that some heads
                ask for, and ``depths`` must name one.
            checkpoint: a file of the whole model or of its image encoder, with the published names.
            size, image_size, weights, seed: as of ``SAM``.
        """
        shape = shape_of(size, image_size)
        depths = shape.global_blocks if depths is None else depths
        super().__init__(f"sam_{size}", depths=depths, total=shape.depth, width=shape.width, prefix=0, normed=False)
        sam, self.source = built(self.name, shape, bands, weights, checkpoint, seed, encoder=True)
        self.encoder, self.bands = sam.image_encoder, bands
        self.image_size, self.patch_size = shape.image_size, (shape.patch, shape.patch)
        self.neck = neck
        if neck:
            self.channels = (*self.channels, shape.embedding)
        elif not self.depths:
            raise RequestError(f"{self.name}: no map is left: name a block in depths, or keep the neck")
        self.statistics = (MEAN, STD) if bands == 3 else None

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.encoder.blocks

    def embed(self, image: Tensor) -> Embedded:
        tokens = embedded(self, self.encoder, image)
        return Embedded(tokens, (tokens.shape[1], tokens.shape[2]), {})

    def final(self, tokens: Tensor) -> Tensor:
        """tokens (B, h, w, width) to the embedding (B, C, h, w)."""
        return self.encoder.neck(tokens.permute(0, 3, 1, 2))

    def summarise(self, tokens: Tensor) -> Tensor:
        return self.final(tokens).mean((2, 3))

    def ended(self, outputs: Sequence[Tensor], tokens: Tensor, grid: tuple[int, int]) -> Features:
        embedding = self.final(tokens)
        maps = [each.permute(0, 3, 1, 2) for each in outputs]
        return Features((*maps, embedding) if self.neck else tuple(maps), embedding.mean((2, 3)))

    def sites(self) -> Sites:
        whole = Site("model", 0, "", self, parameter=None, layout="BCHW", width=self.bands)
        return Sites([whole, *encoder_sites("encoder", self.encoder)], self.name)

    def example(self) -> tuple[Tensor]:
        return (_example(self, 3),)

    def __repr__(self) -> str:
        what = f"{self.name}, {self.bands} bands, image {self.image_size}, maps after blocks {self.depths} and the neck"
        return f"{type(self).__name__}({what}, weights: {self.source})"


def embedded(backbone: Any, encoder: Any, image: Tensor) -> Tensor:
    """image (B, bands, H, W) to tokens (B, h, w, width) with positions, resampled where the grid is not the stored."""
    check_image(backbone.name, image, backbone.bands)
    check_multiple(backbone.name, (image.shape[2], image.shape[3]), backbone.patch_size)
    tokens, positions = encoder.patch_embed(image), encoder.pos_embed
    if positions.shape[1:3] != tokens.shape[1:3]:
        positions = resampled(positions, (tokens.shape[1], tokens.shape[2]))
    return tokens + positions


def _example(backbone: Any, columns: int) -> Tensor:
    """Two images of 2 x ``columns`` patches, of about unit variance."""
    height, width = 2 * backbone.patch_size[0], columns * backbone.patch_size[1]
    return example_images(backbone, backbone.bands, height, width)
