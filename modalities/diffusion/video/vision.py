"""What a content branch is told of an image: the features of a frozen CLIP vision model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import RequestError


class Vision:
    """The features of images as an IP-Adapter's image projection wants them, by a pipeline's image encoder.

    pipeline: of diffusers.  source: where an image encoder comes from if the pipeline has none: a folder, or a Hugging
    Face name, which may go on with a folder ("h94/IP-Adapter/models/image_encoder").

    Raises RequestError where there is neither.
    """

    def __init__(self, pipeline: Any, source: str | None):
        if pipeline is None:
            raise RequestError("the backbone has a content branch: give the task a pipeline, whose images it can see")
        self.pipeline = pipeline
        if source is not None:
            pipeline.register_modules(image_encoder=_encoder(source))
        encoder = getattr(pipeline, "image_encoder", None)
        if encoder is None:
            raise RequestError(
                "the backbone has a content branch, the pipeline no image encoder: give image_encoder, such as "
                "h94/IP-Adapter/models/image_encoder"
            )
        encoder.requires_grad_(False).eval()
        if getattr(pipeline, "feature_extractor", None) is None:
            from transformers import CLIPImageProcessor

            side = encoder.config.image_size
            pipeline.register_modules(feature_extractor=CLIPImageProcessor(size=side, crop_size=side))

    @torch.no_grad()
    def __call__(self, images: Tensor, dropped: Sequence[bool] = ()) -> Tensor:
        """Features (B, 1, tokens, width), or (B, 1, width) for a projection of summaries.

        images: (B, 3, H, W) in -1 to 1.  dropped: those that get the features of nothing, an image of zeros.
        """
        encoder, kind = self.pipeline.image_encoder, self.pipeline.unet.encoder_hid_proj.image_projection_layers[0]
        encoder.to(images.device)
        pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
        several = type(kind).__name__ != "ImageProjection"
        found, nothing = self.pipeline.encode_image(list(pixels), images.device, 1, several)
        if dropped:
            found = torch.where(
                torch.tensor(dropped, device=found.device).view(-1, *[1] * (found.ndim - 1)), nothing, found
            )
        return found[:, None].to(images.dtype)


def _encoder(source: str) -> Any:
    from transformers import CLIPVisionModelWithProjection

    owner, _, rest = source.partition("/")
    name, _, folder = rest.partition("/")
    where: dict[str, Any] = {} if Path(source).is_dir() or not folder else {"subfolder": folder}
    try:
        return CLIPVisionModelWithProjection.from_pretrained(f"{owner}/{name}" if where else source, **where)
    except (OSError, ValueError) as error:
        raise RequestError(f"{source}: no CLIP vision model to load: {' '.join(str(error).split())[:200]}") from error
