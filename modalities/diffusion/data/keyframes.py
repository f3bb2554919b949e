"""Key frames of a clip: a few pictures that tell it, chosen evenly, by change, or by clusters of features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from modalities.diffusion.frames import over_white
from shared import weights
from shared.errors import RequestError


def reflected(count: int, least: int) -> list[int]:
    """The places of at least ``least`` frames, to and fro over a clip of ``count`` where it is shorter; 2 at least."""
    places = list(range(count))
    while len(places) < least:
        places += places[-2::-1]
    return places


def key_frames(
    frames: np.ndarray,
    count: int,
    choice: Literal["equal", "luv", "features"] = "equal",
    features: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[int]:
    """The places of ``count`` key frames, in the order of the clip, which is reflected where it is shorter.

    frames: uint8 (F, H, W, 4).  choice: "equal", at equal spacing; "luv", those that differ most from the one before in
    CIE LUV, the first being one; "features", the first of each of ``count`` clusters of ``features(frames)`` (F, d).

    Raises RequestError where a clip has one frame, or features are wanted and none given.
    """
    if len(frames) < 2:
        raise RequestError("a clip of one frame")
    places = reflected(len(frames), count)
    if len(places) == count:
        return places
    if choice == "equal":
        return [places[int(i)] for i in np.linspace(0, len(places) - 1, count).round()]
    if choice == "luv":
        colours = luv(over_white(frames))
        jumps = np.abs(np.diff(colours[places], axis=0)).sum(-1).mean((1, 2))
        found = np.argsort(-np.concatenate([[np.inf], jumps]), kind="stable")[:count]
    else:
        if features is None:
            raise RequestError("key frames by features: give the weights of a VGG16")
        found = _first_of_clusters(clusters(features(frames)[places], count), count)
    return [places[i] for i in sorted(found)]


def _first_of_clusters(labels: np.ndarray, count: int) -> list[int]:
    """The first place of each label; the earliest other ones where there are fewer labels (equal frames)."""
    found = np.unique(labels, return_index=True)[1].tolist()
    return found + [i for i in range(len(labels)) if i not in found][: count - len(found)]


def clusters(points: np.ndarray, count: int, rounds: int = 100) -> np.ndarray:
    """k-means from k-means++ centres (Arthur and Vassilvitskii, 2007), seed 0: the cluster (N,) of points (N, d)."""
    points, random = points.astype(np.float64), np.random.default_rng(0)
    centres = points[[random.integers(len(points))]]
    while len(centres) < count:
        near = _squares(points, centres).min(1)
        if not near.sum():
            break
        centres = np.concatenate([centres, points[[random.choice(len(points), p=near / near.sum())]]])
    labels = np.full(len(points), -1)
    for _ in range(rounds):
        before, labels = labels, _squares(points, centres).argmin(1)
        if np.array_equal(before, labels):
            break
        centres = np.stack([points[labels == i].mean(0) if (labels == i).any() else c for i, c in enumerate(centres)])
    return labels


def _squares(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.stack([np.square(points - centre).sum(1) for centre in centres], axis=1)


def luv(image: np.ndarray) -> np.ndarray:
    """sRGB uint8 (..., 3) to CIE 1976 L*u*v*, white D65."""
    linear = image / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    x, y, z = np.moveaxis(xyz, -1, 0)
    total = x + 15 * y + 3 * z
    safe = np.where(total > 0, total, 1)
    light = np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, (29 / 3) ** 3 * y)
    u = np.where(total > 0, 13 * light * (4 * x / safe - 0.19784), 0)
    v = np.where(total > 0, 13 * light * (9 * y / safe - 0.46834), 0)
    return np.stack([light, u, v], axis=-1)


class VGGFeatures:
    """What the first fully connected layer of a VGG (Simonyan and Zisserman, 2015) says of frames.

    path: weights with torchvision's names (``vgg16-397923af.pth``: download.pytorch.org/models); widths are the file's.

    Frames come on white, at 224 pixels a side, with the mean and deviation the network was trained with.
    Raises RequestError where the file holds no such weights.
    """

    def __init__(self, path: Path):
        from torchvision.models.vgg import VGG, make_layers

        state = {n: t for n, t in weights.read(path).items() if not n.startswith(("classifier.3", "classifier.6"))}
        kernels = {int(n.split(".")[1]): len(t) for n, t in state.items() if n.startswith("features.") and t.ndim == 4}
        if not kernels or "classifier.0.weight" not in state:
            raise RequestError(f"{path}: no weights of a VGG16 (features.*, classifier.0)")
        plan: list[Any] = []
        for place, width in sorted(kernels.items()):
            plan += ["M"] * (place > 2 * len(plan) - plan.count("M")) + [width]  # a pooling takes one place, others two
        plan.append("M")
        net = VGG(make_layers(plan), num_classes=1, init_weights=False)
        outputs, inputs = state["classifier.0.weight"].shape
        net.classifier = torch.nn.Sequential(torch.nn.Linear(inputs, outputs))
        weights.fill(net, state, "a VGG16", str(path))
        self.net = net.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (F, H, W, 4) to float32 (F, d)."""
        from PIL import Image

        sized = np.stack([np.asarray(Image.fromarray(frame).resize((224, 224))) for frame in over_white(frames)])
        x = torch.from_numpy(sized).permute(0, 3, 1, 2).float() / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return self.net((x - mean[:, None, None]) / deviation[:, None, None]).numpy()
