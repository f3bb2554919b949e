"""Atmosphere: clouds, thin clouds, the shadows they cast, haze and the sun, laid over a generated landscape."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from modalities.remote_sensing.data.landscape import PIXEL, Landscape
from modalities.remote_sensing.data.noise import above, fractal, smoothstep

CLEAR, SHADOW, THIN, CLOUD = range(4)
MARGIN = 96  # pixels of cloud field around the scene, so that clouds outside it cast shadows into it

# Blue, green, red, NIR, SWIR 1, SWIR 2: Rayleigh path reflectance at nadir, share of sunlight that comes from the sky,
# and how much of what a cloud of drops or of ice would scatter it does not absorb.
RAYLEIGH = np.array([0.068, 0.038, 0.020, 0.007, 0.001, 0.0005], np.float32)
SKY = np.array([0.30, 0.22, 0.16, 0.10, 0.05, 0.04], np.float32)
DROPS = np.array([1.0, 1.0, 1.0, 0.98, 0.84, 0.66], np.float32)
ICE = np.array([1.0, 1.0, 1.0, 0.97, 0.58, 0.42], np.float32)


class Sun(NamedTuple):
    """zenith, azimuth: radians, azimuth clockwise from north."""

    zenith: float
    azimuth: float

    @property
    def towards(self) -> tuple[float, float]:
        """The way to the sun as (rows, columns), length 1."""
        return -float(np.cos(self.azimuth)), float(np.sin(self.azimuth))


class Clouds(NamedTuple):
    """low, high: optical depth of the two layers on the scene with its margin.  base, top: heights in metres above the
    scene's lowest ground, of the low layer's foot and of the high layer."""

    low: np.ndarray
    high: np.ndarray
    base: float
    top: float


class Sky(NamedTuple):
    """optical (6, H, W) and cirrus (H, W): reflectance.  thermal: kelvin (H, W).  mask: uint8 classes (H, W)."""

    optical: np.ndarray
    cirrus: np.ndarray
    thermal: np.ndarray
    mask: np.ndarray


def draw_sun(random: np.random.Generator) -> Sun:
    """A mid-morning sun on either hemisphere."""
    azimuth = random.uniform(105, 165) if random.random() < 0.7 else random.uniform(30, 75)
    return Sun(float(np.radians(random.uniform(22, 62))), float(np.radians(azimuth)))


def draw_clouds(random: np.random.Generator, size: int, sun: Sun) -> Clouds:
    """Cumulus, broken, closed or veiling low clouds, and streaks of cirrus, or none of them."""
    extent = size + 2 * MARGIN
    reach = MARGIN * PIXEL / np.tan(sun.zenith) * 0.8  # the highest base whose shadow still comes from the margin
    base, top = float(min(random.uniform(500, 2200), reach)), float(random.uniform(6500, 11500))
    low = np.zeros((extent, extent), np.float32)
    for kind in _LAYERS[random.choice(len(_LAYERS), p=_CHANCES)]:
        low += kind(random, extent)
    high = _cirrus(random, extent) if random.random() < 0.45 else np.zeros_like(low)
    return Clouds(low, high, base, top)


def _cumulus(random: np.random.Generator, extent: int) -> np.ndarray:
    field = fractal(random, extent, random.uniform(3.0, 3.6), largest=random.uniform(25, 80))
    drift = fractal(random, extent, 3.6)
    return random.uniform(8, 22) * np.maximum(above(field + 0.7 * drift, random.uniform(0.03, 0.22)), 0)


def _broken(random: np.random.Generator, extent: int) -> np.ndarray:
    field = fractal(random, extent, random.uniform(2.8, 3.4), largest=random.uniform(90, 260))
    return random.uniform(6, 20) * np.maximum(above(field, random.uniform(0.15, 0.5)), 0) ** 1.3


def _deck(random: np.random.Generator, extent: int) -> np.ndarray:
    angle = random.uniform(0, np.pi)
    cells = fractal(random, extent, 2.9, largest=random.uniform(20, 60), stretch=random.uniform(1, 1.6), angle=angle)
    mass = fractal(random, extent, 3.6)
    return random.uniform(4, 14) * np.maximum(above(mass + 0.3 * cells, random.uniform(0.4, 0.9)), 0)


def _veil(random: np.random.Generator, extent: int) -> np.ndarray:
    field = fractal(random, extent, 3.3) + 0.25 * fractal(random, extent, 2.4, largest=random.uniform(8, 30))
    return random.uniform(0.7, 2.0) * np.maximum(above(field, random.uniform(0.2, 0.6)), 0)


def _cirrus(random: np.random.Generator, extent: int) -> np.ndarray:
    angle = random.uniform(0, np.pi)
    streaks = fractal(random, extent, 3.0, stretch=random.uniform(1.5, 3.5), angle=angle)
    veil = fractal(random, extent, 3.8)
    return random.uniform(0.8, 2.6) * np.maximum(above(veil + 0.5 * streaks, random.uniform(0.2, 0.75)), 0)


_LAYERS = ((), (_cumulus,), (_cumulus, _veil), (_broken,), (_deck,), (_veil,))
_CHANCES = (0.12, 0.25, 0.18, 0.22, 0.13, 0.10)


def look(random: np.random.Generator, ground: Landscape, sun: Sun, clouds: Clouds) -> Sky:
    """The landscape under this sun and these clouds, at the top of the atmosphere, and the class of each pixel.

    Cloud and ground are added as two reflecting layers (Liou, 2002): r + (1 - r)^2 g / (1 - r g), with the cloud's
    r = tau / (tau + 7.7), the two-stream value for an asymmetry of 0.85. Classes: cloud where r >= 0.35, thin cloud
    where r >= 0.08, cloud shadow elsewhere if it takes 40 % or more of the direct light.
    """
    size = len(ground.elevation)
    inner = slice(MARGIN, MARGIN + size)
    low, high = clouds.low[inner, inner], clouds.high[inner, inner]
    light, shade = _light(ground, sun, clouds)
    surface = ground.reflectance * light
    slant = np.float32(np.cos(sun.zenith) ** -0.5)
    air, haze = RAYLEIGH[:, None, None] * slant, _haze(random, size) * slant
    lit = _cloud_light(clouds.low, sun)[inner, inner]
    # A quarter of the air and all of the haze lie below the low clouds, the rest of the air above them.
    seen = _over(low, DROPS, lit, surface + (1 - surface) * (0.25 * air + haze))
    seen = _over(high, ICE, np.float32(1), seen + (1 - seen) * 0.75 * air)
    r_low, r_high = _reflectance(low), _reflectance(high)
    total = 1 - (1 - r_low) * (1 - r_high)
    mask = np.where(shade >= 0.4, SHADOW, CLEAR)
    mask = np.where(total >= 0.08, THIN, mask)
    mask = np.where(total >= 0.35, CLOUD, mask)
    over = clouds._replace(low=low, high=high)
    thermal = _thermal(random, ground, sun, over, light[2])
    return Sky(seen, _cirrus_band(random, ground, over), thermal, mask.astype(np.uint8))


def _reflectance(depth: np.ndarray) -> np.ndarray:
    return depth / (depth + np.float32(7.7))


def _over(depth: np.ndarray, colour: np.ndarray, lit: np.ndarray | np.float32, below: np.ndarray) -> np.ndarray:
    """A cloud layer over what lies below it (6, H, W)."""
    r = _reflectance(depth)
    cloud = r * lit * colour[:, None, None]
    return cloud + (1 - r) ** 2 * below / (1 - r * np.minimum(below, 0.9))


def _light(ground: Landscape, sun: Sun, clouds: Clouds) -> tuple[np.ndarray, np.ndarray]:
    """Light on the ground against that on an open plain (6, H, W), and the share of direct light that clouds take."""
    down, right = np.gradient(ground.elevation, PIXEL)
    rise = down * sun.towards[0] + right * sun.towards[1]
    facing = np.clip((1 - np.tan(sun.zenith) * rise) / np.sqrt(1 + down**2 + right**2), 0.05, 1.8)
    shade = _shade(ground.elevation, sun, clouds)
    sky = SKY[:, None, None]
    return ((1 - sky) * facing * (1 - shade) + sky * (1 - 0.4 * shade)).astype(np.float32), shade


def _shade(elevation: np.ndarray, sun: Sun, clouds: Clouds) -> np.ndarray:
    """Share of direct light (H, W) that low clouds take: each pixel looks towards the sun up to the clouds' height."""
    from scipy.ndimage import map_coordinates

    rows, columns = np.mgrid[: len(elevation), : len(elevation)].astype(np.float32)
    depth = np.zeros_like(elevation)
    for height in (clouds.base, clouds.base * 1.15 + 80):  # foot and body of the clouds
        reach = np.maximum(height - elevation, 0) * np.float32(np.tan(sun.zenith) / PIXEL)
        there = [MARGIN + rows + reach * sun.towards[0], MARGIN + columns + reach * sun.towards[1]]
        depth = np.maximum(depth, map_coordinates(clouds.low, there, order=1, mode="nearest", prefilter=False))
    return (1 - np.exp(-0.35 * depth)) * np.float32(0.92)


def _cloud_light(depth: np.ndarray, sun: Sun) -> np.ndarray:
    """Brightness of cloud tops: their own relief lit from the side."""
    from scipy.ndimage import gaussian_filter

    top = gaussian_filter(np.sqrt(depth), 1.2)
    down, right = np.gradient(top)
    rise = np.asarray(down * sun.towards[0] + right * sun.towards[1])
    return np.clip(1 - np.float32(0.9 * np.tan(sun.zenith)) * rise, 0.6, 1.12)


def _haze(random: np.random.Generator, size: int) -> np.ndarray:
    """Path reflectance of aerosol (6, H, W): more in blue, thicker in places."""
    wavelength = np.array([0.48, 0.56, 0.655, 0.865, 1.61, 2.2])
    amount = random.gamma(1.5, 0.012)
    colour = amount * (wavelength / 0.48) ** -random.uniform(0.8, 1.8)
    return colour.astype(np.float32)[:, None, None] * (1 + 0.3 * np.tanh(fractal(random, size, 4)))


def _cirrus_band(random: np.random.Generator, ground: Landscape, clouds: Clouds) -> np.ndarray:
    """Reflectance at 1.38 um (H, W): water vapour hides the ground, but for high peaks, and most of the low clouds."""
    vapour = random.uniform(0.004, 0.03) + min(clouds.base / 4000, 1) * 0.03
    peaks = smoothstep(ground.elevation, 1200, 3500) * 0.02 * ground.reflectance[4]
    return 0.0012 + 0.9 * _reflectance(clouds.high) + vapour * _reflectance(clouds.low) + peaks


def _thermal(random: np.random.Generator, ground: Landscape, sun: Sun, clouds: Clouds, light: np.ndarray) -> np.ndarray:
    """Brightness temperature at 10.9 um in kelvin (H, W): ground that ``light`` warms, under ever colder clouds."""
    lapse = 0.0065  # kelvin for each metre
    air = random.normal(294, 7) - 18 * (sun.zenith - 0.6)
    kelvin = air - lapse * ground.elevation + ground.warmth * light * np.cos(sun.zenith) * 1.3
    kelvin = np.minimum(kelvin, np.where(ground.reflectance[0] > 0.5, 273.5, 400))  # snow melts
    for depth, height in ((clouds.low, clouds.base + 60 * np.sqrt(clouds.low)), (clouds.high, clouds.top)):
        opaque = 1 - np.exp(-0.5 * depth)
        kelvin = (1 - opaque) * kelvin + opaque * (air - lapse * height)
    return kelvin.astype(np.float32)
