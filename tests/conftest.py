"""One torch thread and one seed for every test; the materials beside the project; rasters in every format."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
MATERIALS = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def materials() -> Path:
    """The folder of golden cases and real data beside the project; tests that need it skip where it is absent."""
    if not (MATERIALS / "golden").is_dir():
        pytest.skip("the golden cases and real data are not beside the project")
    return MATERIALS


@pytest.fixture
def real():
    """The folder of a real data set; skips the test where it is absent."""

    def folder(name: str) -> Path:
        if not (MATERIALS / "data" / name).is_dir():
            pytest.skip(f"{MATERIALS / 'data' / name} is absent")
        return MATERIALS / "data" / name

    return folder


@pytest.fixture
def save() -> Callable[..., Path]:
    """save(path, array (bands, H, W), **profile): write a raster in the format of the path's suffix."""

    def save(path: Path, array: np.ndarray, **profile) -> Path:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning

        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, array)
            return path
        driver = {".tif": "GTiff", ".png": "PNG", ".jpg": "JPEG"}[path.suffix]
        colour = profile.pop("colorinterp", None)
        count, height, width = array.shape
        shape = {"driver": driver, "count": count, "height": height, "width": width, "dtype": array.dtype}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, "w", **shape, **profile) as dataset:
                dataset.write(array)
                if colour:
                    dataset.colorinterp = colour
        return path

    return save
