"""Key frames: even, by change, by clusters; short clips go to and fro."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modalities.diffusion.data.keyframes import VGGFeatures, clusters, key_frames, luv, reflected
from shared.errors import RequestError


def clip(*levels: int) -> np.ndarray:
    """Grey frames of these brightnesses."""
    frames = np.full((len(levels), 4, 4, 4), 255, np.uint8)
    frames[..., :3] = np.array(levels, np.uint8)[:, None, None, None]
    return frames


def test_short_clips_go_to_and_fro():
    assert reflected(3, 3) == [0, 1, 2]
    assert reflected(3, 4) == [0, 1, 2, 1, 0]
    assert reflected(2, 6) == [0, 1, 0, 1, 0, 1, 0, 1, 0][: len(reflected(2, 6))]
    assert len(reflected(2, 6)) >= 6
    assert key_frames(clip(0, 100, 200), 5) == [0, 1, 2, 1, 0]


def test_even_ones_have_both_ends():
    assert key_frames(clip(*range(10)), 4) == [0, 3, 6, 9]
    assert key_frames(clip(*range(8)), 8) == list(range(8))


def test_by_change_come_those_that_differ_most_from_the_one_before():
    assert key_frames(clip(0, 0, 0, 200, 200, 90, 90, 90, 100), 3, "luv") == [0, 3, 5]


def test_by_clusters_comes_the_first_of_each():
    def brightness(frames: np.ndarray) -> np.ndarray:
        return frames[:, 0, 0, :1].astype(np.float32)

    frames = clip(0, 3, 1, 240, 250, 120, 122, 2)
    assert key_frames(frames, 3, "features", brightness) == [0, 3, 5]
    assert key_frames(clip(7, 7, 7, 7, 9), 4, "features", brightness) == [0, 1, 2, 4]  # fewer clusters: filled up
    with pytest.raises(RequestError, match="give the weights of a VGG16"):
        key_frames(frames, 3, "features")
    with pytest.raises(RequestError, match="a clip of one frame"):
        key_frames(frames[:1], 3)


def test_k_means_finds_well_separated_groups():
    random = np.random.default_rng(1)
    truth = random.integers(0, 4, 60)
    points = np.array([[0, 0], [9, 0], [0, 9], [9, 9]])[truth] + 0.1 * random.standard_normal((60, 2))
    found = clusters(points, 4)
    assert len({(t, f) for t, f in zip(truth.tolist(), found.tolist(), strict=True)}) == 4


def test_luv_of_known_colours():
    """White, and the sRGB primaries (CIE 1976, D65)."""
    colours = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    expected = [[100, 0, 0], [53.24, 175.01, 37.76], [87.73, -83.07, 107.41], [32.30, -9.40, -130.34], [0, 0, 0]]
    np.testing.assert_allclose(luv(colours), expected, atol=0.1)


def test_vgg_weights_give_the_first_linear_layer(tmp_path):
    from torchvision.models.vgg import VGG, make_layers

    torch.manual_seed(0)
    plan = [2, 2, "M", 4, 4, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"]  # a VGG16, narrower
    net = VGG(make_layers(plan), num_classes=3)  # type: ignore[arg-type]
    net.classifier[0] = torch.nn.Linear(8 * 7 * 7, 5)
    net.classifier[3] = torch.nn.Linear(5, 5)
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    frames = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 4), np.uint8)
    frames[..., 3] = 255
    x = torch.from_numpy(frames[..., :3]).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = net.classifier[0](net.avgpool(net.features(x)).flatten(1))
    np.testing.assert_allclose(VGGFeatures(tmp_path / "vgg.pth")(frames), expected, atol=1e-4)
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(RequestError, match="no weights of a VGG16"):
        VGGFeatures(tmp_path / "other.pth")
