"""Band combinations: which three bands of an image are shown as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from shared.normalisation import Normalisation

MOST = 3  # pictures of one image
# Names in use for a band: ours, and the common names of STAC (the electro-optical extension), best first.
_NAMES = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "nir": ("nir", "nir08", "nir09"),
    "swir": ("swir2", "swir22", "swir", "swir1", "swir16"),
}
_KNOWN = {
    "true colour": ("red", "green", "blue"),
    "NIR, red, green": ("nir", "red", "green"),
    "SWIR, NIR, red": ("swir", "nir", "red"),
}


def composites(band_names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Indices of the bands shown as red, green and blue, by the name of the combination.

    Known combinations come from the names of the bands. Where there is none, the bands are shown in threes as they
    follow one another, the last three overlapping the ones before; one or two bands each as grey.
    """
    names = [name.casefold() for name in band_names]
    at = {band: names.index(n) for band, known in _NAMES.items() for n in reversed(known) if n in names}
    found = {t: (at[r], at[g], at[b]) for t, (r, g, b) in _KNOWN.items() if {r, g, b} <= at.keys()}
    if found:
        return found
    count = len(names)
    if count < 3:
        return {band_names[i]: (i, i, i) for i in range(count)}
    starts = sorted({min(start, count - 3) for start in range(0, count, 3)})[:MOST]
    return {", ".join(band_names[i : i + 3]): (i, i + 1, i + 2) for i in starts}


def pictures(values: np.ndarray, valid: np.ndarray, band_names: Sequence[str]) -> dict[str, np.ndarray]:
    """values (bands, H, W) as pictures uint8 (H, W, 3), one for each of ``composites``; the bands of one are stretched
    together from the 1st to the 99th percentile of the valid (H, W) pixels, so that their balance stays; others black.
    """
    found = {}
    for name, bands in composites(band_names).items():
        picture = values[list(bands)].transpose(1, 2, 0)
        low, high = np.percentile(picture[valid], (1, 99)) if valid.any() else (0, 1)
        scaled = np.clip((picture - low) / max(high - low, 1e-6), 0, 1) * valid[..., None]
        found[name] = (scaled * 255).round().astype(np.uint8)
    return found


def shown(image: Tensor | np.ndarray, normalisation: Normalisation, band_names: Sequence[str]) -> dict[str, np.ndarray]:
    """``pictures`` of a normalised image (bands, H, W), whose invalid pixels are 0 in all bands."""
    normalised = np.asarray(image, np.float32)
    return pictures(normalisation.undo(normalised), (normalised != 0).any(axis=0), band_names)
