"""A small world for the tests of bad input: labelled rasters, a recipe that trains on them, a run that it gave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio import Affine
from rasterio.crs import CRS

from shared import cli
from shared.rasters import Georeference, quiet, write_raster

HERE = Georeference(CRS.from_epsg(4326), Affine(0.001, 0, 10, 0, -0.001, 50))
COLOURS = np.array([[40, 60, 80], [120, 60, 160], [220, 200, 90]])  # of the classes
RECIPE = """
task: {{type: Segmentation}}
data:
  type: FolderScenes
  images: {images}
  masks: {masks}
  classes: [clear, shadow, cloud]
  batch_size: 2
backbone:
  type: TimmViT
  name: vit_tiny_patch16_224
  weights: random
  image_size: 32
  depths: [0]
  model_args: {{depth: 1, embed_dim: 12, num_heads: 2}}
method: {{type: LoRA, rank: 2}}
head: {{type: LightDecoder, width: 8}}
optimiser: {{learning_rate: 0.02}}
trainer: {{epochs: 20, check_every: 20, device: cpu}}
"""


class World:
    """Six scenes a.tif to f.tif of 32 pixels and three bands in ``images``, and their ``masks``; ``scene``, a raster of
    40 x 44 pixels to predict for; ``recipe``, and ``run``, the directory of a run of it; nothing at ``out``."""

    def __init__(self, root: Path, run: Path | None = None):
        self.root, self.images, self.masks = root, root / "images", root / "masks"
        self.recipe, self.run, self.scene, self.out = (root / n for n in ("recipe.yaml", "run", "scene.tif", "out"))
        for folder in (self.images, self.masks):
            folder.mkdir()
        for name in "abcdef":
            write_raster(self.images / f"{name}.tif", image(32, 32, name), georeference=HERE)
            write_raster(self.masks / f"{name}.tif", labels(32, 32, name), georeference=HERE)
        write_raster(self.scene, image(40, 44, "scene"), georeference=HERE)
        self.describe()
        if run is not None:
            shutil.copytree(run, self.run)

    def describe(self) -> None:
        """Write the recipe, for images and masks where they are now."""
        self.recipe.write_text(RECIPE.format(images=self.images, masks=self.masks), encoding="utf-8")

    def words(self, command: str) -> list[str]:
        """The command line, with ``{scene}`` and the like in the place of paths."""
        return [word.format_map(vars(self)) for word in shlex.split(command)]

    def main(self, command: str) -> int:
        return cli.main(self.words(command))

    def content(self) -> dict[str, Any]:
        """All that lies in the world: files with what they hold (None where it cannot be read), folders, links."""
        found: dict[str, Any] = {}
        for path in sorted(self.root.rglob("*")):
            held: Any = "folder"
            if path.is_symlink():
                held = os.readlink(path)
            elif path.is_file():
                held = path.read_bytes() if os.access(path, os.R_OK) else None
            found[str(path.relative_to(self.root))] = held
        return found


def labels(height: int, width: int, name: str) -> np.ndarray:
    """uint8 (1, height, width): fields of 8 x 8 pixels, each of a class from 0 to 2; its own for every name."""
    random = np.random.default_rng([*name.encode()])
    fields = random.integers(0, 3, (1, -(-height // 8), -(-width // 8)), dtype=np.uint8)
    return fields.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def image(height: int, width: int, name: str) -> np.ndarray:
    """uint8 (3, height, width) in the colours of its labels, with noise."""
    noise = np.random.default_rng([7, *name.encode()]).integers(-30, 30, (3, height, width))
    return (COLOURS.T[:, labels(height, width, name)[0]] + noise).astype(np.uint8)


def opened(path: Path) -> tuple[np.ndarray, Any, Any]:
    """The pixels (bands, H, W) of a raster, its reference system and its transform."""
    with quiet() as rasterio, rasterio.open(path) as dataset:
        return dataset.read(), dataset.crs, dataset.transform


def truncated(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])


def as_picture(path: Path, suffix: str) -> Path:
    """The raster as a PNG or JPEG in its place."""
    from PIL import Image

    pixels = opened(path)[0]
    new = path.with_suffix(suffix)
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(new)
    path.unlink()
    return new


def loop(path: Path) -> None:
    """A link to itself in the place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def locked(path: Path) -> None:
    """No one may read it."""
    path.chmod(0)


@contextlib.contextmanager
def without_privilege() -> Iterator[None]:
    """Permissions count within it, for root too, whose thread lays down the two capabilities that pass over them."""
    if os.geteuid() != 0:
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    head, state = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3: (effective, ...) twice
    if not hasattr(library, "capset") or library.capget(head, state):
        pytest.skip("permissions do not count for root here, and its capabilities cannot be laid down")
    before = state[0]
    state[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert library.capset(head, state) == 0
    try:
        yield
    finally:
        state[0] = before
        assert library.capset(head, state) == 0


@contextlib.contextmanager
def small_disk(folder: Path, room: int) -> Iterator[None]:
    """``folder`` becomes a file system of ``room`` bytes. Skips where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files(room: int) -> Iterator[None]:
    """The system refuses to write files larger than ``room`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupting(function: Callable, name: str) -> Callable:
    """``function`` (such as ``os.replace``), in which Ctrl-C arrives where its last argument is a file of this name."""

    def interrupted(*arguments: Any) -> Any:
        if Path(arguments[-1]).name == name:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted
