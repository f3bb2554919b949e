"""Files of a data set: rasters by name, the bands that are wanted of them, and a mask where its image is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.errors import RequestError
from shared.rasters import Header, rasters_below


def files_by_name(folder: Path) -> dict[str, Path]:
    """The rasters below a folder, by their path there without suffix. Raises RequestError where two share one."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in rasters_below(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise RequestError(f"{found[name]} and {path.name} share one name; keep one of them")
        found[name] = path
    return found


def chosen_bands(
    header: Header, bands: Sequence[int | str] | None, band_names: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Numbers (from 1) and names of the bands wanted."""
    # Four bands of which the last is marked alpha are often red, green, blue and near infrared: names tell.
    everything = band_names is not None and len(band_names) == header.bands
    numbers = list(range(1, header.bands + 1)) if everything else header.data_bands
    names = tuple(band_names) if band_names is not None else tuple(header.band_names[n - 1] for n in numbers)
    return choose(str(header.path), numbers, names, bands)


def choose(
    place: str, numbers: list[int], names: tuple[str, ...], bands: Sequence[int | str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Numbers and names of the bands wanted, out of those there are; ``place`` names them in an error."""
    if len(names) != len(numbers) or len(set(names)) < len(names):
        raise RequestError(
            f"{place}: {len(numbers)} bands, but band_names gives {len(set(names))} different names {names}"
        )
    folded = [name.casefold() for name in names]
    chosen = []
    for band in bands or names:
        if isinstance(band, str) and band.casefold() in folded:
            chosen.append(folded.index(band.casefold()))
        elif isinstance(band, int) and band in numbers:
            chosen.append(numbers.index(band))
        else:
            listed = ", ".join(f"{number} {name}" for number, name in zip(numbers, names, strict=True))
            raise RequestError(f"{place}: no band {band!r}; it has {listed}")
    if len(set(chosen)) < len(chosen):
        raise RequestError(f"bands {list(bands or names)}: each band once")
    return [numbers[c] for c in chosen], tuple(names[c] for c in chosen)


def check_place(image: Header, mask: Header) -> None:
    """Raises RequestError where a mask has not the size of its image, or lies elsewhere on Earth."""
    if (mask.height, mask.width) != (image.height, image.width):
        sizes = f"{mask.height} x {mask.width} pixels, its image {image.height} x {image.width}"
        raise RequestError(f"{mask.path}: {sizes}; a mask has its image's size")
    one, other = image.georeference, mask.georeference
    if one is None or other is None:
        return
    corners = [
        np.array([place.at(*corner) for corner in ((0, 0), (image.width, image.height))]) for place in (one, other)
    ]
    pixel = abs(one.transform.a) + abs(one.transform.b)
    if one.crs != other.crs or np.abs(corners[0] - corners[1]).max() > pixel / 2:
        raise RequestError(f"{mask.path}: lies elsewhere than its image {image.path}; reproject it to the image's grid")
