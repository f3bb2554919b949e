"""The page's parts: escaped text, honest blanks, charts in the page's colours, pictures that say what was seen."""

from __future__ import annotations

import base64
import csv
import io

import numpy as np
import pytest
from PIL import Image

from shared.report import page, plots, run_page

EVIL = "<script>alert('x')</script>&\"'"


@pytest.mark.parametrize(
    "part",
    [
        page.section(EVIL), page.lead(EVIL), page.note(EVIL), page.code(EVIL), page.table((EVIL,), [(EVIL,)]),
        page.bars({EVIL: 0.5}, {}), page.figures({EVIL: ""}), page.pictures(EVIL, {EVIL: EVIL}),
        page.legend({EVIL: EVIL}), page.links({EVIL: EVIL}), page.page(EVIL),
    ],
)  # fmt: skip
def test_text_is_escaped(part):
    assert "<script" not in part
    assert "&lt;script" in part
    assert "\"'" not in part


def test_bars_are_as_wide_as_their_share_and_blank_where_nothing_is_known():
    text = page.bars({"a": 0.25, "b": None, "c": 1.7, "d": -1.0}, {"a": 1200, "b": 0})
    assert [w.split('"')[0] for w in text.split("width:")[1:]] == ["25.0%", "0.0%", "100.0%", "0.0%"]
    assert ">0.250<" in text
    assert ">–<" in text
    assert "1,200 px" in text
    assert "0 px" in text


def test_charts_take_the_page_s_ink_and_hold_every_point():
    svg = plots.curves({"train": ([0, 1, 2], [3.0, 2.0, 1.0]), "validation": ([2], [1.5])}, "step")
    assert svg.startswith("<svg")
    assert plots.INK not in svg
    assert "currentColor" in svg
    for text in (">train<", ">validation<", ">step<"):
        assert text in svg
    assert plots.COLOURS[0] in svg
    assert plots.COLOURS[1] in svg
    assert svg == plots.curves({"train": ([0, 1, 2], [3.0, 2.0, 1.0]), "validation": ([2], [1.5])}, "step")


def test_scatter_names_its_points():
    svg = plots.scatter({"LoRA": (1000, 0.5, 0.0), "Full": (2_000_000, 0.7, 0.05)}, "parameters", "mIoU")
    for text in (">LoRA<", ">Full<", ">parameters<", ">mIoU<"):
        assert text in svg


def test_a_picture_comes_back_pixel_for_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    kind, data = plots.png(pixels[:, ::-1]).split(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == pixels[:, ::-1]).all()


def test_masks_are_painted_in_the_colours_of_the_legend():
    colours = plots.class_colours(["clear", "cloud"])
    painted = plots.paint(np.array([[0, 1, 255]]), list(colours.values()), 255)
    assert ["#" + bytes(pixel).hex() for pixel in painted[0]] == [*colours.values(), "#000000"]
    assert len(set(plots.class_colours([str(i) for i in range(40)]).values())) == 40


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (83_096, "83.1 KB"),
        (2.5e6, "2.5 MB"),
        (7.2e12, "7200.00 GB"),
    ],
)
def test_sizes(count, text):
    assert run_page.size(count) == text


def test_numbers_and_names_read_as_people_write_them():
    assert [run_page.number(v) for v in (None, 1234, 0.5)] == ["–", "1,234", "0.5000"]
    assert run_page.spelled("iou/thin cloud") == "IoU thin cloud"
    assert run_page.score_rows({"miou": 0.5, "iou/a": 1.0, "confusion": [[1]], "oa": None}) == [
        ("mIoU", "0.5000"), ("overall accuracy", "–"),
    ]  # fmt: skip
    assert run_page.grouped({"miou": 1.0, "iou/a": 0.5, "iou/b": None}) == {"iou": {"a": 0.5, "b": None}}


def test_curves_are_read_from_the_metrics_file(tmp_path):
    rows = [
        {"step": 0, "epoch": 0, "train/loss": 3, "learning_rate": 0.1},
        {"step": 1, "epoch": 0, "validation/loss": 2, "validation/iou/cloud": 0.5, "validation/support/cloud": 9},
        {"step": 1, "epoch": 0, "test/loss": 1},
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    assert list(run_page._curves(tmp_path / "metrics.csv")) == ["loss", "IoU", "learning rate"]
