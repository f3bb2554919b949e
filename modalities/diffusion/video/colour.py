"""Frames take on the colours of the first one: their histograms in CIE LAB are matched, their lightness is kept."""

from __future__ import annotations

import numpy as np

# IEC 61966-2-1 (sRGB) primaries to CIE XYZ, and its white, D65; the constants of CIE LAB.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _XYZ.sum(1)
_KNEE, _SLOPE = (6 / 29) ** 3, (29 / 6) ** 2 / 3


def match_colours(frames: np.ndarray) -> np.ndarray:
    """uint8 (F, H, W, 3): every later frame gets the first one's distribution of colours, and keeps its lightness."""
    lab = matched(to_lab(frames))
    return np.concatenate([frames[:1], to_rgb(lab[1:])])


def matched(lab: np.ndarray) -> np.ndarray:
    """LAB frames (F, H, W, 3): a and b of the later ones are mapped so that their distributions are the first one's."""
    result = lab.copy()
    for frame in result[1:]:
        for channel in (1, 2):
            frame[..., channel] = _like(frame[..., channel], lab[0, ..., channel])
    return result


def _like(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values, each replaced by the wanted one at the same place of the cumulative distribution."""
    own, inverse, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    theirs, their_counts = np.unique(wanted.ravel(), return_counts=True)
    places = np.interp(np.cumsum(counts) / values.size, np.cumsum(their_counts) / wanted.size, theirs)
    return places[inverse].reshape(values.shape) if len(own) else values


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """uint8 sRGB (..., 3) to CIE LAB, float64: lightness 0 to 100, and a and b."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    ratio = linear @ _XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(ratio > _KNEE, np.cbrt(ratio), _SLOPE * ratio + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE LAB (..., 3) to uint8 sRGB; colours it cannot show go to the nearest value of each channel."""
    y = (lab[..., 0] + 16) / 116
    ratio = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(ratio > 6 / 29, ratio**3, (ratio - 4 / 29) / _SLOPE) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_XYZ).T, 0, 1)
    value = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.round(value * 255).astype(np.uint8)
