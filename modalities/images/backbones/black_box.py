"""A black box: a classifier known by its answers alone, whether a function, a finished run, or a server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from modalities.images.backbones.endpoint import Endpoint
from modalities.images.backbones.inputs import check_image
from shared.backbone import Backbone, Features
from shared.errors import RequestError, WorkError
from shared.sites import Site, Sites

# Of the images that CLIP was trained on (Radford et al., 2021), in values from 0 to 255.
CLIP_MEAN, CLIP_STD = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)
Answers: TypeAlias = Callable[[Tensor], Tensor | np.ndarray]


class BlackBox(Backbone):
    """Images in, logits out; no parameter, no gradient, and what lies behind is never touched.

    The summary is the logits (B, ``classes``), to be read by ``Logits``; there are no maps. ``calls`` and ``images``
    count what was asked of it. It is given float32 images, normalised by ``mean`` and ``std``.

    bands: channels of the image.
    """

    differentiable = False
    identity: Tensor

    def __init__(
        self,
        bands: int,
        *,
        model: str | Any,
        classes: int | None = None,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        timeout: float = 30.0,
        retries: int = 2,
    ):
        """
        Args:
            model: a URL (see ``Endpoint``), the directory of a finished run of image classification, ``hf://owner/name``,
                or, in Python, a function of images (B, bands, H, W) that gives logits as a tensor or an array.
            classes: number of logits; a run states its own.
            image_size: pixels a side of the images it takes; a run states its own.
            mean, std: of each band, in values from 0 to 255; a run states its own, else those of CLIP. With mean 0 and
                std 255 it gets values from 0 to 1.
            timeout, retries: of a URL: seconds without an answer, and further tries.

        Raises RequestError where something does not fit or is not stated.
        """
        name = model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
        super().__init__(f"black box {name}")
        stated, digest = {"classes": classes, "image_size": image_size}, b""
        if isinstance(model, str) and not model.startswith(("http://", "https://")):
            model, stated, mean, std, digest = _run(model, bands)
        if not stated["classes"] or stated["classes"] < 2 or stated["image_size"] < 1:
            raise RequestError(f"{self.name}: state its classes, at least 2 logits, and image_size in pixels")
        self.bands, self.classes, self.image_size = bands, stated["classes"], stated["image_size"]
        self.summary_width = self.classes
        self.statistics = _statistics(self.name, bands, mean, std)
        if isinstance(model, str):
            model = Endpoint(model, self.classes, timeout=timeout, retries=retries)
        self._model: tuple[Answers] = (model,)  # a tuple, so that a module behind it is no part of this one
        self.calls = self.images = 0
        self.source = "behind a black box"
        self.register_buffer("identity", torch.frombuffer(bytearray(digest or bytes(16)), dtype=torch.uint8))

    def sites(self) -> Sites:
        return Sites([Site("model", 0, "", self, None, layout="BCHW", width=self.bands)], self.name)

    def example(self) -> tuple[Tensor]:
        """Two images of the size it takes, of about unit variance."""
        size = (2, self.bands, self.image_size, self.image_size)
        return (torch.randn(size, generator=torch.Generator().manual_seed(0), device="cpu").to(self.identity.device),)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """Raises WorkError where the answer is not finite logits (B, classes)."""
        check_image(self.name, image, self.bands)
        self.calls, self.images = self.calls + 1, self.images + len(image)
        logits = torch.as_tensor(self._model[0](image.detach().float())).detach().to(image.device, torch.float32)
        if logits.shape != (len(image), self.classes):
            wanted = (len(image), self.classes)
            raise WorkError(f"{self.name}: answered with shape {tuple(logits.shape)}; its logits should be {wanted}")
        if not torch.isfinite(logits).all():
            raise WorkError(f"{self.name}: answered with logits that are not finite")
        return Features((), logits)


def _statistics(name: str, bands: int, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if mean is None and std is None and bands == 3:
        return CLIP_MEAN, CLIP_STD
    mean, std = tuple(mean or ()), tuple(std or ())
    if not len(mean) == len(std) == bands or not all(value > 0 for value in std):
        raise RequestError(f"{name}: mean {mean} and std {std}: state one of each for {bands} bands, std above 0")
    return mean, std


def _run(folder: str, bands: int) -> tuple[Answers, dict[str, Any], Any, Any, bytes]:
    """A finished run as a function, what its data said, and a digest of what it learnt."""
    from shared.run import load

    with torch.device("cpu"):  # also where no weights are wanted but its own
        task, described, identity = load(folder)
    scale = described.get("normalisation")
    if not (isinstance(scale, dict) and {"mean", "std"} <= scale.keys() and "size" in described):
        raise RequestError(f"model {folder}: not a run of image classification")
    if len(described["band_names"]) != bands:
        raise RequestError(f"model {folder}: takes {len(described['band_names'])} bands, the data have {bands}")

    def answers(image: Tensor) -> Tensor:
        return task.outputs({"image": image.to(task.device)})

    stated = {"classes": len(described["classes"]), "image_size": described["size"]}
    digest = hashlib.sha256(str(identity["adapter"]).encode()).digest()[:16]
    return answers, stated, scale["mean"], scale["std"], digest
