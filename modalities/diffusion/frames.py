"""Frames of animated images: GIF, WebP and APNG files, and folders with one picture a frame."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import RequestError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")


def read_frames(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame as it is shown, and for how long.

    path: an animated (or still) image, or a folder of pictures of one size, which are taken in the order of their names
    ("10.png" after "9.png").
    Gives uint8 (F, H, W, 4), red, green, blue, alpha, and float64 (F,), milliseconds, as the file says: 0 where it says
    nothing, as for pictures of a folder.

    Raises RequestError where the file is cut short, is no image, or pictures of a folder differ in size.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    frames, durations = _read(path)
    return np.stack(frames), np.array(durations, dtype=np.float64)


def over_white(frames: np.ndarray) -> np.ndarray:
    """uint8 (F, H, W, 4) to (F, H, W, 3): what is transparent becomes white."""
    alpha = frames[..., 3:].astype(np.uint16)
    return ((frames[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in PICTURES), key=_in_order)
    if not paths:
        raise RequestError(f"{folder}: no pictures in it ({', '.join(PICTURES)})")
    frames = [_read(path)[0][0] for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            sizes = f"{frame.shape[1]} x {frame.shape[0]}, {paths[0].name} {frames[0].shape[1]} x {frames[0].shape[0]}"
            raise RequestError(f"{path}: frames of one clip must have one size, this one has {sizes}")
    return np.stack(frames), np.zeros(len(frames))


def _in_order(path: Path) -> tuple[Any, ...]:
    """A sort key by name, numbers in it by value."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", path.name) if p)


def _read(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """The frames of one file, each composed over those before as the format says, and their times."""
    from PIL import Image

    frames, durations = [], []
    try:
        with Image.open(path) as file:
            first = 1 if file.info.get("default_image") else 0  # an APNG's still picture is no frame of it
            for number in range(first, getattr(file, "n_frames", 1)):
                file.seek(number)
                frames.append(np.array(file.convert("RGBA")))
                durations.append(float(file.info.get("duration") or 0))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: not a readable image ({' '.join(str(error).split())})") from error
    if not frames:
        raise RequestError(f"{path}: an image without frames")
    return frames, durations
