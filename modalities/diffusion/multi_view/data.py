"""Objects seen by several cameras, to train a multi-view model: generated solids, and a folder of rendered views."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from modalities.diffusion.buckets import BucketSampler, Size
from modalities.diffusion.geometry import cameras
from modalities.diffusion.geometry.cameras import Cameras
from modalities.diffusion.multi_view import solids
from shared.errors import RequestError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """What both sources share.

    size: of a view's side, pixels (published: 768 for SDXL, 512 for SD2.1).  maps: what the encoder is told, "rays" of
    the cameras around the object, or its "geometry", positions and normals from the six sides.
    views: cameras, for rays.  batch_size: objects of a training step on one device.  checks: objects of validation and
    of test.  erase: cut a box of an eighth to a quarter of the side out of training references (published variant).
    apart: a batch holds each view as an image of its own, to train a base by ``Denoising``.
    """

    size: int = 768
    maps: Literal["rays", "geometry"] = "rays"
    views: int = 6
    batch_size: int = 1
    checks: int = 4
    erase: bool = False
    apart: bool = False
    seed: int = 0
    workers: int = 0

    bands: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if min(self.size, self.views, self.batch_size, self.checks) < 1:
            raise RequestError("size, views, batch_size and checks must be at least 1")
        if self.maps == "geometry" and self.views != 6:
            raise RequestError(f"views {self.views}: geometry is seen from its 6 sides")

    @property
    def cameras(self) -> Cameras:
        """Of the views, where an object does not say otherwise."""
        return cameras.geometry_guided() if self.maps == "geometry" else cameras.view_guided(self.views)

    @property
    def step(self) -> int:
        return self.size

    def checked_sizes(self) -> list[Size]:
        return [Size(self.size, self.size)]

    def count(self, split: str) -> int:
        """Number of objects of a split."""
        raise NotImplementedError

    def sample(self, split: str, index: int, seed: int | None) -> dict[str, Any]:
        """One object: ``image`` (V, 3, S, S) and ``reference`` (3, S, S) in -1 to 1 on grey, ``control`` (V, 6, S, S)
        or (V, 6, 1, 1), ``caption``, ``name``; for measures ``positions`` (V, S, S, 3), ``alpha`` (V, S, S), 0 where
        unknown, and the cameras' ``c2w`` and ``projection``. seed: of the choice of its reference, None: a fixed one.
        """
        raise NotImplementedError

    def train(self) -> DataLoader:
        """Batches of objects in an order that the seed and the epoch decide."""
        sampler = BucketSampler(
            self.count("train"), self.checked_sizes(), batch_size=self.batch_size, seed=self.seed
        )  # fmt: skip
        return DataLoader(_Split(self, "train"), sampler=sampler, batch_size=None, num_workers=self.workers)

    def validation(self) -> DataLoader:
        return self._checks("validation")

    def test(self) -> DataLoader:
        return self._checks("test")

    def _checks(self, split: str) -> DataLoader:
        count = min(self.checks, self.count(split))
        batches = [list(range(i, min(i + self.batch_size, count))) for i in range(0, count, self.batch_size)]
        return DataLoader(_Split(self, split, batches), batch_size=None, num_workers=self.workers)

    def describe(self) -> dict[str, Any]:
        """The splits and views, for the run directory, the adapter file and ``generate``."""
        return {
            "source": type(self).__name__,
            "objects": {split: self.count(split) for split in SPLITS},
            "size": self.size, "maps": self.maps, "views": self.views, "bands": self.bands,
            "normalisation": "-1 to 1",
        }  # fmt: skip

    def _made(
        self, seen: solids.Seen, around: Cameras, reference: tuple[Tensor, Tensor], random: np.random.Generator | None
    ) -> dict[str, Any]:
        """The tensors of a sample. reference: colour (3, S, S) in 0 to 1 and alpha (S, S).  random: in training."""
        colour, alpha = reference
        if self.erase and random is not None:
            side = int(random.integers(self.size // 8, self.size // 4 + 1))
            top, left = random.integers(0, self.size - side + 1, 2)
            alpha = alpha.clone()
            alpha[top : top + side, left : left + side] = 0
        if self.maps == "geometry":
            control = cameras.geometry_maps(seen.positions, seen.normals)
        else:
            control = cameras.ray_maps(around, (1, 1))
        return {
            "image": on_grey(seen.colour, seen.alpha[:, None]), "reference": on_grey(colour, alpha[None]),
            "control": control, "positions": seen.positions, "alpha": seen.alpha,
            "c2w": around.c2w, "projection": around.projection,
        }  # fmt: skip


class _Split(Dataset):
    """Whole batches: for a list of draws (training), or by number (fixed checks)."""

    def __init__(self, data: _Objects, split: str, batches: list[list[int]] | None = None):
        self.data, self.split, self.batches = data, split, batches or []

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        draws = [(index, None) for index in self.batches[key]] if isinstance(key, int) else [(d[0], d[2]) for d in key]
        batch = default_collate([self.data.sample(self.split, index, seed) for index, seed in draws])
        return _each_view(batch) if self.data.apart else batch


def _each_view(batch: dict[str, Any]) -> dict[str, Any]:
    """What ``Denoising`` takes, of the views of a batch of objects: whole images."""
    views = batch["image"].shape[1]
    told = {key: [value for value in batch[key] for _ in range(views)] for key in ("caption", "name")}
    images = batch["image"].flatten(0, 1)
    return {"image": images, "crop": torch.zeros(len(images), 2, dtype=torch.long), **told}


def on_grey(colour: Tensor, alpha: Tensor) -> Tensor:
    """Colour in 0 to 1 over the published background, as -1 to 1; alpha (..., 1, H, W) for colour (..., 3, H, W)."""
    return (colour * alpha + 0.5 * (1 - alpha)) * 2 - 1


@dataclass(frozen=True, kw_only=True)
class GeneratedSolids(_Objects):
    """Boxes and balls of two colours, one or two on top of each other, turned at random; needs no files.

    objects: of the training split; the checks come on top.  plain: one solid of one colour, which neither rays nor
    geometry tell.
    """

    objects: int = 64
    plain: bool = False

    def count(self, split: str) -> int:
        return self.objects if split == "train" else self.checks

    def sample(self, split: str, index: int, seed: int | None) -> dict[str, Any]:
        things, caption = solids.draw(np.random.default_rng((self.seed, SPLITS.index(split), index)), self.plain)
        random = np.random.default_rng((self.seed, index) if seed is None else seed)
        square, around = (self.size, self.size), self.cameras
        view = cameras.orthographic([float(random.uniform(0, 360))], float(random.uniform(-10, 40)))
        reference = solids.render(things, view, square)
        made = self._made(
            solids.render(things, around, square),
            around,
            (reference.colour[0], reference.alpha[0]),
            None if seed is None else random,
        )
        return {**made, "caption": caption, "name": f"{split}/{index}"}


@dataclass(frozen=True, kw_only=True)
class RenderedObjects(_Objects):
    """Views of objects rendered by orthographic cameras, with captions.

    folder: holds ``captions.csv`` with the columns id and caption, and for each object a folder of that id with
    ``view_0.png`` and so on, square, with alpha, one for each camera. ``meta.json`` there may name the cameras:
    {"azimuth": [..], "elevation": [..], "distance": 1.8, "scale": 1.1} in degrees; without it they are the published
    ones. ``reference_0.png`` and so on: further views, one of which is the reference; without them it is a view.
    For geometry, and to measure agreement, ``depth_0.npy`` (S, S), from the camera along its view, and ``normal_0.png``
    (of the world, (n + 1) / 2 as colour) for each view.
    validation_share, test_share: of the objects, chosen by the seed.
    """

    folder: Path
    validation_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise RequestError("validation_share and test_share: from 0, together below 1")
        rows = _captions(self.folder)
        order = np.random.default_rng(self.seed).permutation(len(rows)).tolist()
        held = [round(len(rows) * share) for share in (self.validation_share, self.test_share)]
        ends = {"validation": (0, held[0]), "test": (held[0], sum(held)), "train": (sum(held), len(rows))}
        object.__setattr__(self, "_rows", {split: [rows[i] for i in order[a:b]] for split, (a, b) in ends.items()})

    def count(self, split: str) -> int:
        return len(self._rows[split])  # type: ignore[attr-defined]

    def sample(self, split: str, index: int, seed: int | None) -> dict[str, Any]:
        name, caption = self._rows[split][index]  # type: ignore[attr-defined]
        folder = self.folder / name
        around = _cameras(folder, self.cameras)
        pictures = [_picture(folder / f"view_{i}.png", self.size) for i in range(len(around))]
        colour, alpha = torch.stack([p[:3] for p in pictures]), torch.stack([p[3] for p in pictures])
        positions, normals = self._geometry(folder, around, alpha)
        random = np.random.default_rng(seed if seed is not None else (self.seed, index))
        others = sorted(folder.glob("reference_*.png")) or sorted(folder.glob("view_*.png"))
        reference = _picture(others[int(random.integers(len(others)))], self.size)
        seen = solids.Seen(colour, alpha, positions, normals)
        made = self._made(seen, around, (reference[:3], reference[3]), None if seed is None else random)
        return {**made, "caption": caption, "name": name}

    def _geometry(self, folder: Path, around: Cameras, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and normals (V, S, S, 3), 0 where there is nothing or nothing is known."""
        files = [(folder / f"depth_{i}.npy", folder / f"normal_{i}.png") for i in range(len(around))]
        if self.maps == "rays" and not all(depth.is_file() for depth, _ in files):
            return torch.zeros(*alpha.shape, 3), torch.zeros(*alpha.shape, 3)
        if absent := [path for pair in files for path in pair if not path.is_file() and self.maps == "geometry"]:
            raise RequestError(f"{absent[0]}: no such file: geometry wants depth and normals of every view")
        depth = torch.stack([_depth(path, self.size) for path, _ in files])
        positions = cameras.positions_from_depth(around, depth, alpha > 0.5)
        if self.maps == "rays":
            return positions, torch.zeros_like(positions)
        normals = torch.stack([_picture(path, self.size)[:3] * 2 - 1 for _, path in files]).permute(0, 2, 3, 1)
        return positions, normals * (alpha > 0.5)[..., None]


def _captions(folder: Path) -> list[tuple[str, str]]:
    """(id, caption) of every row of the folder's table; all folders must be there."""
    table = folder / "captions.csv"
    if not table.is_file():
        raise RequestError(f"{table}: no such file; it names the objects: columns id and caption")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(row.get(column) is None for row in rows for column in ("id", "caption")):
        raise RequestError(f"{table}: wants rows with id and caption")
    if absent := [row["id"] for row in rows if not (folder / row["id"]).is_dir()]:
        raise RequestError(f"{table}: {len(absent)} of its objects have no folder (first: {absent[0]})")
    return [(row["id"], row["caption"]) for row in rows]


def _cameras(folder: Path, otherwise: Cameras) -> Cameras:
    path = folder / "meta.json"
    if not path.is_file():
        return otherwise
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = cameras.orthographic(
            told["azimuth"], told["elevation"], distance=told.get("distance", 1.8), scale=told.get("scale", 1.1)
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RequestError(f"{path}: no cameras to read (azimuth and elevation in degrees): {error!r}") from error
    if len(found) != len(otherwise):
        raise RequestError(f"{path}: {len(found)} cameras; the data say views {len(otherwise)}")
    return found


def _picture(path: Path, size: int) -> Tensor:
    """(4, size, size) in 0 to 1: colour and alpha."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path}: not a readable image ({error})") from error
    if picture.width != picture.height:
        raise RequestError(f"{path}: {picture.width} x {picture.height} pixels: views are square")
    if picture.width != size:
        picture = picture.resize((size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _depth(path: Path, size: int) -> Tensor:
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(f"{path}: not a readable array ({error})") from error
    if depth.shape != (size, size):
        raise RequestError(f"{path}: shape {depth.shape}; views of {size} pixels want ({size}, {size})")
    return torch.from_numpy(depth.astype(np.float32)).nan_to_num(0.0, 0.0, 0.0)
