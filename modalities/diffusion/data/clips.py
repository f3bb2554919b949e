"""Short clips with captions as key frames and their mask: drawn moving dots, and a folder of animated stickers."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modalities.diffusion.data.images import parted
from modalities.diffusion.data.keyframes import VGGFeatures, key_frames
from modalities.diffusion.frames import ANIMATIONS, over_white, read_frames
from modalities.diffusion.masks import frame_mask
from shared.errors import RequestError
from shared.training.order import EpochSampler

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class _Masked:
    """What both sources share: each clip is told by a number of key frames, and padded with zeros to one length.

    size: pixels a side; other shapes get transparent margins.  frames: of a clip with its padding.
    key_frames: least and most of them, drawn for each clip (published: 3 to 8).
    choice: of the key frames: "equal" spacing, "luv" (greatest changes of colour), or "features" (published: clusters
    of a VGG16's).  vgg16: its weights, for "features".
    bands: 4, the last alpha (white where nothing shows), for pixels; 3, on white, for an autoencoder.
    batch_size: clips of a training step.  checks: greatest number of clips of validation and of test.
    """

    size: int = 256
    frames: int = 8
    key_frames: tuple[int, int] = (3, 8)
    choice: Literal["equal", "luv", "features"] = "equal"
    vgg16: Path | None = None
    bands: int = 3
    batch_size: int = 1
    checks: int = 32
    seed: int = 0
    workers: int = 0

    rate: ClassVar[float] = 8.0  # frames a second of what a model makes

    def __post_init__(self) -> None:
        least, most = self.key_frames
        if not 2 <= least <= most <= self.frames:
            raise RequestError(f"key_frames {least} to {most}: from 2 to frames {self.frames}, in this order")
        if min(self.size, self.batch_size, self.checks) < 1:
            raise RequestError("size, batch_size and checks must be at least 1")
        if self.bands not in (3, 4):
            raise RequestError(f"bands {self.bands}: 3, or 4 with alpha")
        if (self.choice == "features") != (self.vgg16 is not None):
            raise RequestError("data.choice features and data.vgg16 go together: give both or neither")

    def count(self, split: str) -> int:
        raise NotImplementedError

    def read(self, split: str, index: int) -> tuple[np.ndarray, str, str]:
        """uint8 (N, H, W, 4) of one clip, N at least 2; caption; name."""
        raise NotImplementedError

    def sample(self, split: str, index: int) -> dict[str, Any]:
        """One clip: ``clip`` float32 (bands, frames, size, size) in -1 to 1, 0 where padded, ``frame_mask`` (frames,),
        ``caption``, ``name``. How many key frames is drawn anew in training, by the clip's number elsewhere."""
        read, caption, name = self.read(split, index)
        fixed = np.random.default_rng([self.seed, SPLITS.index(split), index])
        least, most = self.key_frames
        number = np.random.randint(least, most + 1) if split == "train" else int(fixed.integers(least, most + 1))
        try:
            if (name, number) not in self._chosen:
                self._chosen[name, number] = key_frames(read, number, self.choice, self._features)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from error
        real = pixels(read[self._chosen[name, number]], self.size, self.bands)
        clip = torch.zeros(self.bands, self.frames, self.size, self.size)
        clip[:, :number] = real
        return {"clip": clip, "frame_mask": frame_mask(number, self.frames), "caption": caption, "name": name}

    @functools.cached_property
    def _chosen(self) -> dict[tuple[str, int], list[int]]:
        """The key frames found so far, by the clip's name and their number."""
        return {}

    @functools.cached_property
    def _features(self) -> VGGFeatures | None:
        return None if self.vgg16 is None else VGGFeatures(self.vgg16)

    def train(self) -> DataLoader:
        return self._loader("train", EpochSampler(self.count("train"), self.seed))

    def validation(self) -> DataLoader:
        return self._loader("validation")

    def test(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, split: str, sampler: Any = None) -> DataLoader:
        return DataLoader(_Split(self, split), self.batch_size, sampler=sampler, num_workers=self.workers)

    def describe(self) -> dict[str, Any]:
        """The splits, and what a task needs to know to make more such clips."""
        return {
            "source": type(self).__name__,
            "clips": {split: self.count(split) for split in SPLITS},
            "bands": self.bands,
            "size": self.size,
            "frames": self.frames,
            "rate": self.rate,
            "key_frames": {"least": self.key_frames[0], "most": self.key_frames[1], "choice": self.choice},
            "normalisation": "-1 to 1",
        }


class _Split(Dataset):
    def __init__(self, data: _Masked, split: str):
        self.data, self.split = data, split

    def __len__(self) -> int:
        return self.data.count(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data.sample(self.split, index % len(self))


def pixels(frames: np.ndarray, size: int, bands: int) -> Tensor:
    """uint8 (F, H, W, 4) to float32 (bands, F, size, size) in -1 to 1, in the middle of transparent margins.

    With 4 bands, colours are straight (not multiplied by it), and white where nothing shows.
    """
    from PIL import Image

    sized = []
    for frame in frames:
        height, width = frame.shape[:2]
        scale = size / max(height, width)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = Image.fromarray(frame).resize(inner, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
        whole = Image.new("RGBA", (size, size), (255, 255, 255, 0))
        whole.paste(picture, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        sized.append(np.asarray(whole))
    found = np.stack(sized)
    nothing = np.array([255, 255, 255, 0], np.uint8)
    found = np.where(found[..., 3:] > 0, found, nothing) if bands == 4 else over_white(found)
    return torch.from_numpy(found).permute(3, 0, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class MovingDots(_Masked):
    """One coloured dot that moves over nothing in one of four directions, slowly or fast; needs no files.

    clips: of the training split; the checks come on top.
    """

    clips: int = 256
    size: int = 16
    bands: int = 4

    def count(self, split: str) -> int:
        return self.clips if split == "train" else self.checks

    def read(self, split: str, index: int) -> tuple[np.ndarray, str, str]:
        random = np.random.default_rng([self.seed, 1 + SPLITS.index(split), index])
        colour, way, pace = (str(random.choice(list(choices))) for choices in (_COLOURS, _WAYS, _PACES))
        centre, radius = random.uniform(0.3, 0.7, 2), random.uniform(0.12, 0.2)
        move = np.array(_WAYS[way]) * _PACES[pace]
        y, x = np.mgrid[: self.size, : self.size] + 0.5
        drawn = np.zeros((self.frames, self.size, self.size, 4), np.uint8)
        for i, frame in enumerate(drawn):
            place = (centre + (i - (self.frames - 1) / 2) * move) % 1  # out at one side, in at the other
            away = [np.abs(axis / self.size - p) for axis, p in zip((y, x), place, strict=True)]
            away = np.hypot(*(np.minimum(a, 1 - a) for a in away))
            frame[..., :3] = _COLOURS[colour]
            frame[..., 3] = 255 * np.clip(0.5 - (away - radius) * self.size, 0, 1)
        return drawn, f"a {colour} dot moves {way} {pace}", f"{split}/{index}"


_COLOURS = {"red": (230, 30, 30), "green": (30, 180, 50), "blue": (30, 50, 230), "black": (0, 0, 0)}
_WAYS = {"up": (-1.0, 0.0), "down": (1.0, 0.0), "left": (0.0, -1.0), "right": (0.0, 1.0)}
_PACES = {"slowly": 0.03, "fast": 0.09}  # sides of the picture a frame


@dataclass(frozen=True, kw_only=True)
class AnimatedStickers(_Masked):
    """Animated GIF, WebP and APNG files of a folder, with transparency, and a caption each.

    folder: holds the files.  captions: a CSV table with the columns file (relative to the folder) and caption; None:
    ``captions.csv`` in the folder where there is one, else every animated file with its name for a caption.
    validation_share, test_share: of the files, chosen by the seed.

    Raises RequestError that names the file where one is empty, cut short, no animation, or not there.
    """

    folder: Path
    captions: Path | None = None
    validation_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise RequestError("validation_share and test_share: from 0, together below 1")
        self.rows  # noqa: B018  raises now where the folder is wrong

    @functools.cached_property
    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """(file, caption) of every clip, by split."""
        rows = self._listed()
        for name, _ in rows:
            _check_animated(self.folder / name)
        return parted(rows, self.validation_share, self.test_share, self.seed)

    def _listed(self) -> list[tuple[str, str]]:
        table = self.captions or self.folder / "captions.csv"
        if self.captions is None and not table.is_file():
            names = sorted(p.name for p in self.folder.glob("*") if p.suffix.lower() in ANIMATIONS)
            if not names:
                raise RequestError(f"{self.folder}: no animated image in it ({', '.join(ANIMATIONS)})")
            return [(name, Path(name).stem.replace("_", " ").replace("-", " ")) for name in names]
        try:
            with open(table, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RequestError(f"{table}: cannot be read as a table: {error}") from error
        if not rows or any(not row.get("file") or row.get("caption") is None for row in rows):
            raise RequestError(f"{table}: wants rows with file and caption")
        return [(row["file"], row["caption"]) for row in rows]

    def count(self, split: str) -> int:
        rows = self.rows[split]
        return len(rows) if split == "train" else min(len(rows), self.checks)

    def read(self, split: str, index: int) -> tuple[np.ndarray, str, str]:
        name, caption = self.rows[split][index]
        return _read(self.folder / name, self.size), caption, name


def _check_animated(path: Path) -> None:
    """Raises RequestError where a file cannot be an animation; only its beginning is read."""
    from PIL import Image

    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    if not path.stat().st_size:
        raise RequestError(f"{path}: an empty file (0 bytes)")
    try:
        with Image.open(path) as file:
            animated = getattr(file, "is_animated", False)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: not a readable image ({' '.join(str(error).split())})") from error
    if not animated:
        raise RequestError(f"{path}: a clip of one frame; an animation has at least two")


@functools.lru_cache(maxsize=256)
def _read(path: Path, size: int) -> np.ndarray:
    """The frames, shrunk to at most four times the side they are used at, so that many can be kept."""
    from PIL import Image

    frames, _ = read_frames(path)
    scale = 4 * size / max(frames.shape[1:3])
    if scale >= 1:
        return frames
    sides = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(sides, Image.Resampling.BOX)) for frame in frames])
