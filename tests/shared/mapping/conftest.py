"""A small network with a short reach, and rasters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rasterio import Affine
from rasterio.crs import CRS
from torch import Tensor, nn

from shared.mapping import Feed
from shared.normalisation import Normalisation
from shared.rasters import Georeference, quiet, write_raster

CLASSES = ("clear", "shadow", "cloud")
HERE = Georeference(CRS.from_epsg(32633), Affine(30, 0, 500000, 0, -30, 5000000))
REACH = 4  # pixels that the network sees around one


@pytest.fixture
def feed() -> Feed:
    """Of three bands without names, windows of 32 pixels."""
    scale = Normalisation((100.0, 90.0, 80.0), (50.0, 40.0, 30.0))
    return Feed(CLASSES, (1, 2, 3), ("band 1", "band 2", "band 3"), None, None, scale, 32)


@pytest.fixture
def scores() -> Callable[[Tensor], Tensor]:
    """Two convolutions of 5 x 5 with zero padding, as probabilities."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, 3, 5, padding=2)).eval()

    @torch.no_grad()
    def scores(image: Tensor) -> Tensor:
        return (3 * network(image)).softmax(1)

    return scores


@pytest.fixture
def made(tmp_path) -> Callable[..., Path]:
    """made(height, width, name=..., place=..., hole=...): a float32 raster of three bands with a hole of NaN."""

    def made(
        height: int, width: int, *, name: str = "in.tif", place: Georeference | None = HERE, hole: bool = True,
        bands: int = 3, names: tuple[str, ...] | None = None,
    ) -> Path:  # fmt: skip
        random = np.random.default_rng(height * width)
        image = random.normal(90, 45, (bands, height, width)).astype(np.float32)
        if hole:
            image[0, : height // 4, : width // 3] = np.nan
            image[-1, height // 2, width // 2] = np.nan
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_raster(tmp_path / name, image, georeference=place, band_names=names)
        return tmp_path / name

    return made


def opened(path: Path) -> Any:
    """(pixels (bands, H, W), the closed dataset's profile, tags, colours of band 1, overview factors, descriptions)."""
    with quiet() as rasterio, rasterio.open(path) as dataset:
        colours = dataset.colormap(1) if dataset.colorinterp[0].name == "palette" else None
        return dataset.read(), dataset.profile, dataset.tags(), colours, dataset.overviews(1), dataset.descriptions
