"""``omniadapt generate``: requests that cannot be met are one line, and the folder is written whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from shared import cli
from shared.errors import WorkError
from shared.generating import Made
from shared.report import generated

RECIPE = ["diffusion/pixels_res_adapter", "--tiny"]


def run(capsys, *words):
    status = cli.main(["generate", *map(str, words)])
    told = capsys.readouterr()
    return status, told.out, told.err


def save(path, pixels, mode=None):
    Image.fromarray(np.asarray(pixels), mode).save(path)
    return path


def read(path):
    with Image.open(path) as file:
        return np.asarray(file).copy()


GREY, CLEAR = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)


def requests(folder):
    """Words of the command line, and what is said of them."""
    (folder / "cut.png").write_bytes(save(folder / "whole.png", np.full((40, 40, 3), 9, np.uint8)).read_bytes()[:70])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.obj").write_bytes(b"")
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("mine")
    out = ["-o", folder / "out"]
    return [
        (["--size", "30x32", *out], "--size 30x32: sides must be multiples of 8 pixels, such as 32x32"),
        (["--size", "0x64", *out], "--size 0x64: sides from 8 to 8,192 pixels"),
        (["--size", "10000x64", *out], "--size 10000x64: sides from 8 to 8,192 pixels"),
        (["--size", "64", *out], "'64': wants WIDTHxHEIGHT in pixels, such as 512x2048"),
        (["--size", "-8x8", *out], "wants WIDTHxHEIGHT|expected one argument"),
        (["--views", "0", *out], "--views 0: use 1 to 1,000"),
        (["--frames", "-1", *out], "--frames -1: use 1 to 10,000"),
        (["--count", "0", *out], "--count 0: use 1 to 10,000"),
        (["--steps", "1001", *out], "--steps 1001: use 1 to 1,000"),
        (["--guidance", "nan", *out], "--guidance nan: use a number from 0"),
        (["--seed", "-1", *out], "--seed -1: use 0 to"),
        (["--image", folder / "gone.png", *out], "--image .*gone.png: no such file"),
        (["--image", folder / "cut.png", *out], "--image .*cut.png: not a readable image"),
        (["--image", folder / "text.png", *out], "--image .*text.png: not a readable image"),
        (
            ["--image", save(folder / "deep.png", GREY.astype(np.uint16)), *out],
            "pixels of mode I;16; wants 8 bits",
        ),
        (["--image", save(folder / "clear.png", CLEAR), *out], "clear.png: wholly transparent"),
        (["--image", folder / "full", *out], "full: a folder without pictures"),
        (["--image", folder, *out], "--image .*clear.png: wholly transparent"),
        (["--mesh", folder / "gone.obj", *out], "--mesh .*gone.obj: no such file"),
        (["--mesh", folder / "empty.obj", *out], "--mesh .*empty.obj: empty"),
        (["--adapter", folder / "gone", *out], "--adapter .*gone: no such file or folder"),
        (["-o", folder / "full"], "full: it is there already; name another folder, or add --overwrite"),
        (["-o", folder / "full", "--overwrite"], "--overwrite replaces what generate has written, and this is some"),
        (["data.low=8", "method.rang=4", *out], "method.rang: ResAdapter has no such setting"),
    ]


def test_what_is_asked_wrongly_is_one_line(tmp_path, capsys):
    import re

    for words, message in requests(tmp_path):
        status, out, err = run(capsys, *RECIPE, *words)
        assert (status, out) == (2, ""), (words, err)
        assert re.search(message, err), (words, err)
        assert err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/mine.txt").read_text() == "mine"


def test_what_the_task_does_not_make_and_adapters_that_do_not_fit(tmp_path, capsys):
    norm = {"mid_block.resnets.0.norm1.weight": torch.ones(16), "conv_in.bias": torch.ones(1)}
    save_file(norm, tmp_path / "left.safetensors")
    image = save(tmp_path / "image.png", np.full((4, 4, 3), 7, np.uint8))
    for words, message in [
        (["--views", 6], "--views: Denoising makes single images from a prompt or from noise"),
        (["--image", image, "--frames", 4], "--frames: Denoising makes single images"),
        (["--adapter", tmp_path / "left.safetensors"], "1 of its 2 keys not used (first: conv_in.bias)"),
    ]:
        status, _, err = run(capsys, *RECIPE, *words, "-o", tmp_path / "out")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    status, _, err = run(capsys, "quickstart", "--tiny", "-o", tmp_path / "out")
    assert status == 2
    assert "quickstart: its task, Segmentation, does not generate" in err


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_from_a_recipe_to_a_folder_and_again(tmp_path, capsys):
    words = [*RECIPE, "--size", "24x16", "--count", "3", "--steps", "2", "--seed", "4", "-o", tmp_path / "out"]
    assert run(capsys, *words) == (0, f"page: {tmp_path / 'out/page.html'}\n", "")
    names = {"0000.png", "0001.png", "0002.png", "sheet.png", "settings.json", "page.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    told = json.loads((tmp_path / "out/settings.json").read_text())
    assert (told["seed"], told["steps"], told["width"], told["height"]) == (4, 2, 24, 16)
    assert (told["made by"], told["adapter"]) == (RECIPE[0], "none: the frozen model")
    with Image.open(tmp_path / "out/0002.png") as file:
        assert file.size == (24, 16)
        assert (file.text["seed"], file.text["index"], file.text["sampler"]) == (
            "4",
            "2",
            "DPMSolverMultistepScheduler",
        )
        first = np.asarray(file).copy()
    page = (tmp_path / "out/page.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "never trained" in page
    assert run(capsys, *words)[0] == 2
    assert run(capsys, *words, "--overwrite")[0] == 0
    assert np.array_equal(read(tmp_path / "out/0002.png"), first)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def frames(count=3, groups=1, channels=4, side=8) -> list[np.ndarray]:
    return [np.random.default_rng(g).integers(0, 256, (count, side, side, channels), np.uint8) for g in range(groups)]


def test_views_are_named_and_move(tmp_path):
    made = Made(kind="views", images=frames(groups=2), settings={}, names=("front", "left", "back"), rate=5.0,
                files={"mesh/model.obj": b"v 0 0 0\n"})  # fmt: skip
    generated.write(tmp_path / "out", made, {"prompt": "a <chair> ünd", "guidance": 3.0, "negative": None})
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    views = {f"{g:03}/{i:04}_{n}.png" for g in range(2) for i, n in enumerate(made.names)}
    moving = {f"animation_{g:03}.{kind}" for g in range(2) for kind in ("gif", "webp", "apng")}
    assert found == {*views, *moving, "mesh/model.obj", "sheet.png", "settings.json", "page.html"}
    with Image.open(tmp_path / "out/001/0002_back.png") as file:
        assert np.array_equal(np.asarray(file), made.images[1][2])
        assert (file.text["prompt"], file.text["guidance"], file.text["index"]) == ("a <chair> ünd", "3.0", "5")
        assert "negative" not in file.text
    with Image.open(tmp_path / "out/animation_000.webp") as file:
        assert (file.n_frames, file.size) == (3, (8, 8))
        assert np.array_equal(np.asarray(file.convert("RGBA"))[..., 3], made.images[0][0][..., 3])
    with Image.open(tmp_path / "out/animation_000.gif") as file:
        assert (file.n_frames, file.info["duration"], file.info["loop"]) == (3, 200, 0)
        shown = made.images[0][0][..., 3] >= 128
        assert np.array_equal(np.asarray(file.convert("RGBA"))[..., 3], 255 * shown)
    with Image.open(tmp_path / "out/animation_000.apng") as file:
        assert (file.n_frames, file.info["duration"], file.info["loop"]) == (3, 200, 0)
        assert np.array_equal(np.asarray(file), made.images[0][0])
    page = (tmp_path / "out/page.html").read_text()
    assert "a &lt;chair&gt; ünd" in page
    assert 'href="mesh/model.obj"' in page
    assert read(tmp_path / "out/sheet.png").shape[1::-1] == (24, 16)


def test_a_sheet_of_many_is_shrunk_and_a_page_shows_the_first(tmp_path):
    made = Made(kind="images", images=frames(1, 70, 3, 700), settings={})
    made.images[:] = [image[:, :10] for image in made.images]
    generated.write(tmp_path / "out", made, {})
    assert read(tmp_path / "out/sheet.png").shape[1::-1] == (9 * int(700 * 4096 / 6300), 8 * int(10 * 4096 / 6300))
    page = (tmp_path / "out/page.html").read_text()
    assert page.count("data:image/png") == 64
    assert "The first 64 of 70" in page


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_refuses_leaves_all_as_it_was(tmp_path, monkeypatch, there):
    made = Made(kind="frames", images=frames(), settings={})
    if there:
        generated.write(tmp_path / "out", made, {"seed": 1})
    replace, asked = generated.os.replace, []

    def refuse(source, target):
        asked.append(target)
        if target == tmp_path / "out" and len(asked) == 1 + there:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(generated.os, "replace", refuse)
    with pytest.raises(WorkError, match="out: cannot be written: No space left on device"):
        generated.write(tmp_path / "out", made, {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])
    if there:
        assert json.loads((tmp_path / "out/settings.json").read_text()) == {"seed": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "no picture"),
        ({"images": [np.zeros((1, 4, 4, 3), np.float32)]}, "pictures of float32"),
        ({"images": [np.zeros((4, 4, 3), np.uint8)]}, "uint8 .* was asked"),
        ({"names": ("one",)}, "named 1 of 3 pictures"),
        ({"files": {"../out": b""}}, "a file '../out', outside the folder"),
        ({"files": {"page.html": b"", "sheet.png": b""}}, "'page.html', a name that is taken|'sheet.png'"),
    ],
)
def test_what_a_task_may_not_make_is_an_error_of_the_work(tmp_path, change, message):
    made = Made(**{"kind": "views", "images": frames(), "settings": {}, **change})
    with pytest.raises(WorkError, match=message):
        generated.write(tmp_path / "out", made, {})
    assert not (tmp_path / "out").exists()
