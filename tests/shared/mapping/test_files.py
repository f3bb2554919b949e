"""Many rasters: where each goes, that one failure does not stop the rest, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.errors import RequestError, WorkError
from shared.mapping.files import map_files, targets
from tests.shared.mapping.conftest import opened


@pytest.fixture
def folder(tmp_path, made) -> Path:
    for name in ("a.tif", "deep/b.tif", "deep/c d.tif"):
        made(40, 50, name=f"scenes/{name}")
    made(40, 50, name="scenes/.hidden.tif")
    made(40, 50, name="scenes/.cache/d.tif")
    (tmp_path / "scenes" / "notes.txt").write_text("no raster")
    (tmp_path / "scenes" / "deep" / "loop").symlink_to(tmp_path / "scenes")
    return tmp_path / "scenes"


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_searched_and_repeated(tmp_path, folder, scores, feed, capsys):
    map_files(scores, feed, [folder], tmp_path / "maps")
    assert written(tmp_path / "maps") == ["a.tif", "deep/b.tif", "deep/c d.tif"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{tmp_path / 'maps' / 'a.tif'}: 50 x 40 pixels: clear ")
    assert lines[0].endswith("no data 8.1%")
    shares = opened(tmp_path / "maps" / "a.tif")[0]
    assert f"clear {np.mean(shares == 0):.1%}" in lines[0]
    map_files(scores, feed, [folder], tmp_path / "maps")
    assert capsys.readouterr().out.splitlines()[2] == f"{tmp_path / 'maps' / 'deep' / 'c d.tif'}: done before"
    map_files(scores, feed, [folder / "a.tif", folder / "deep"], tmp_path / "more", kind="polygons")
    assert written(tmp_path / "more") == ["a.geojson", "b.geojson", "c d.geojson"]


def test_results_within_the_folder_are_not_read_again(folder, scores, feed):
    for _ in range(2):
        map_files(scores, feed, [folder], folder / "maps")
    assert written(folder / "maps") == ["a.tif", "deep/b.tif", "deep/c d.tif"]


def test_one_that_fails_does_not_stop_the_rest(tmp_path, folder, scores, feed, capsys):
    (folder / "deep" / "b.tif").write_bytes(b"")
    (folder / "z.png").write_text("no picture")
    with pytest.raises(WorkError, match=r"2 of 4 rasters failed: .*deep/b.tif, .*z.png$"):
        map_files(scores, feed, [folder], tmp_path / "maps")
    out, err = capsys.readouterr()
    assert written(tmp_path / "maps") == ["a.tif", "deep/c d.tif"]
    assert len(out.splitlines()) == 2
    empty, png = err.splitlines()
    assert empty.endswith("deep/b.tif: empty (0 bytes)")
    assert "z.png: damaged, or not PNG" in png


def test_one_raster_raises_what_is_wrong_with_it(tmp_path, folder, scores, feed):
    (folder / "a.tif").write_bytes(b"")
    with pytest.raises(RequestError, match="a.tif: empty"):
        map_files(scores, feed, [folder / "a.tif"], tmp_path / "maps")


def test_what_is_written_follows_from_the_name(tmp_path, made, scores, feed, capsys):
    map_files(scores, feed, [made(40, 40)], tmp_path / "new" / "one.geojson")
    map_files(scores, feed, [tmp_path / "in.tif"], tmp_path / "two.TIF")
    map_files(scores, feed, [tmp_path / "in.tif"], tmp_path / "new")
    assert written(tmp_path) == ["in.tif", "new/in.tif", "new/one.geojson", "two.TIF"]
    made(40, 40, name="plain.tif", place=None)
    capsys.readouterr()
    map_files(scores, feed, [tmp_path / "plain.tif"], tmp_path / "new")
    assert capsys.readouterr().out.endswith("; without a coordinate reference system, as its input\n")


REQUESTS = {
    "several into one file": (["a.tif", "deep/b.tif"], "out.tif", "out.tif: several rasters are written to a folder"),
    "a folder into one file": (["deep"], "out.geojson", "out.geojson: several rasters are written to a folder"),
    "a folder that is a file": (["deep"], "notes.txt", "notes.txt: several rasters are written to a folder"),
    "over the inputs": (["."], ".", "a.tif: a result would overwrite an input"),
    "one name twice": (["a.tif", "other/a.png"], "maps", r"a.tif and .*other/a.png would both become .*maps/a.tif"),
    "no raster": (["other/empty"], "maps", r"other/empty: holds no raster \(.tif, .tiff, .png"),
}


@pytest.mark.parametrize(("inputs", "output", "message"), REQUESTS.values(), ids=REQUESTS)
def test_what_does_not_fit_together_is_told_before_anything_is_written(folder, scores, feed, inputs, output, message):
    (folder / "other" / "empty").mkdir(parents=True)
    (folder / "other" / "a.png").write_text("")
    before = written(folder)
    with pytest.raises(RequestError, match=message):
        map_files(scores, feed, [folder / name for name in inputs], folder / output)
    assert written(folder) == before


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(RequestError, match="output 'masks': use classes, probabilities, polygons"):
        targets([tmp_path / "a.tif"], tmp_path / "b.tif", "masks")
