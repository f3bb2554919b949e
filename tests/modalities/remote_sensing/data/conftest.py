"""Small rasters in every format, and the real sets beside the project where they are present."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
PROJECT = Path(__file__).resolve().parents[4]


@pytest.fixture
def real():
    """The folder of a real data set; skips the test where it is absent."""

    def folder(name: str) -> Path:
        path = PROJECT.parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"{path} is absent")
        return path

    return folder


@pytest.fixture
def save():
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
