"""What a backbone is asked for, checked: the library, image and patch size, bands, depths; and images to try it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import RequestError

# Mean and deviation of each band.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def library(name: str) -> Any:
    """An optional library of the ``images`` extra, imported when first used."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{name} cannot be imported ({error}); install it: pip install 'omniadapt[images]'"
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the names of ``known`` closest to ``word``."""
    close = difflib.get_close_matches(word, list(known), n=4, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def byte_statistics(config: Mapping[str, Any], bands: int) -> Statistics | None:
    """``mean`` and ``std`` (of values from 0 to 1) of a library's configuration, in values from 0 to 255.

    They are those of red, green and blue: None for another number of bands.
    """
    if bands != 3:
        return None
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))
    return mean, std


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two, in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise RequestError(f"image size {height} x {width}: both sides must be at least 1 pixel")
    return height, width


def check_multiple(name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise where a side of an image is no multiple of the patch, naming the nearest sizes that are."""
    for side, pixels, step in zip(("height", "width"), size, patch, strict=True):
        if pixels % step:
            below, above = pixels // step * step, (pixels // step + 1) * step
            sizes = f"{below} and {above} are" if below else f"{above} is"
            raise RequestError(f"{name}: image {side} {pixels} is no multiple of its patch of {step} pixels; {sizes}")


def check_image(name: str, image: Tensor, bands: int) -> None:
    """Raise where a batch of images has not the shape (B, bands, H, W)."""
    if image.ndim != 4 or image.shape[1] != bands:
        raise RequestError(f"{name}: images must be (batch, {bands} bands, height, width), got {tuple(image.shape)}")


def check_bands(name: str, bands: int) -> None:
    """Raise where images would have no band."""
    if bands < 1:
        raise RequestError(f"{name}: bands {bands}: at least 1 is needed")


def example_images(model: nn.Module, bands: int, height: int, width: int) -> Tensor:
    """Two images (batch norms need more than one value) of about unit variance, the same always, for this model."""
    images = torch.randn(2, bands, height, width, generator=torch.Generator().manual_seed(0), device="cpu")
    return images.to(next(model.parameters()))


def evenly_spaced(total: int, count: int = 4) -> tuple[int, ...]:
    """``count`` depths (0-based) at equal steps through ``total`` blocks, the last included; all of fewer blocks."""
    count = min(count, total)
    return tuple(round((i + 1) * total / count) - 1 for i in range(count))


def fit_bands(kernel: Tensor, bands: int, source: str) -> Tensor:
    """An RGB patch kernel (C, 3, h, w) for another number of bands, as timm does: repeated and scaled by 3 / bands.

    Raises RequestError where the kernel has neither 3 nor ``bands`` input bands.
    """
    if kernel.shape[1] == bands:
        return kernel
    if kernel.shape[1] != 3:
        raise RequestError(f"{source}: its patch kernel takes {kernel.shape[1]} bands, the backbone {bands}")
    return library("timm.models").adapt_input_conv(bands, kernel)
