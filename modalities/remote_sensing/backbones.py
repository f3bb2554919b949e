"""The backbone that comes with the package: a small vision transformer pretrained on aerial photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modalities.images.backbones import TimmViT
from modalities.remote_sensing.heads.pretraining import positions
from shared.backbone import Features

# Of the photographs it was pretrained on, red, green, blue, in 0 to 255. See the model card beside the weights.
MEAN, STD = (94.5, 97.23, 86.98), (48.81, 44.17, 45.24)
WEIGHTS = Path(__file__).parent / "weights" / "aerial_vit.safetensors"


class AerialViT(TimmViT):
    """A vision transformer with 2.7 M parameters, patches of 8 pixels and 6 blocks, whose weights are in the package.

    How they were made, from what, and what they reach stands in ``weights/aerial_vit.md``. It has no class token: the
    summary is the mean of the normed tokens. Images of any size that is a multiple of 8 and any number of bands are
    taken; the patch kernel for other than three bands is the RGB kernel repeated, as timm does it. Bands should come
    normalised to about zero mean and unit deviation.

    bands: channels of the image.
    """

    def __init__(
        self,
        bands: int,
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        checkpoint: str | None = None,
        depths: Sequence[int] | None = None,
        normed: bool = True,
        pixels: bool = False,
        seed: int = 0,
    ):
        """
        Args:
            weights: "pretrained" (those of the package, or ``checkpoint``) or "random" (seeded).
            checkpoint: a .safetensors file written by ``modalities.remote_sensing.export_weights``.
            depths: blocks (0-based) whose output becomes a map; None means four evenly spaced, the last included.
            normed: apply the final norm to the maps.
            pixels: give the image itself as the first map, for heads that join spectra with tokens (``PixelDecoder``).
            seed: of the random weights.

        Raises RequestError where an argument or the file does not fit.
        """
        packaged = weights == "pretrained" and checkpoint is None
        shape: dict[str, Any] = {"embed_dim": 192, "depth": 6, "num_heads": 3}
        super().__init__(
            bands,
            name="vit_tiny_patch16_224",
            image_size=96,
            patch_size=8,
            depths=depths,
            normed=normed,
            weights=weights,
            checkpoint=str(WEIGHTS) if packaged else checkpoint,
            seed=seed,
            model_args={**shape, "class_token": False, "global_pool": "avg", "fc_norm": False},
        )
        self.name, self.pixels = "aerial_vit", pixels
        if pixels:
            self.channels = (bands, *self.channels)
        self.statistics = (MEAN, STD) if bands == 3 else None
        if weights == "random":  # sines and cosines: neighbours resemble each other from the start
            with torch.no_grad():
                self.model.pos_embed.copy_(0.5 * positions((12, 12), 192))
        if packaged:
            self.source = self.source.replace(f"file: {WEIGHTS}", f"packaged: {WEIGHTS.name}")

    def forward(self, image: Tensor) -> Features:
        features = super().forward(image)
        return Features((image, *features.maps), features.summary) if self.pixels else features
