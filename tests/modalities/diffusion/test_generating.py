"""``omniadapt generate`` on the small forms of the diffusion recipes: frozen, from a run, and with an adapter file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.diffusion.geometry.meshes import glb_metadata, read_mesh
from shared import cli, recipe, run
from tests.modalities.diffusion.shapes import trimesh

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
NAMES = ("res_adapter", "mv_adapter", "mv_texture", "i2v_adapter", "rdtf")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A picture with alpha, one without, a folder of frames, a mesh and broken ones."""
    folder = tmp_path_factory.mktemp("given")
    pixels = np.zeros((20, 24, 4), np.uint8)
    pixels[4:16, 6:18] = [200, 40, 30, 255]
    Image.fromarray(pixels).save(folder / "cut.png")
    Image.fromarray(pixels[..., :3]).save(folder / "flat.png")
    (folder / "frames").mkdir()
    for place in (0, 5):
        Image.fromarray(pixels).save(folder / f"frames/{place}.png")
    ball = trimesh.creation.icosphere(subdivisions=2)
    ball.apply_scale([1, 2, 0.5])
    ball.export(folder / "ball.obj")
    (folder / "points.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    (folder / "broken.glb").write_bytes(ball.export(file_type="glb")[:300])
    (folder / "picture.obj").write_bytes((folder / "cut.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run directory of each recipe as far as it is read again, its adapter moved in place of training."""
    found: dict[str, Path] = {}

    def made(name: str) -> Path:
        if name not in found:
            found[name] = folder = tmp_path_factory.mktemp(name)
            chosen = recipe.load(f"diffusion/{name}", tiny=True)
            data = chosen.build("data")
            model = run.task_of(chosen, data).model
            random = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for tensor in model.trainable().values():
                    tensor.add_(0.05 * torch.randn(tensor.shape, generator=random))
            (folder / run.RECIPE).write_text(chosen.text())
            model.save(folder / run.ADAPTER, extra={"recipe": chosen.tree, "data": data.describe()})
        return found[name]

    return made


@pytest.fixture
def make(tmp_path, capsys):
    """What a command writes: files by name, pixels by name, settings."""

    def made(*words):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        status = cli.main(["generate", *map(str, words), "--steps", "2", "-o", str(out)])
        assert (status, capsys.readouterr().err) == (0, "")
        files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        numbered = {name: path for name, path in files.items() if path.suffix == ".png" and name != "sheet.png"}
        pixels = {name: np.array(Image.open(path)) for name, path in sorted(numbered.items())}
        return SimpleNamespace(files=files, pixels=pixels, settings=json.loads(files["settings.json"].read_text()))

    return made


@pytest.fixture
def refused(tmp_path, capsys):
    """What is said of a command that cannot be met, in one line."""

    def asked(*words):
        status = cli.main(["generate", *map(str, words), "--steps", "2", "-o", str(tmp_path / "none")])
        said = capsys.readouterr().err
        assert (status, said.count("\n"), (tmp_path / "none").exists()) == (2, 1, False), said
        return said

    return asked


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_and_its_adapter_on_the_recipe_make_the_same(name, given, runs, make):
    words = {
        "res_adapter": ["--size", "24x16", "--count", 2],
        "mv_adapter": ["--views", 3, "--image", given / "cut.png"],
        "mv_texture": ["--mesh", given / "ball.obj"],
        "i2v_adapter": ["--image", given / "flat.png", "--frames", 3],
        "rdtf": ["--prompt", "a cat", "--frames", 6],
    }[name]
    frozen = make(f"diffusion/{name}", "--tiny", *words)
    trained = make(runs(name), *words)
    file = runs(name) / "adapter.safetensors"
    added = make(f"diffusion/{name}", "--tiny", "--adapter", file, *words)
    assert same(trained.pixels, added.pixels)
    assert not same(trained.pixels, frozen.pixels)
    told = [each.settings for each in (frozen, trained, added)]
    assert told[1]["adapter"] == told[2]["adapter"] != told[0]["adapter"] == "none: the frozen model"
    assert (told[1]["made by"], told[2]["adapter file"]) == (str(runs(name)), str(file))
    assert all((each["steps"], each["seed"]) == (2, 0) for each in told)


def test_single_images_have_the_size_that_was_asked(make, refused):
    made = make("diffusion/res_adapter", "--tiny", "--size", "16x24", "--count", 2, "--seed", 7)
    assert [pixels.shape for pixels in made.pixels.values()] == [(24, 16, 3)] * 2
    later = make("diffusion/res_adapter", "--tiny", "--size", "16x24", "--seed", 8)
    assert np.array_equal(later.pixels["0000.png"], made.pixels["0001.png"])
    said = refused("diffusion/res_adapter", "--tiny", "--prompt", "a cat")
    assert "--prompt: this model makes pixels, without a text encoder" in said


def test_views_are_of_text_or_of_an_image_with_alpha(given, runs, make, refused):
    made = make(runs("mv_adapter"), "--views", 6, "--image", given / "cut.png")
    names = ["front", "front_right", "right", "back", "left", "front_left"]
    assert list(made.pixels) == [f"{i:04}_{name}.png" for i, name in enumerate(names)]
    assert {pixels.shape for pixels in made.pixels.values()} == {(16, 16, 3)}
    assert (made.settings["guidance"], made.settings["views"]) == (3.0, 6)
    alone = make(runs("mv_adapter"), "--views", 6)
    assert not same(alone.pixels, made.pixels)
    assert alone.settings["guidance"] is None
    small = ("diffusion/mv_adapter", "--tiny")
    assert "flat.png: no pixel is transparent" in refused(*small, "--image", given / "flat.png")
    assert "this adapter has no branch" in refused(*small, "method.reference=false", "--image", given / "cut.png")
    assert "--guidance 2: there is neither text nor --image" in refused(*small, "--guidance", 2)
    assert "--frames: this makes views, no video" in refused(*small, "--frames", 4)


def test_a_video_begins_with_its_image(given, make, refused):
    small = ("diffusion/i2v_adapter", "--tiny")
    made = make(*small, "--image", given / "cut.png", "--frames", 3, "--size", "32x16")
    assert list(made.pixels) == [f"{i:04}.png" for i in range(3)]
    assert {pixels.shape for pixels in made.pixels.values()} == {(16, 32, 3)}
    assert made.pixels["0000.png"][0, 0].tolist() == [255, 255, 255]  # what is transparent, on white
    assert np.array_equal(made.pixels["0000.png"][8, 16], [200, 40, 30])
    with Image.open(made.files["animation.gif"]) as file:
        assert (file.n_frames, file.size) == (3, (32, 16))
    assert made.files["page.html"].read_text().count("data:image/gif;base64,") == 1
    assert "needs an image to animate: give --image" in refused(*small, "--frames", 3)
    assert "frames: not a readable image" in refused(*small, "--image", given / "frames")
    assert "--size 24x16: sides go by 16 pixels here" in refused(
        *small, "--image", given / "cut.png", "--size", "24x16"
    )
    assert "--prompt: this model makes pixels" in refused(*small, "--image", given / "cut.png", "--prompt", "a cat")


def test_stickers_are_of_text_a_first_frame_or_some_frames(given, make, refused):
    small = ("diffusion/rdtf", "--tiny")
    text = make(*small, "--prompt", "a cat")
    assert len(text.pixels) == 8
    assert (text.settings["given"], text.settings["guidance"]) == ([], 3.0)
    first = make(*small, "--image", given / "cut.png", "--prompt", "a cat", "--frames", 4)
    assert (len(first.pixels), first.settings["given"]) == (4, [0])
    frames = make(*small, "--image", given / "frames")
    assert (frames.settings["given"], frames.settings["guidance"], frames.settings["prompt"]) == ([0, 5], None, None)
    assert "from 2 to 8, the frames it was trained with" in refused(*small, "--frames", 9)
    assert "clips are square" in refused(*small, "--size", "24x16")


# -- meshes ------------------------------------------------------------------------------------------------------------


def test_a_mesh_is_painted_from_its_six_sides(given, make):
    made = make("diffusion/mv_texture", "--tiny", "--mesh", given / "ball.obj", "--image", given / "cut.png")
    sides = ["front", "right", "back", "left", "top", "bottom"]
    assert list(made.pixels) == [f"{i:04}_{name}.png" for i, name in enumerate(sides)]
    mesh, source = read_mesh(made.files["ball.glb"]), read_mesh(given / "ball.obj")
    assert mesh.texture.shape == (3, 64, 64)
    assert float((mesh.vertices.amax(0) - source.vertices.amax(0)).abs().max()) < 1e-4  # where the file has it
    told = glb_metadata(made.files["ball.glb"])
    assert (told["seed"], told["steps"], told["texels"], told["mesh"]) == (0, 2, 64, str(given / "ball.obj"))
    assert told["seen"] > 0.15
    assert told["seen"] + told["filled"] == pytest.approx(1)
    shown = {tuple(pixel) for pixels in made.pixels.values() for pixel in pixels.reshape(-1, 3)}
    assert len(shown) > 100
    assert 'href="ball.glb"' in made.files["page.html"].read_text()
    several = make("diffusion/mv_texture", "--tiny", "--mesh", given / "ball.obj", "--count", 2)
    assert {"000/ball.glb", "001/ball.glb"} <= several.files.keys()
    assert glb_metadata(several.files["001/ball.glb"])["seed"] == 1


def test_views_of_a_known_colour_come_back_as_the_texture(given, make, monkeypatch):
    """Each side one colour: the texture shows each of them, facing its side, and nothing else."""
    from modalities.diffusion.multi_view import sampling

    colours = np.uint8([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]])
    seen = []

    def plain(task, settings, control, reference, told):
        seen.append(control)
        return np.tile(colours[:, None, None], (1, 64, 64, 1))

    monkeypatch.setattr(sampling, "in_pixels", plain)
    box = trimesh.creation.box(extents=(0.8, 1.0, 0.6))  # glTF: y is up, z the front
    box.unmerge_vertices()
    box.export(given / "box.obj")
    made = make("diffusion/mv_texture", "--tiny", "--mesh", given / "box.obj", "--size", "64x64")
    mesh = read_mesh(made.files["box.glb"])
    normals, middles = mesh.face_normals, mesh.uv[mesh.faces].mean(1)
    for normal, (u, v) in zip(normals.round().int().tolist(), middles.tolist(), strict=True):
        sides = [[0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]
        there = mesh.texture[:, min(63, int((1 - v) * 64)), min(63, int(u * 64))]
        assert (there * 255).round().int().tolist() == colours[sides.index(normal)].tolist(), normal
    (control,) = seen
    assert control.shape == (6, 6, 64, 64)
    # In the middle the front's normal is -y, the top's +z.
    assert control[0, 3:, 32, 32].tolist() == pytest.approx([0.5, 0, 0.5], abs=1e-3)
    assert control[4, 3:, 32, 32].tolist() == pytest.approx([0.5, 0.5, 1], abs=1e-3)


def test_what_cannot_be_painted_is_one_line(given, refused):
    small, ball = ("diffusion/mv_texture", "--tiny"), ["--mesh", given / "ball.obj"]
    for words, message in (
        (["--mesh", given / "points.obj"], "points.obj: no triangles in it"),
        (["--mesh", given / "broken.glb"], "broken.glb: not a readable GLB mesh, or truncated"),
        (["--mesh", given / "picture.obj"], "picture.obj: "),
        (["--mesh", given / "cut.png"], "cut.png: no mesh file by its name"),
        ([*ball, "--views", 4], "--views 4: a mesh is painted from its 6 sides"),
        ([*ball, "--size", "32x16"], "--size 32x16: a mesh is seen in squares"),
        ([], "this model paints the mesh it is told: give --mesh"),
        ([*ball, "method.condition=false"], "this adapter has no encoder of maps"),
        ([*ball, "task.front=+y"], "up +y, front +y: at least 1, and two different axes"),
    ):
        assert message in refused(*small, *words)
    said = refused("diffusion/mv_adapter", "--tiny", *ball)
    assert "--mesh: this model is told where cameras stand, not the geometry of a mesh" in said


def test_an_adapter_for_other_views_is_named(given, runs, refused):
    rows, sides = (runs(name) / "adapter.safetensors" for name in ("mv_adapter", "mv_texture"))
    said = refused("diffusion/mv_texture", "--tiny", "--adapter", rows, "--mesh", given / "ball.obj")
    assert f"{rows}: the adapter has views: row; maps: geometry want views: row_column" in said
    said = refused("diffusion/mv_adapter", "--tiny", "--adapter", sides)
    assert f"{sides}: the adapter has views: row_column; maps: rays want views: row" in said
