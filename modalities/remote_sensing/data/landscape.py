"""Landscapes: generated terrain and land cover as surface reflectance, elevation and warmth, in eight biomes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from modalities.remote_sensing.data.noise import above, fractal, smoothstep

PIXEL = 30.0  # metres, as Landsat's
OPTICAL = ("blue", "green", "red", "nir", "swir1", "swir2")


class Cover(NamedTuple):
    """A land cover: reflectance in the six optical bands (rounded from common spectral libraries), the deviation of
    its texture (in logarithm), and how much warmer than the air it is by day (kelvin)."""

    spectrum: tuple[float, float, float, float, float, float]
    texture: float
    warmth: float


COVERS = {
    "water": Cover((0.045, 0.040, 0.022, 0.012, 0.006, 0.004), 0.04, -4),
    "turbid water": Cover((0.075, 0.100, 0.085, 0.035, 0.012, 0.008), 0.06, -3),
    "forest": Cover((0.022, 0.042, 0.026, 0.280, 0.130, 0.055), 0.16, -1),
    "conifers": Cover((0.018, 0.030, 0.020, 0.190, 0.085, 0.038), 0.16, -1),
    "grass": Cover((0.045, 0.080, 0.070, 0.310, 0.240, 0.130), 0.10, 3),
    "shrub": Cover((0.065, 0.095, 0.115, 0.240, 0.280, 0.200), 0.16, 7),
    "crop": Cover((0.032, 0.070, 0.038, 0.440, 0.200, 0.090), 0.05, 0),
    "stubble": Cover((0.090, 0.130, 0.180, 0.280, 0.360, 0.270), 0.06, 8),
    "soil": Cover((0.085, 0.125, 0.175, 0.240, 0.320, 0.280), 0.07, 10),
    "sand": Cover((0.180, 0.270, 0.360, 0.430, 0.520, 0.480), 0.07, 13),
    "rock": Cover((0.115, 0.145, 0.175, 0.220, 0.270, 0.240), 0.18, 8),
    "salt": Cover((0.420, 0.480, 0.540, 0.560, 0.420, 0.320), 0.05, 5),
    "urban": Cover((0.120, 0.135, 0.145, 0.200, 0.210, 0.185), 0.30, 7),
    "roof": Cover((0.340, 0.370, 0.390, 0.410, 0.400, 0.370), 0.25, 9),
    "wetland": Cover((0.035, 0.055, 0.045, 0.190, 0.100, 0.045), 0.16, -2),
    "snow": Cover((0.860, 0.870, 0.850, 0.760, 0.110, 0.070), 0.04, -8),
}


class Biome(NamedTuple):
    """relief: range of height differences (metres).  covers: relative shares of the natural covers, from valley to
    ridge.  water, farms, towns, snow: largest share of a scene they take."""

    relief: tuple[float, float]
    covers: dict[str, float]
    water: float = 0.03
    farms: float = 0.0
    towns: float = 0.0
    snow: float = 0.0


BIOMES = {
    "Barren": Biome((100, 900), {"salt": 0.5, "sand": 2, "soil": 2, "rock": 2}, water=0.01),
    "Forest": Biome((100, 900), {"wetland": 0.3, "grass": 0.8, "forest": 4, "conifers": 2}, farms=0.2, towns=0.01),
    "GrassCrops": Biome((10, 120), {"forest": 0.8, "grass": 2, "stubble": 0.8}, farms=0.85, towns=0.06),
    "Shrubland": Biome((50, 600), {"grass": 0.6, "shrub": 3, "soil": 1.5, "rock": 0.6}, farms=0.15, towns=0.02),
    "SnowIce": Biome((500, 2200), {"conifers": 1.5, "grass": 0.8, "rock": 2}, water=0.02, snow=0.7),
    "Urban": Biome((10, 150), {"forest": 0.8, "grass": 1.5, "soil": 0.5}, water=0.06, farms=0.4, towns=0.6),
    "Water": Biome((30, 300), {"wetland": 0.5, "forest": 1.5, "grass": 1.5, "sand": 0.2}, water=0.65, farms=0.3),
    "Wetlands": Biome((5, 40), {"wetland": 3, "grass": 1, "forest": 1}, water=0.3, farms=0.1),
}  # fmt: skip


class Landscape(NamedTuple):
    """reflectance: float32 (6, H, W) of the lit surface.  elevation: metres (H, W).  warmth: kelvin above the air."""

    reflectance: np.ndarray
    elevation: np.ndarray
    warmth: np.ndarray


def landscape(random: np.random.Generator, size: int, biome: Biome) -> Landscape:
    """A scene's ground, ``size`` x ``size`` pixels, every share and spectrum drawn anew."""
    elevation = _terrain(random, size, random.uniform(*biome.relief))
    wetness = _wetness(elevation)
    weights = _natural(random, size, biome, wetness)
    if biome.farms and random.random() < 0.8:
        _farm(random, weights, biome.farms * random.uniform(0.3, 1), elevation)
    if biome.towns and random.random() < 0.7:
        _build(random, weights, biome.towns * random.uniform(0.2, 1))
    _flood(random, weights, biome.water * random.uniform(0, 1), elevation)
    if biome.snow:
        _snow(random, weights, biome.snow * random.uniform(0.2, 1), elevation)
    names = list(weights)
    shares = np.stack([weights[name] for name in names])
    shares /= shares.sum(0)
    reflectance = np.tensordot(_spectra(random, names).T, shares, 1)
    reflectance *= np.exp(_texture(random, size, names, shares))
    warmth = np.tensordot(np.array([COVERS[name].warmth for name in names], np.float32), shares, 1)
    return Landscape(reflectance.astype(np.float32), elevation, warmth)


def _terrain(random: np.random.Generator, size: int, relief: float) -> np.ndarray:
    """Heights in metres above 0: smooth hills and, the more of them the higher the relief, ridges."""
    hills, ridges = fractal(random, size, 3.9), 1 - np.abs(fractal(random, size, 3.4))
    share = np.clip(relief / 1200, 0, 0.7)
    height = (1 - share) * hills + share * ridges
    return (height - height.min()) / (height.max() - height.min()) * np.float32(relief)


def _wetness(elevation: np.ndarray) -> np.ndarray:
    """How much lower than its surroundings a pixel lies: deviation 1, valleys positive."""
    from scipy.ndimage import gaussian_filter

    fine = gaussian_filter(elevation, 1, mode="wrap")
    lower = [gaussian_filter(elevation, sigma, mode="wrap") - fine for sigma in (4, 16)]
    return (lower[0] / lower[0].std() + lower[1] / lower[1].std()) / np.float32(1.7)


def _natural(random: np.random.Generator, size: int, biome: Biome, wetness: np.ndarray) -> dict[str, np.ndarray]:
    """Shares of the natural covers (H, W), listed from valley to ridge: patches with soft borders."""
    last, sharpness = len(biome.covers) - 1, random.uniform(1.2, 2.6)
    logits = {
        name: np.log(share * random.lognormal(0, 0.5))
        + 1.5 * fractal(random, size, random.uniform(2.5, 3.2))
        + 1.1 * wetness * (1 - 2 * place / last)
        for place, (name, share) in enumerate(biome.covers.items())
    }
    top = np.max(list(logits.values()), axis=0)
    weights = {name: np.exp(sharpness * (logit - top)) for name, logit in logits.items()}
    total = np.sum(list(weights.values()), axis=0)
    return {name: weight / total for name, weight in weights.items()}


def _lay(weights: dict[str, np.ndarray], name: str, share: np.ndarray) -> None:
    """Cover ``share`` (0 to 1) of each pixel with ``name``."""
    for own in weights.values():
        own *= 1 - share
    weights[name] = weights.get(name, 0) + share


def _parcels(random: np.random.Generator, size: int, width: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """A turned pattern of strips cut into parcels: number of the parcel and distance to its border in pixels (H, W)."""
    angle, ratio = random.uniform(0, np.pi), random.uniform(1, 2.5)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    u = rows * np.cos(angle) + columns * np.sin(angle) + size
    v = columns * np.cos(angle) - rows * np.sin(angle) + size
    edges = np.cumsum(random.uniform(*width, int(3 * size / width[0]) + 2))
    strip = np.searchsorted(edges, u)
    v = v + random.uniform(0, size, len(edges) + 1)[strip]
    cuts = np.cumsum(random.uniform(*width, int(4 * size / width[0]) + 2)) * ratio
    cell = np.searchsorted(cuts, v)
    bounds = np.concatenate([[-1e6], edges, [1e6]]), np.concatenate([[-1e6], cuts, [1e6]])
    border = np.min(
        [u - bounds[0][strip], bounds[0][strip + 1] - u, v - bounds[1][cell], bounds[1][cell + 1] - v], axis=0
    )
    return strip * (len(cuts) + 1) + cell, border


def _farm(random: np.random.Generator, weights: dict[str, np.ndarray], share: float, elevation: np.ndarray) -> None:
    """Fields, each with one cover, on the flatter part of the scene; whole parcels, so that borders are straight."""
    size = len(elevation)
    parcel, border = _parcels(random, size, (5, random.uniform(8, 24)))
    steep = np.hypot(*np.gradient(elevation)) / PIXEL
    suited = above(fractal(random, size, 3) - 6 * steep, share)
    count = parcel.max() + 1
    mean = np.bincount(parcel.ravel(), suited.ravel(), count) / np.maximum(
        np.bincount(parcel.ravel(), minlength=count), 1
    )
    farmed = (mean > 0)[parcel] * np.where(border < 0.6, 0.35, 0.95)
    shares = random.dirichlet((1.5, 1, 1, 1))
    kind = random.choice(4, count, p=shares)[parcel]
    vigour = random.beta(2, 1.2, count)[parcel]
    for number, name in enumerate(("crop", "grass", "stubble", "soil")):
        _lay(weights, name, (farmed * (kind == number)).astype(np.float32))
    # A crop covers its ground in part: the rest of the parcel is soil.
    _lay(weights, "soil", (farmed * (kind < 2) * (1 - vigour) * 0.8).astype(np.float32))


def _build(random: np.random.Generator, weights: dict[str, np.ndarray], share: float) -> None:
    """Towns: blocks of mixed building and green, bright roofs, darker streets."""
    size = len(next(iter(weights.values())))
    town = smoothstep(above(fractal(random, size, 3.2, largest=size / 2), share), -0.1, 0.35)
    parcel, border = _parcels(random, size, (2.5, 7))
    density = random.beta(2, 1.2, parcel.max() + 1)[parcel]
    _lay(weights, "urban", (town * np.clip(density + (border < 0.7) * 0.4, 0, 1)).astype(np.float32))
    large, _ = _parcels(random, size, (3, 12))
    roofs = (random.random(large.max() + 1) < random.uniform(0.02, 0.15))[large]
    _lay(weights, "roof", (town * roofs * random.uniform(0.5, 1, large.max() + 1)[large]).astype(np.float32))


def _flood(random: np.random.Generator, weights: dict[str, np.ndarray], share: float, elevation: np.ndarray) -> None:
    """Lakes or a sea over the lowest ``share`` of the ground, and a river that meanders through most scenes."""
    size = len(elevation)
    height = elevation / elevation.std()
    water = smoothstep(above(-height, share), -0.004, 0.02)
    if random.random() < 0.6:
        course = fractal(random, size, 4.2) + 0.3 * height
        slope = np.hypot(*np.gradient(course)) + 1e-4
        water = np.maximum(water, 1 - smoothstep(np.abs(course) / slope, 0.3, random.uniform(0.8, 4)))
    turbid = smoothstep(fractal(random, size, 3.4), low := random.normal(0.8, 1), low + random.uniform(0.2, 1.5))
    _lay(weights, "water", (water * (1 - turbid)).astype(np.float32))
    _lay(weights, "turbid water", (water * turbid).astype(np.float32))


def _snow(random: np.random.Generator, weights: dict[str, np.ndarray], share: float, elevation: np.ndarray) -> None:
    """Snow above a ragged line, thinner on steep ground."""
    steep = np.hypot(*np.gradient(elevation)) / PIXEL
    line = above(elevation / elevation.std() + 0.15 * fractal(random, len(elevation), 2.8) - 0.25 * steep, share)
    _lay(weights, "snow", (smoothstep(line, -0.2, 0.3) * 0.97).astype(np.float32))


def _spectra(random: np.random.Generator, names: list[str]) -> np.ndarray:
    """Reflectance (covers, 6) of this scene: brightness and colour of each cover vary from place to place."""
    base = np.array([COVERS[name].spectrum for name in names])
    brightness, colour = random.normal(0, 0.15, (len(names), 1)), random.normal(0, 0.04, base.shape)
    brightness[[i for i, name in enumerate(names) if name == "snow"]] *= 0.2
    return np.clip(base * np.exp(brightness + colour), 0.002, 0.95).astype(np.float32)


def _texture(random: np.random.Generator, size: int, names: list[str], shares: np.ndarray) -> np.ndarray:
    """Logarithm of a factor (6, H, W): fine texture as strong as each cover has it, partly common to the bands."""
    strength = np.tensordot(np.array([COVERS[name].texture for name in names], np.float32), shares, 1)
    common = fractal(random, size, 1.6)
    visible, infrared = fractal(random, size, 1.2), fractal(random, size, 1.4)
    groups = [0.85 * common + 0.5 * own for own in (visible, infrared)]
    return strength * np.stack([groups[0]] * 3 + [groups[1]] * 3)
