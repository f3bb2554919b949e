"""Photographs in an archive: which are read, how they are split and shown, and what is refused."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modalities.remote_sensing.data.archive import GeneratedTextures, PhotographArchive
from modalities.remote_sensing.data.augment import crop_and_colour, recoloured, reexposed
from shared.errors import RequestError


def jpeg(colour: tuple[int, int, int], side: int = 32) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def photographs() -> dict[str, bytes]:
    """Ten of each of two classes, red and blue, the number in the green band."""
    red = {f"a red/r{i:02d}.jpg": jpeg((200, 10 * i, 0)) for i in range(10)}
    return red | {f"b blue/b{i:02d}.jpg": jpeg((0, 10 * i, 200)) for i in range(10)}


def test_reads_what_is_not_left_out(tmp_path, photographs):
    photographs["readme.txt"] = b"no photograph"
    data = PhotographArchive(
        archive=archive(tmp_path / "a.tar", photographs), leave_out=r"/[rb]0[36]\.jpg$", size=16, batch_size=4
    )
    assert data.classes == ("a red", "b blue")
    assert sorted(data.names) == sorted(n for n in photographs if n.endswith("jpg") and not re.search("0[36]", n))
    assert data.describe()["left_out"] == 4
    for index, name in enumerate(data.names):  # pixels and labels belong to the names
        red, green, blue = data.photographs[index].float().mean((1, 2)).tolist()
        assert (red > blue) == (data.labels[index] == 0)
        assert green == pytest.approx(10 * int(name[-6:-4]), abs=6)


def test_stated_classes_set_the_index(tmp_path, photographs):
    data = PhotographArchive(archive=archive(tmp_path / "a.tar", photographs), classes=["b blue", "a red"])
    assert [data.classes[label] for label in data.labels] == [name.partition("/")[0] for name in data.names]


def test_splits_are_disjoint_whole_and_drawn_by_the_seed(tmp_path, photographs):
    path = archive(tmp_path / "a.tar", photographs)
    one, same, other = (PhotographArchive(archive=path, size=16, batch_size=4, seed=seed) for seed in (0, 0, 1))
    assert sorted(i for part in one.members.values() for i in part) == list(range(20))
    assert [len(one.members[part]) for part in ("train", "validation", "test")] == [16, 2, 2]
    assert one.members == same.members != other.members


def test_batches_are_normalised_and_the_evaluated_ones_fixed(tmp_path, photographs):
    data = PhotographArchive(archive=archive(tmp_path / "a.tar", photographs), size=16, batch_size=4, test=0.4)
    first, again = (list(data.test()) for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    shown = {name: image for batch in first for name, image in zip(batch["name"], batch["image"], strict=True)}
    index = data.names.index(name := next(iter(shown)))
    pixel = data.photographs[index, :, 0, 0].float()
    expected = (pixel - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert torch.allclose(shown[name].mean((1, 2)), expected, atol=0.05)

    torch.manual_seed(3)
    batch = next(iter(data.train()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["label"].tolist() == [data.labels[data.names.index(n)] for n in batch["name"]]
    torch.manual_seed(3)
    assert torch.equal(batch["image"], next(iter(data.train()))["image"])


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({"a red/r00.jpg": b"not a photograph"}, {}, "a red/r00.jpg: not a readable PNG, JPEG, TIFF or WebP image"),
        ({"a red/r00.jpg": jpeg((9, 9, 9))[:-300]}, {}, "a red/r00.jpg: not a readable"),
        ({"a red/r00.jpg": b""}, {}, "a red/r00.jpg: not a readable"),
        ({"a red/r05.jpg": jpeg((9, 9, 9), 48)}, {}, r"a red/r05.jpg has \(48, 48\) pixels"),
        ({}, {"leave_out": "nothing"}, "leave_out 'nothing' fits none of the 20 photographs"),
        ({}, {"leave_out": "jpg"}, "no photograph is left to read"),
        ({}, {"leave_out": "("}, "not a regular expression"),
        ({}, {"classes": ["a red", "c"]}, r"classes \['a red', 'c'\]: .*a\.tar has the folders \['a red', 'b blue'\]"),
        ({}, {"size": 0}, "size 0"),
        ({}, {"smallest": 0.0}, "smallest 0.0"),
        ({}, {"validation": 1.5}, "validation 1.5"),
    ],
)
def test_what_is_refused(tmp_path, photographs, change, arguments, says):
    path = archive(tmp_path / "a.tar", photographs | change)
    with pytest.raises(RequestError, match=says):
        PhotographArchive(archive=path, **arguments)


def test_damaged_or_missing_archives_are_refused(tmp_path, photographs):
    path = archive(tmp_path / "a.tar", photographs)
    content = path.read_bytes()
    for length in (5000, 5120, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(RequestError, match=r"a\.tar: .*(not a whole tar archive|not a readable)"):
            PhotographArchive(archive=path)
    with pytest.raises(RequestError, match="not a readable tar archive"):
        PhotographArchive(archive=tmp_path / "none.tar")
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(RequestError, match=r"zero\.tar"):
        PhotographArchive(archive=tmp_path / "zero.tar")


def test_textures_differ_by_class_and_follow_from_the_seed():
    one, same = GeneratedTextures(count=2), GeneratedTextures(count=2)
    assert torch.equal(one.photographs, same.photographs)
    spectra = torch.fft.rfft2(one.photographs.float().mean(1)).abs()
    spectra[:, 0, 0] = 0
    peaks = spectra.flatten(1).argmax(1)
    for a in range(8):
        for b in range(8):
            assert (peaks[a] == peaks[b]) == (one.labels[a] == one.labels[b])


def test_crops_keep_the_colours_of_a_plain_image_and_colour_changes_do_not():
    image = torch.tensor([0.5, -0.2, 0.1]).view(1, 3, 1, 1).expand(64, 3, 20, 20).contiguous()
    assert torch.allclose(crop_and_colour(image, 8, smallest=0.2, colour=0.0), image[:, :, :8, :8], atol=1e-5)
    changed = recoloured(image, 1.0)
    assert changed.shape == image.shape
    assert changed.std(0).min() > 0.1


def test_crops_show_all_eight_orientations():
    corner = torch.zeros(400, 1, 16, 16)
    corner[:, :, :8, :8] = 1.0
    shown = crop_and_colour(corner, 16, smallest=1.0, colour=0.0)[:, 0]
    quarters = torch.stack([shown[:, y : y + 8, x : x + 8].mean((1, 2)) for y in (0, 8) for x in (0, 8)], 1)
    assert set(quarters.argmax(1).tolist()) == {0, 1, 2, 3}


def test_exposure_is_one_gain_and_one_offset_for_each_band_of_each_image():
    image = torch.randn(400, 3, 4, 4)
    assert torch.equal(reexposed(image, 0.0), image)
    changed = reexposed(image, 1.0)
    first, second = image[:, :, 0, 0], image[:, :, 3, 3]
    gain = (changed[:, :, 3, 3] - changed[:, :, 0, 0]) / (second - first)
    offset = changed[:, :, 0, 0] - gain * first
    assert torch.allclose(gain[:, :, None, None] * image + offset[:, :, None, None], changed, atol=1e-2)
    assert gain.log().std().item() == pytest.approx(0.15 * 2**0.5, rel=0.1)
    assert offset.std().item() == pytest.approx(0.15 * 2**0.5, rel=0.1)
    together = torch.corrcoef(offset.T)[0, 1].item()  # half of the variance is the image's, half the band's
    assert together == pytest.approx(0.5, abs=0.12)
