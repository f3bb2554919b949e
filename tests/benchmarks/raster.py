"""Mapping a large raster: the whole path of ``omniadapt predict`` over the model's calls alone on as many windows.

``python -m tests.benchmarks.raster [--side N]``. A run of the quickstart on generated scenes predicts a generated
raster of its bands. Both are timed in turns in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Row, run, seconds, spread

ASKED = 1.10


def raster(path: Path, side: int, names: tuple[str, ...], block: int = 512) -> None:
    """A georeferenced raster of smooth hills, uint16, written by blocks."""
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    profile = {"driver": "GTiff", "height": side, "width": side, "count": len(names), "dtype": "uint16", "tiled": True}
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)}
    random = np.random.default_rng(0)
    with rasterio.open(path, "w", **profile, **place) as file:
        file.descriptions = names
        for top in range(0, side, block):
            for left in range(0, side, block):
                height, width = min(block, side - top), min(block, side - left)
                rows, columns = np.mgrid[top : top + height, left : left + width] / 97.0
                hills = np.stack([np.sin(rows + i) * np.cos(columns - i) for i in range(len(names))])
                noise = random.normal(scale=0.1, size=hills.shape)
                window: Any = Window.from_slices((top, top + height), (left, left + width))
                file.write((3000 + 1000 * (hills + noise)).astype("uint16"), window=window)


def measure(side: int = 4000, repeats: int = 3, kind: str = "classes") -> list[Row]:
    import torch

    from shared import recipe
    from shared.run import load
    from shared.run import run as train

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        train(recipe.load("quickstart", tiny=True), place / "run")
        trained = load(place / "run")
        source = place / "source.tif"
        raster(source, side, tuple(trained.described["file_bands"]))
        shapes: list[tuple[int, ...]] = []
        plain = trained.task.scores

        def noted(image: Any) -> Any:
            shapes.append(tuple(image.shape))
            return plain(image)

        def whole() -> None:
            trained.task.predict_files(
                [source], place / "map.tif", described=trained.described, identity=trained.identity, kind=kind,
                overwrite=True,
            )  # fmt: skip

        trained.task.scores = noted
        whole()  # warm, and what the model is asked for
        asked, trained.task.scores = list(shapes), plain
        batches = {shape: torch.randn(shape) for shape in set(asked)}

        def alone() -> None:
            for shape in asked:
                plain(batches[shape])

        taken = []
        for turn in range(repeats):
            pair = [seconds(each) for each in ((alone, whole) if turn % 2 == 0 else (whole, alone))]
            taken.append(pair[1] / pair[0] if turn % 2 == 0 else pair[0] / pair[1])
    note = f"{side} x {side} pixels, {len(asked)} calls"
    return [Row(f"predict, {kind}", "time / model alone", *spread(taken), target=ASKED, note=note)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mapping a raster over the model's calls alone")
    parser.add_argument("--side", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    run(__name__, lambda: measure(given.side, given.repeats))
