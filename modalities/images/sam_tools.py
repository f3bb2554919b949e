"""SamPredictor and SamAutomaticMaskGenerator of ``segment_anything`` for an adapted model, prompts checked first."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from modalities.images.backbones import SAM
from modalities.images.backbones.inputs import library
from shared.adapted import Adapted
from shared.errors import RequestError


def predictor(model: Adapted | SAM) -> Any:
    """The library's ``SamPredictor``, whose answers are those of the adapters in force at each call.

    A prompt that lies outside the image raises RequestError instead of an answer that means nothing. For a model of
    other than three bands ``set_image`` takes normalised values (H, W, bands), which it resizes as the library would.

    Raises RequestError where an adapter acts around the whole model, which the predictor calls in parts.
    """
    backbone: Any = model.backbone if isinstance(model, Adapted) else model
    if not isinstance(backbone, SAM):
        raise RequestError(f"SamPredictor is for the backbone SAM, not {type(backbone).__name__}")
    backbone.check_halves()
    return _checked()(backbone)


def mask_generator(model: Adapted | SAM, **settings: Any) -> Any:
    """The library's ``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of points.

    settings: the library's own, such as ``points_per_side`` and ``pred_iou_thresh``. Raises as ``predictor`` does, and
    where the library refuses a setting.
    """
    found = predictor(model)
    try:
        generator = library("segment_anything").SamAutomaticMaskGenerator(found.model, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise RequestError(f"SamAutomaticMaskGenerator: {error}") from error
    generator.predictor = found
    return generator


@cache
def _checked() -> type:
    base = library("segment_anything").SamPredictor

    class CheckedPredictor(base):
        """The library's predictor; prompts are looked at before they are answered."""

        def __init__(self, backbone: SAM):
            super().__init__(backbone.sam)
            self.bands = backbone.bands

        def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
            """uint8 (H, W, 3); for other than three bands normalised float (H, W, bands)."""
            if image.ndim != 3 or image.shape[2] != self.bands:
                raise RequestError(f"image of shape {image.shape}: the model takes (height, width, {self.bands} bands)")
            if self.bands == 3:
                if image.dtype != np.uint8:
                    raise RequestError(f"image of {image.dtype}: SamPredictor takes uint8, values from 0 to 255")
                super().set_image(image, image_format)
            else:
                self._set_bands(image)

        @torch.no_grad()
        def _set_bands(self, image: np.ndarray) -> None:
            self.reset_image()
            values = torch.as_tensor(image, dtype=torch.float32, device=self.device).permute(2, 0, 1)[None]
            size = self.transform.get_preprocess_shape(*image.shape[:2], self.transform.target_length)
            values = F.interpolate(values, size, mode="bilinear", antialias=True)
            self.original_size, self.input_size = image.shape[:2], tuple(size)
            self.features = self.model.image_encoder(self.model.preprocess(values))
            self.is_image_set = True

        def predict(
            self, point_coords: Any = None, point_labels: Any = None, box: Any = None, mask_input: Any = None,
            *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if not self.is_image_set:
                raise RequestError("no image is set: call set_image before predict")
            if (point_coords is None) != (point_labels is None):
                raise RequestError("points need labels, 1 on the object and 0 off it, and labels points")
            for what, places in (("point", point_coords), ("box corner", box)):
                if places is not None:
                    _within(what, np.asarray(places, float).reshape(-1, 2), self.original_size)
            return super().predict(point_coords, point_labels, box, mask_input, *args, **kwargs)

    return CheckedPredictor


def _within(what: str, places: np.ndarray, size: tuple[int, ...]) -> None:
    """Raise where one of the places x, y (N, 2) is not within an image of ``size`` (height, width)."""
    height, width = size
    for x, y in places:
        if not (0 <= x <= width and 0 <= y <= height):  # not a number is outside too
            raise RequestError(f"{what} ({x:g}, {y:g}) lies outside the image, {width} pixels wide and {height} high")
