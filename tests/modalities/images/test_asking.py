"""Files of prompts: what they mean, and one line for each way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modalities.images.asking import prompt_file, read_prompts
from shared.errors import RequestError

SIZE = (30, 50)  # height, width


def json_file(folder: Path, value: object) -> Path:
    (folder / "p.json").write_text(json.dumps(value))
    return folder / "p.json"


def csv_file(folder: Path, text: str) -> Path:
    (folder / "p.csv").write_text(text)
    return folder / "p.csv"


def test_json_says_points_boxes_and_masks(tmp_path: Path) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[5:9, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    objects = [
        {"points": [[1, 2], [50, 30]], "labels": [1, 0], "name": "roof"},
        {"box": [1.5, 2, 20, 9]},
        {"mask": "m.png", "points": [[3, 4]]},
    ]
    for value in (objects, {"objects": objects}):
        first, second, third = read_prompts(json_file(tmp_path, value), SIZE)
        assert (first.name, first.points.tolist(), first.labels.tolist()) == ("roof", [[1, 2], [50, 30]], [1, 0])
        assert (second.name, second.box, len(second.points)) == ("2", (1.5, 2, 20, 9), 0)
        assert third.labels.tolist() == [1]
        assert third.mask is not None
        assert third.mask.sum() == 40
        assert third.places.tolist() == [[3, 4], [10, 5], [19, 8]]


def test_rows_of_an_object_belong_together(tmp_path: Path) -> None:
    text = "object,x,y,label,left,top,right,bottom\na,1,2,1,,,,\n,7,8,,,,,\na,3,4,0,,,,\na,,,,0,0,9,9\n,,,,5,5,6,7\n"
    first, second, third = read_prompts(csv_file(tmp_path, text), SIZE)
    assert (first.name, first.points.tolist(), first.labels.tolist()) == ("a", [[1, 2], [3, 4]], [1, 0])
    assert first.box == (0, 0, 9, 9)
    assert (second.name, second.points.tolist(), second.labels.tolist()) == ("2", [[7, 8]], [1])
    assert third.box == (5, 5, 6, 7)
    (only,) = read_prompts(csv_file(tmp_path, "x,y\n3,4\n"), SIZE)
    assert only.points.tolist() == [[3, 4]]


def test_where_the_prompts_of_an_image_are(tmp_path: Path) -> None:
    image, folder = tmp_path / "deep" / "a.tif", tmp_path / "asked"
    (folder / "deep").mkdir(parents=True)
    image.parent.mkdir()
    inside = Path("deep/a.tif")
    assert prompt_file(image, None, inside) is None
    assert prompt_file(image, tmp_path / "p.json", inside) == tmp_path / "p.json"
    with pytest.raises(RequestError, match=r"a.tif: no prompts: .*asked/deep/a.json or .csv is missing"):
        prompt_file(image, folder, inside)
    (folder / "deep" / "a.csv").touch()
    assert prompt_file(image, folder, inside) == folder / "deep" / "a.csv"
    (image.parent / "a.prompts.json").touch()
    assert prompt_file(image, None, inside) == image.parent / "a.prompts.json"
    (image.parent / "a.prompts.csv").touch()
    with pytest.raises(RequestError, match=r"a.prompts.json and a.prompts.csv both hold prompts of a.tif"):
        prompt_file(image, None, inside)


WRONG_JSON = {
    "wants a list of objects": {"points": []},
    "asks about no object": [],
    "object 1: wants points and labels, box, mask, and name; got 3": [3],
    r"object 1: wants points and labels, box, mask, and name; got \{'point'": [{"point": [1, 2]}],
    "object 1: neither points nor a box nor a mask": [{"name": "a"}],
    "object 2: points .*: wants 2 numbers each": [{"box": [1, 1, 2, 2]}, {"points": [[1, 2, 3]]}],
    r"object 1: points \['a'\]: wants 2 numbers": [{"points": ["a"]}],
    r"object 1: points 3: wants 2": [{"points": 3}],
    r"object 1: points \[\[nan": [{"points": [[float("nan"), 1]]}],
    r"object 1: labels \[1, 2\]: one for each of its 2 points": [{"points": [[1, 1], [2, 2]], "labels": [1, 2]}],
    r"object 1: labels \[\]: one for each of its 1 points": [{"points": [[1, 1]], "labels": []}],
    r"object 1: box \[1, 1, 2\]|object 1: box": [{"box": [1, 1, 2]}],
    r"object 1: box \[5.0, 1.0, 2.0, 3.0\] is empty; give left, top, right, bottom": [{"box": [5, 1, 2, 3]}],
    r"object 1: point \(50.5, 3\) lies outside the image, 50 pixels wide and 30 high": [{"points": [[50.5, 3]]}],
    r"object 1: point \(3, -1\) lies outside": [{"points": [[1, 1], [3, -1]]}],
    r"object 1: box corner \(20, 31\) lies outside the image": [{"box": [1, 1, 20, 31]}],
    "object 1: mask .*away.png: no such file": [{"mask": "away.png"}],
    "object 1: mask .*small.png: 10 x 50 pixels, its image 30 x 50; a mask has its image's size": [
        {"mask": "small.png"}
    ],
    "object 1: mask .*black.png is empty": [{"mask": "black.png"}],
    "object 1: mask .*zero.png: .*the file is empty": [{"mask": "zero.png"}],
}
WRONG_CSV = {
    "wants the columns x, y .*; got nothing": "",
    "wants the columns .* got a, b": "a,b\n1,2\n",
    "wants the columns .* got x, y, z": "x,y,z\n1,2,3\n",
    "asks about no object": "x,y\n",
    "line 3: 'five' is no number": "x,y\n1,2\n3,five\n",
    "line 2 has not as many values": "x,y\n1\n",
    "line 2 holds neither a point nor a box": "object,x,y\na,,\n",
    "line 2: '' is no number": "x,y\n1,\n",
    "line 3: a second box of object a": "object,left,top,right,bottom\na,1,1,2,2\na,1,1,2,2\n",
    "object 1: labels": "x,y,label\n1,1,0.5\n",
    r"object 2: point \(1, 44\) lies outside": "x,y\n1,1\n1,44\n",
}


@pytest.mark.parametrize("message", [*WRONG_JSON, *WRONG_CSV])
def test_a_wrong_file_is_one_line_that_names_it(message: str, tmp_path: Path) -> None:
    Image.fromarray(np.full((10, 50), 255, np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "zero.png").touch()
    wrong = message in WRONG_JSON
    file = json_file(tmp_path, WRONG_JSON[message]) if wrong else csv_file(tmp_path, WRONG_CSV[message])
    with pytest.raises(RequestError, match=message) as found:
        read_prompts(file, SIZE)
    assert str(found.value).startswith(str(file))
    assert "\n" not in str(found.value)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    for name, content, message in (
        ("away.json", None, "away.json: no such file of prompts"),
        ("p.txt", b"x,y", "p.txt: prompts are read from a .json or .csv file"),
        ("p.json", b"{", "p.json: not a readable JSON file in UTF-8"),
        ("p.json", b"", "p.json: not a readable JSON file in UTF-8"),
        ("p.csv", b"x,y\n\xff,1", "p.csv: not a readable CSV file in UTF-8"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read_prompts(tmp_path / name, SIZE)
