"""Objects of both sources: shapes and values of a batch, fixed checks, and wrong folders in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from modalities.diffusion.geometry import cameras
from modalities.diffusion.multi_view import solids
from modalities.diffusion.multi_view.data import GeneratedSolids, RenderedObjects
from shared.errors import RequestError

SIZE = 16


def save(path, colour, alpha=None):
    from PIL import Image

    planes = colour if alpha is None else torch.cat([colour, alpha[None]])
    Image.fromarray((planes * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three objects of the true layout: rendered solids, seen from the six sides."""
    around, rows = cameras.geometry_guided(), ["id,caption"]
    for index in range(3):
        things, caption = solids.draw(np.random.default_rng(index))
        seen = solids.render(things, around, (SIZE, SIZE))
        place = tmp_path / f"object_{index}"
        place.mkdir()
        rows.append(f"object_{index},{caption}")
        depth = torch.einsum("vhwi,vi->vhw", seen.positions - around.positions[:, None, None], around.forward)
        for view in range(6):
            save(place / f"view_{view}.png", seen.colour[view], seen.alpha[view])
            save(place / f"normal_{view}.png", (seen.normals[view].permute(2, 0, 1) + 1) / 2)
            np.save(place / f"depth_{view}.npy", depth[view].numpy())
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


def rendered(folder, **more):
    return RenderedObjects(folder=folder, size=SIZE, validation_share=0.34, test_share=0.0, batch_size=2, **more)


@pytest.mark.parametrize(("maps", "control"), [("rays", (2, 6, 6, 1, 1)), ("geometry", (2, 6, 6, SIZE, SIZE))])
def test_generated_batches(maps, control):
    data = GeneratedSolids(size=SIZE, maps=maps, objects=5, batch_size=2, checks=3)
    batches = list(data.train())
    assert len(batches) == 2
    batch = batches[0]
    assert (batch["image"].shape, batch["control"].shape) == ((2, 6, 3, SIZE, SIZE), control)
    assert batch["reference"].shape == (2, 3, SIZE, SIZE)
    assert float(batch["control"].min()) >= 0
    assert float(batch["control"].max()) <= 1
    background = batch["image"].movedim(2, -1)[batch["alpha"] == 0]
    assert not background.any()  # grey 0.5
    assert [len(b["name"]) for b in data.test()] == [2, 1]
    for a, b in zip(data.test(), data.test(), strict=True):
        assert torch.equal(a["reference"], b["reference"])
    one, other = (data.sample("train", 0, seed)["reference"] for seed in (1, 2))
    assert not torch.equal(one, other)
    assert (data.describe()["size"], data.describe()["maps"], data.describe()["views"]) == (SIZE, maps, 6)


def test_ray_maps_tell_the_cameras():
    batch = GeneratedSolids(size=SIZE, views=4).sample("test", 0, None)
    assert torch.equal(batch["control"], cameras.ray_maps(cameras.view_guided(4), (1, 1)))
    assert torch.equal(batch["c2w"], cameras.view_guided(4).c2w)


def test_a_box_is_cut_out_of_references_in_training_alone():
    plain, cut = (GeneratedSolids(size=32, erase=erase) for erase in (False, True))
    assert torch.equal(plain.sample("test", 0, None)["reference"], cut.sample("test", 0, None)["reference"])
    pairs = [[data.sample("train", 0, seed)["reference"] for data in (plain, cut)] for seed in range(6)]
    assert 0 < max(int((a != b).any(0).sum()) for a, b in pairs) <= 8 * 8


def test_a_folder_gives_what_was_rendered(folder):
    data = rendered(folder, maps="geometry")
    assert [data.count(split) for split in ("train", "validation", "test")] == [2, 1, 0]
    batch = next(iter(data.validation()))
    index = int(batch["name"][0][-1])
    things, caption = solids.draw(np.random.default_rng(index))
    seen = solids.render(things, data.cameras, (SIZE, SIZE))
    assert batch["caption"] == [caption]
    torch.testing.assert_close(batch["positions"][0], seen.positions, atol=1e-5, rtol=0)
    expected = cameras.geometry_maps(seen.positions, seen.normals)
    torch.testing.assert_close(batch["control"][0], expected, atol=0.01, rtol=0)
    colour = seen.colour * seen.alpha[:, None] + 0.5 * (1 - seen.alpha[:, None])
    torch.testing.assert_close(batch["image"][0], colour * 2 - 1, atol=0.01, rtol=0)


def test_a_folder_may_name_its_cameras_and_references(folder):
    name = rendered(folder).sample("train", 0, 1)["name"]
    told = {"azimuth": [0, 60, 120, 180, 240, 300], "elevation": [0] * 6, "scale": 1.2}
    (folder / name / "meta.json").write_text(json.dumps(told))
    save(folder / name / "reference_0.png", torch.ones(3, SIZE, SIZE), torch.ones(SIZE, SIZE))
    batch = rendered(folder).sample("train", 0, 1)
    torch.testing.assert_close(batch["c2w"], cameras.orthographic(told["azimuth"]).c2w)
    assert batch["projection"][0, 0, 0].item() == pytest.approx(2 / 1.2)
    assert (batch["reference"] == 1).all()


def test_wrong_folders(folder, tmp_path):
    train = rendered(folder)
    name = train.sample("train", 0, 1)["name"]
    place = folder / name

    def refused(message, **more):
        with pytest.raises(RequestError, match=message):
            rendered(folder, **more).sample("train", 0, 1)

    (place / "meta.json").write_text('{"azimuth": [0, 90], "elevation": 0}')
    refused("2 cameras; the data say views 6")
    (place / "meta.json").write_text('{"azimuth": [0, 90]}')
    refused("no cameras to read")
    (place / "meta.json").unlink()
    save(place / "view_3.png", torch.ones(3, SIZE, 8))
    refused("view_3.png: 8 x 16 pixels: views are square")
    (place / "view_3.png").write_bytes(b"no image")
    refused("view_3.png: not a readable image")
    save(place / "view_3.png", torch.ones(3, SIZE, SIZE), torch.ones(SIZE, SIZE))
    np.save(place / "depth_1.npy", np.zeros((4, 4)))
    refused("depth_1.npy: shape .4, 4.", maps="geometry")
    (place / "depth_1.npy").unlink()
    refused("depth_1.npy: no such file: geometry wants depth", maps="geometry")
    assert not rendered(folder).sample("train", 0, 1)["positions"].any()  # rays do without
    (folder / "captions.csv").write_text("id,caption\nabsent,a box\n")
    refused("1 of its objects have no folder .first: absent")
    (folder / "captions.csv").write_text("name\nx\n")
    refused("wants rows with id and caption")
    with pytest.raises(RequestError, match="names the objects"):
        RenderedObjects(folder=folder / name, size=SIZE)
    with pytest.raises(RequestError, match="views 4: geometry is seen from its 6 sides"):
        GeneratedSolids(maps="geometry", views=4)


def test_views_as_images_of_their_own():
    settings = {"size": SIZE, "views": 3, "objects": 4, "batch_size": 2, "checks": 2, "plain": True}
    whole, apart = (GeneratedSolids(**settings, apart=each) for each in (False, True))
    for one, other in ((whole.train(), apart.train()), (whole.test(), apart.test())):
        objects, images = next(iter(one)), next(iter(other))
        assert torch.equal(images["image"], objects["image"].flatten(0, 1))
        assert images["caption"] == [caption for caption in objects["caption"] for _ in range(3)]
        assert len(images["name"]) == len(images["crop"]) == 6
