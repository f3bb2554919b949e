"""Ways to spoil a good world, and what a case of bad input is made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.rasters import write_raster
from tests.reliability.world import HERE, World, as_picture, image, locked

RUN, PREDICT = "run {recipe} --output {out}", "predict {run} {scene} -o {out}.tif"
IN_RUN = "inspect {run}/adapter.safetensors"
Spoil = Callable[[World], Any]


class Case(NamedTuple):
    """message: a regular expression of the line.  spoil: what is done to the world before."""

    command: str
    message: str
    spoil: Spoil = lambda w: None
    status: int = 2


def write(path: str, pixels: Callable[[], np.ndarray], **options: Any) -> Spoil:
    return lambda w: write_raster(w.root / path, pixels(), **{"georeference": HERE, **options})


def full(value: float, dtype: str = "float32", shape: tuple[int, ...] = (3, 40, 44)) -> Callable[[], np.ndarray]:
    return lambda: np.full(shape, value, dtype)


def one_label(value: float, dtype: str) -> Callable[[], np.ndarray]:
    def made() -> np.ndarray:
        mask = np.zeros((1, 32, 32), dtype)
        mask[0, 5, 7] = value
        return mask

    return made


def picture(path: str, suffix: str, after: Callable[[Path], Any]) -> Spoil:
    """The raster becomes a PNG or JPEG, and ``after`` happens to that."""

    def spoil(w: World) -> None:
        new = as_picture(w.root / path, suffix)
        if path == "scene.tif":
            w.scene = new
        after(new)

    return spoil


def each(folder: str, change: Callable[[Path], Any]) -> Spoil:
    return lambda w: [change(path) for path in sorted((w.root / folder).iterdir())]


def at(path: str, change: Callable[[Path], Any]) -> Spoil:
    return lambda w: change(w.root / path)


def both(*spoils: Spoil) -> Spoil:
    return lambda w: [spoil(w) for spoil in spoils]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def deep(w: World) -> None:
    """A subfolder of images and one of masks, which no one may read."""
    for folder in (w.images, w.masks):
        (folder / "deep").mkdir()
        (folder / "a.tif").rename(folder / "deep" / "a.tif")
        locked(folder / "deep")


def palette(path: Path) -> None:
    from PIL import Image

    Image.open(path).convert("P").save(path)


def checkpoint(data: bytes) -> Spoil:
    """A finished run loses its adapter, and its last checkpoint holds ``data``."""

    def spoil(w: World) -> None:
        (w.run / "adapter.safetensors").unlink()
        (w.run / "checkpoints" / "last.ckpt").write_bytes(data)

    return spoil


def header(text: bytes) -> Callable[[Path], Any]:
    """A safetensors file without tensors, with this JSON."""
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text)


def arrays(w: World, *shape: int) -> None:
    w.scene = w.root / "scene.npy"
    np.save(w.scene, np.ones(shape))


def unvarying(path: Path) -> None:
    """The first band of an image holds one number."""
    write_raster(path, np.concatenate([full(5, "uint8", (1, 32, 32))(), image(32, 32, path.stem)[1:]]))


def other_backbone(path: Path) -> None:
    """The recipe of a run asks for other random weights than it was trained with."""
    path.write_text(path.read_text().replace("weights: random", "weights: random\n  seed: 7"))


def unspeakable(w: World) -> None:
    """A scene whose name holds a byte that is no UTF-8."""
    w.scene = w.scene.rename(w.root / "bad\udcff.tif")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def closed(path: Path) -> None:
    """A folder in which nothing may be made."""
    path.mkdir(0o555)
