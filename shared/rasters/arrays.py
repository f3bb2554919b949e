"""Arrays: images in NumPy's .npy files, whose axes may stand in either order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.errors import RequestError


def open_array(path: Path, layout: str | None) -> np.ndarray:
    """A .npy file, memory-mapped, seen as (bands, H, W). layout: "HWC" or "CHW" of three axes. Raises RequestError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise RequestError(
            f"{path}: damaged, or not a plain .npy array ({str(error).partition(chr(10))[0]})"
        ) from error
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise RequestError(
            f"{path}: holds {array.dtype} {array.shape}; an image has numbers of shape (H, W), HWC or CHW"
        )
    if array.ndim == 2:
        return array[None]
    layout = layout or _guess_layout(path, array.shape)
    if layout not in ("HWC", "CHW"):
        raise RequestError(f"layout {layout!r} of .npy files: use 'HWC' or 'CHW'")
    return array if layout == "CHW" else np.moveaxis(array, 2, 0)


def _guess_layout(path: Path, shape: tuple[int, ...]) -> str:
    """The layout of a shape that leaves no doubt: bands are the one axis at most half as long as both others."""
    first, middle, last = shape
    if 2 * first <= min(middle, last):
        return "CHW"
    if 2 * last <= min(first, middle):
        return "HWC"
    raise RequestError(f"{path}: which axis of {shape} holds the bands is not plain; state layout 'HWC' or 'CHW'")
