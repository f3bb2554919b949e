"""Short clips with captions, to train a video model: drawn shapes that move, and a folder of animated images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from modalities.diffusion.buckets import Draw, Size, cover
from modalities.diffusion.data.images import COLOURS, SPLITS, ManySizes, captioned, outside, parted
from modalities.diffusion.frames import ANIMATIONS, PICTURES, over_white, read_frames
from shared.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class _Clips(ManySizes):
    """Clips of one length; sizes as of images, by default the published 512 x 512.

    frames: of a clip.  A sample is ``clip`` float32 (3, frames, height, width) in -1 to 1, ``caption``, ``crop``
    (top, left), ``name``; it is the same part of each frame.
    """

    low: int = 512
    high: int = 512
    probability: Literal["uniform", "area", "distance"] = "uniform"
    batch_size: int = 1
    frames: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 2:
            raise RequestError(f"frames {self.frames}: a clip has at least 2")

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        clips = told.pop("images")
        return {**told, "clips": clips, "bands": self.bands, "frames": self.frames, "step": self.step}


@dataclass(frozen=True, kw_only=True)
class MovingShapes(_Clips):
    """A coloured disc, square or ring that moves over a gradient, drawn at the size asked for; needs no files.

    clips: of the training split; the checks come on top.
    """

    clips: int = 256

    def count(self, split: str) -> int:
        return self.clips if split == "train" else self.checks

    def sample(self, split: str, draw: Draw | tuple[int, Size, None]) -> dict[str, Any]:
        index, size, seed = draw
        random = np.random.default_rng((self.seed, SPLITS.index(split), index))
        side = max(size)
        _, (top, left) = cover(side, side, size, seed)
        y = ((np.arange(size.height) + 0.5 + top) / side)[:, None]
        x = ((np.arange(size.width) + 0.5 + left) / side)[None, :]
        low, high = random.uniform(0.2, 0.8, (2, 3, 1, 1))
        ground = low * (1 - x) + high * x + 0 * y
        shape, colour = str(random.choice(("disc", "square", "ring"))), str(random.choice(list(COLOURS)))
        way = str(random.choice(("left", "right", "up", "down")))
        start, radius, far = random.uniform(0.4, 0.6, 2), random.uniform(0.12, 0.25), random.uniform(0.2, 0.35)
        step = {"left": (0, -far), "right": (0, far), "up": (-far, 0), "down": (far, 0)}[way]
        paint, frames = np.array(COLOURS[colour])[:, None, None], []
        for time in np.linspace(0, 1, self.frames):
            away = outside(shape, y - start[0] - time * step[0], x - start[1] - time * step[1], radius)
            inside = np.clip(0.5 - away * side, 0, 1)
            frames.append(ground * (1 - inside) + paint * inside)
        clip = torch.from_numpy(np.stack(frames, axis=1).astype(np.float32) * 2 - 1)
        caption = f"a {colour} {shape} moving {way}"
        return {"clip": clip, "caption": caption, "crop": torch.tensor([top, left]), "name": f"{split}/{index}"}


@dataclass(frozen=True, kw_only=True)
class CaptionedClips(_Clips):
    """Animated images of a folder with their captions, resized to cover the size and cropped at a random place.

    folder: holds ``captions.csv`` with the columns file and caption; a file is a GIF, WebP or APNG, or a folder of
    pictures. Without that table every clip in the folder is taken, its name for its caption. Transparent parts are put
    on white.  stride: every how many frames one is taken. A clip that is too short begins again; in training it starts
    at a random frame.  validation_share, test_share: of the clips, chosen by the seed.
    """

    folder: Path
    stride: int = 1
    validation_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise RequestError(f"stride {self.stride}: use 1 or more")
        self.rows  # noqa: B018  raises now where the folder or a share is wrong

    @functools.cached_property
    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """(file, caption) of every clip, by split."""
        rows = _listed(self.folder)
        return parted(rows, self.validation_share, self.test_share, self.seed)

    def count(self, split: str) -> int:
        return len(self.rows[split])

    def sample(self, split: str, draw: Draw | tuple[int, Size, None]) -> dict[str, Any]:
        from PIL import Image

        index, size, seed = draw
        name, caption = self.rows[split][index]
        pixels = over_white(read_frames(self.folder / name)[0])
        if len(pixels) < 2:
            raise RequestError(f"{self.folder / name}: one frame is no clip")
        first = 0 if seed is None else int(np.random.default_rng(seed).integers(len(pixels)))
        pixels = pixels[(first + self.stride * np.arange(self.frames)) % len(pixels)]
        (height, width), (top, left) = cover(pixels.shape[1], pixels.shape[2], size, seed)
        box = (left, top, left + size.width, top + size.height)
        frames = [np.array(Image.fromarray(frame).resize((width, height)).crop(box)) for frame in pixels]
        clip = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
        return {"clip": clip, "caption": caption, "crop": torch.tensor([top, left]), "name": name}


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(file, caption) of every clip; all must be there."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    table = folder / "captions.csv"
    if not table.is_file():
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in ANIMATIONS or _holds_pictures(p))
        if not names:
            raise RequestError(f"{folder}: neither captions.csv (file, caption) nor clips ({', '.join(ANIMATIONS)})")
        return [(name, Path(name).stem.replace("_", " ").replace("-", " ")) for name in names]
    return captioned(table, ("file", "caption"), Path.exists)


def _holds_pictures(path: Path) -> bool:
    return path.is_dir() and any(p.suffix.lower() in PICTURES for p in path.iterdir())
