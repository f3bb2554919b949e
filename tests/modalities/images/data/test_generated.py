"""Generated images: the same whenever they are asked for; their shapes tell the class, their colours do not."""

from __future__ import annotations

import numpy as np
import pytest

from modalities.images.data import GeneratedImages
from shared.errors import RequestError


def data(**changes) -> GeneratedImages:
    return GeneratedImages(**{"count": 40, "normalisation": "measured", **changes})


def arrays(found: GeneratedImages) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([found._source.read(i) for i in range(len(found._source.names))]).astype(np.float64)
    return images, np.array(found._source.labels)


def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Of the nearest class mean, fitted on one half of the images, on the other."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    half = np.arange(len(labels)) % 2 == 0
    means = np.stack([features[half & (labels == c)].mean(0) for c in np.unique(labels)])
    said = ((features[~half, None] - means) ** 2).sum(-1).argmin(1)
    return float((said == labels[~half]).mean())


def test_a_seed_gives_the_same_images_and_another_others():
    one, again, other = (arrays(data(count=3, seed=seed))[0] for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    assert arrays(data(count=3, bands=1))[0].shape == (18, 1, 48, 48)


def test_structure_tells_the_class_and_colour_does_not():
    images, labels = arrays(data())
    grey = images.mean(1)
    spectrum = abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True)))
    row, column = np.meshgrid(*(np.minimum(np.arange(48), 48 - np.arange(48)),) * 2)
    ring = np.hypot(row, column).astype(int)
    radial = np.stack([np.log(spectrum[:, ring == r].mean(1) + 1) for r in range(1, 24)], 1)
    structure = accuracy(radial - radial.mean(1, keepdims=True), labels)  # whatever the contrast
    assert structure > 0.5
    assert accuracy(images.mean((2, 3)), labels) < 0.3  # chance 0.17


def test_what_is_asked_for_wrongly():
    for changes, message in (
        ({"classes": ["disc"]}, "two or more out of"),
        ({"classes": ["disc", "blob"]}, "two or more out of"),
        ({"side": 8}, "side 8"),
        ({"count": 2}, "class 'disc' has 2 images, of which 2 are taken"),
    ):
        with pytest.raises(RequestError, match=message):
            data(**changes)
