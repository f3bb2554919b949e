"""Fractal fields: Gaussian noise whose power falls with frequency, the texture of terrain and of clouds."""

from __future__ import annotations

import numpy as np

from shared.errors import RequestError


def fractal(
    random: np.random.Generator,
    size: int,
    exponent: float,
    *,
    largest: float | None = None,
    stretch: float = 1.0,
    angle: float = 0.0,
) -> np.ndarray:
    """float32 (size, size), mean 0, deviation 1, periodic: noise with power proportional to frequency^-exponent.

    exponent: 2 rough, 3 clouds (Lovejoy, Science 1982), 4 smooth terrain (Mandelbrot, 1982).
    largest: wavelength in pixels above which the power grows no more (the whole field if not given).
    stretch, angle: elongation of the structures, and its direction in radians from the row axis.
    """
    try:
        from scipy import fft
    except ImportError as error:
        raise RequestError("generated scenes need scipy: pip install 'omniadapt[remote-sensing]'") from error

    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    along = rows * np.cos(angle) + columns * np.sin(angle)
    across = columns * np.cos(angle) - rows * np.sin(angle)
    frequency = np.hypot(along * stretch, across / stretch).astype(np.float32)
    floor = 1 / (largest or size)
    spectrum = fft.rfft2(random.standard_normal((size, size), dtype=np.float32))
    spectrum *= np.maximum(frequency, floor) ** (-exponent / 2)
    spectrum[0, 0] = 0
    field = np.asarray(fft.irfft2(spectrum, s=(size, size)), np.float32)
    return field / field.std()


def above(field: np.ndarray, share: float) -> np.ndarray:
    """``field`` less the level that ``share`` of it exceeds: positive on just that share."""
    return field - np.quantile(field, 1 - share).astype(field.dtype)


def smoothstep(field: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below ``low``, 1 above ``high``, and smooth between."""
    t = np.clip((field - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
