"""A large raster in little memory: ``python -m tests.reliability.large_raster [SIDE] [OUTPUT]`` (20000 and classes if
not said; about half a minute and, for probabilities, 10 GB of disk).

Makes a raster of SIDE x SIDE pixels with three bands, maps it with a model that costs nothing, and prints time and the
process's peak memory by stage. Exit status 0 where that peak, libraries included, is below 1.5 GB and a sample of the
map is right.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from shared.mapping import Feed, map_raster
from shared.normalisation import Normalisation
from shared.rasters import quiet

LIMIT = 1.5e9  # bytes
FIELD = 32  # pixels along a side of the squares of one colour


def colours(side: int, row: int) -> np.ndarray:
    """Rows ``row`` to ``row + 256`` of the raster: uint8 (3, 256, side) squares at random."""
    random = np.random.default_rng(row)
    small = random.integers(1, 255, (3, 256 // FIELD, -(-side // FIELD)), dtype=np.uint8)
    return small.repeat(FIELD, 1).repeat(FIELD, 2)[:, :, :side]


def make(path: Path, side: int) -> None:
    with quiet() as rasterio:
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5000000)}
        shape = {"height": side, "width": side, "count": 3, "dtype": "uint8"}
        tiling = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "zlevel": 1}
        with rasterio.open(path, "w", driver="GTiff", **shape, **place, **tiling) as dataset:
            for row in range(0, side, 256):
                block = colours(side, row)[:, : side - row]
                dataset.write(block, window=rasterio.windows.Window(0, row, side, block.shape[1]))


def peak() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(side: int = 20000, output: str = "classes") -> int:
    bands = ("red", "green", "blue")
    feed = Feed(bands, (1, 2, 3), bands, None, None, Normalisation((128.0,) * 3, (64.0,) * 3), 256)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.tif", Path(folder) / f"out.{'geojson' if output == 'polygons' else 'tif'}"
        make(source, side)
        start, stages = time.perf_counter(), []

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages.append(stage)
                print(f"{stage:<12}{time.perf_counter() - start:>6.0f} s{peak() / 1e9:>7.2f} GB", flush=True)

        found = map_raster(lambda image: image.softmax(1), source, target, feed, output=output, tick=tick)
        print(f"{'done':<12}{time.perf_counter() - start:>6.0f} s{peak() / 1e9:>7.2f} GB", flush=True)
        right = sum(found.pixels.values()) == side * side if found.pixels else False
        if output == "classes":
            with quiet() as rasterio, rasterio.open(target) as dataset:
                row = side // 2 // 256 * 256
                height = min(256, side - row)
                read = dataset.read(1, window=rasterio.windows.Window(0, row, side, height))
            right &= np.array_equal(read, colours(side, row).argmax(0)[:height])
    print("right" if right else "WRONG", f"peak {peak() / 1e9:.2f} GB, limit {LIMIT / 1e9} GB")
    return 0 if right and peak() < LIMIT else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:3]))
