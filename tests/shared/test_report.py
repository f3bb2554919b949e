"""The page's parts: escaped text, honest blanks, charts in the page's colours, pictures that say what was seen."""

from __future__ import annotations

import base64
import csv
import io
import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from shared.report import page, plots, run_page, terminal

EVIL = "<script>alert('x')</script>&\"'"


@pytest.mark.parametrize(
    "part",
    [
        page.section(EVIL), page.lead(EVIL), page.note(EVIL), page.code(EVIL), page.table((EVIL,), [(EVIL,)]),
        page.bars({EVIL: 0.5}, {}), page.figures({EVIL: ""}), page.pictures(EVIL, {EVIL: EVIL}),
        page.legend({EVIL: EVIL}, EVIL), page.links({EVIL: EVIL}), page.page(EVIL),
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


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Texts of a chart as (left, top, right, bottom), about as wide as a browser draws them."""
    found = {}
    for style, x, y, text in re.findall(r'<text style="([^"]*)" x="([-.0-9]+)" y="([-.0-9]+)"[^>]*>([^<]*)<', svg):
        size = float(re.search(r"font-size: ([.0-9]+)px|font: ([.0-9]+)px", style).group(1))
        wide = 0.6 * size * len(text)
        anchor = re.search(r"text-anchor: (\w+)", style)
        share = {"middle": 0.5, "end": 1.0}.get(anchor.group(1) if anchor else "", 0.0)
        left = float(x) - share * wide
        found[text] = (left, float(y) - 0.75 * size, left + wide, float(y) + 0.1 * size)
    return found


def apart(a, b) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_scatter_names_its_points():
    svg = plots.scatter({"LoRA": (1000, 0.5, 0.0), "Full": (2_000_000, 0.7, 0.05)}, "parameters", "mIoU")
    for text in (">LoRA<", ">Full<", ">parameters<", ">mIoU<", ">1k<", ">1M<"):
        assert text in svg


def test_names_of_a_scatter_cover_neither_each_other_nor_leave_the_chart():
    crowd = {f"Method{i}": (20_000 + 300 * i, 0.5 + 0.002 * (i % 3), 0.01) for i in range(9)}
    svg = plots.scatter({**crowd, "Full": (9_000_000, 0.6, 0.0)}, "parameters", "mIoU")
    found = boxes(svg)
    names = [name for name in found if name.startswith(("Method", "Full"))]
    assert len(names) == 10
    assert all(apart(found[a], found[b]) for a, b in combinations(names, 2))
    left, top, width, height = map(float, re.search(r'viewBox="([^"]*)"', svg).group(1).split())
    for name in names:
        assert left <= found[name][0] < found[name][2] <= left + width
        assert top <= found[name][1] < found[name][3] <= top + height
    alike = boxes(plots.scatter({"a": (100, 0.5, 0.0), "b": (100, 0.5, 0.0)}, "parameters", "mIoU"))
    assert apart(alike["a"], alike["b"])


def test_axis_labels_are_not_cut():
    steps, values = [6, 13, 20, 27, 34, 41], [0.463, 0.50, 0.555, 0.568, 0.575, 0.574]
    svg = plots.curves({"validation": (steps, values)}, "step")
    left = float(re.search(r'viewBox="([-.0-9]+) ', svg).group(1))
    assert {"0.475", "0.575"} <= boxes(svg).keys()
    assert all(box[0] >= left - 2 for box in boxes(svg).values())


def test_a_confusion_picture_tells_shares_counts_and_classes():
    svg = plots.confusion([[90, 10], [0, 0]], ["clear", "cloud"])
    for text in (">clear<", ">cloud<", ">truth<", ">prediction<", ">90%<", ">10%<", ">90<", ">10<", ">0%<"):
        assert text in svg
    many = plots.confusion(np.eye(40, dtype=int).tolist(), [f"class {i}" for i in range(40)])
    assert ">class 39<" in many
    assert "%<" not in many
    assert len(many) < 100_000


@pytest.mark.parametrize(
    ("data", "test", "names"),
    [
        ({"classes": ["a", "b"]}, {}, ["a", "b"]),
        ({}, {"support/x": 3, "support/y": None}, ["x", "y"]),
        ({"classes": ["a"]}, {"accuracy": 0.5}, ["0", "1"]),
    ],
)
def test_any_task_with_a_confusion_matrix_gets_its_picture(data, test, names):
    found = {"data": data, "test": {"confusion": [[5, 1], [2, 0]], "unit": "texts", **test}}
    assert run_page.class_names(found) == names
    text = "".join(run_page._confusions(found))
    assert text.count("<svg") == 1
    assert "Confusion of classes (texts)" in text
    assert f"<td>{names[1]} as {names[0]}</td>" in text
    assert ">100.0%<" in text
    assert "".join(run_page._confusions({"data": data, "test": {"loss": 1.0}})) == ""


def test_the_largest_errors_come_first():
    found = run_page.confusions([[10, 3, 0], [4, 0, 0], [1, 1, 8]], ["a", "b", "c"], most=3)
    assert found == [("b as a", "4", "100.0%"), ("a as b", "3", "23.1%"), ("c as a", "1", "10.0%")]


def cost(**changed):
    return {
        "parameters": {"trainable": 1500, "frozen": 8500, "adapter": 1000, "head": 500},
        "cost": {"step_seconds": 0.02, "wait_share": 0.0712, "train_seconds": 200.0, "peak_memory_bytes": 2e9},
        "predicted": {"trainable": 1500, "step_seconds": 0.0184, "train_seconds": 190.0, "peak_memory_bytes": 1.9e9},
        "file_bytes": 6000, "steps": 10, "epochs": 2, **changed,
    }  # fmt: skip


def test_costs_stand_beside_what_was_predicted():
    assert run_page.cost_rows(cost())[:6] == [
        ("trainable parameters", "1,500", "1,500"), ("time of a step", "18.4 ms", "20.0 ms"),
        ("waiting for data", "–", "7.1%"),
        ("time of training", "3.2 min", "3.3 min"), ("peak memory", "1.90 GB", "2.00 GB"),
        ("share of all parameters", "", "15.00%"),
    ]  # fmt: skip
    for without in (cost(predicted=None), {k: v for k, v in cost().items() if k != "predicted"}):
        assert [row[1] for row in run_page.cost_rows(without)[:5]] == ["–"] * 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0042, "4.2 ms"), (0.25, "250 ms"), (12.0, "12.0 s"), (300.0, "5.0 min"), (9000.0, "2 h 30 min")],
)
def test_times(value, text):
    assert run_page.milliseconds(value) == text


def test_tables_fit_the_width(capsys):
    heads = ["method", *(f"measure {i}" for i in range(9))]
    rows = [[f"Method{r}", *(f"0.{r}{c}5 ± 0.001" for c in range(9))] for r in range(3)]
    terminal.print_table(heads, rows, title="a title")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("method" in line for line in lines) == 3
    assert sum("Method1" in line for line in lines) == 3
    assert sum("a title" in line for line in lines) == 1
    whole = "\n".join(lines)
    assert all(cell in whole for row in rows for cell in row)
    assert "…" not in whole


def test_heads_break_before_names_and_numbers_do(capsys):
    heads = ["method", "overall accuracy", "trainable", "training", "step", "peak memory", "file"]
    row = ["CloudAdapter", "0.065 ± 0.008", "2,840,516", "1,200 s", "146 ms", "915.7 MB", "410.6 KB"]
    terminal.print_table(heads, [row])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if "CloudAdapter" in line] == [" ".join(row).split()]


def test_the_terminal_tells_what_the_page_does(capsys):
    test = {"accuracy": 0.75, "f1/a": 0.8, "f1/b": None, "recall/a": 1.0, "recall/b": 0.25, "support/a": 6}
    test |= {"support/b": 2, "confusion": [[5, 1], [2, 0]], "unit": "texts"}
    terminal.print_run({"test": test, "data": {"classes": ["a", "b"]}, **cost()})
    words = " ".join(capsys.readouterr().out.split())
    told = "accuracy 0.7500", "class F1 recall texts", "a 0.8000 1.0000 6", "b – 0.2500 2", "a 5 1"
    for text in (*told, "truth \\ predicted a b", "cost predicted measured", "time of a step 18.4 ms 20.0 ms"):
        assert text in words


def test_rows_of_wide_tables_name_their_cells_for_phones():
    wide = page.table(("method", "a", "b", "c"), [("LoRA", "1", "2", "3")])
    assert '<table class="wide">' in wide
    assert '<td class="number" data-head="c">3</td>' in wide
    assert '<table class="facts">' in page.table(("", "predicted", "measured"), [("x", "1", "2")])


def test_a_picture_comes_back_pixel_for_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    kind, data = plots.png(pixels[:, ::-1]).split(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == pixels[:, ::-1]).all()


def test_masks_are_painted_in_the_colours_of_the_legend():
    colours = plots.class_colours(["clear", "cloud"])
    painted = plots.paint(np.array([[0, 1, 255]]), list(colours.values()), 255)
    assert ["#" + bytes(pixel).hex() for pixel in painted[0]] == [*colours.values(), "#000000"]
    errors = plots.mistakes(np.array([[0, 1, 255]]), np.array([[0, 0, 1]]), 255)
    assert ["#" + bytes(pixel).hex() for pixel in errors[0]] == [plots.RIGHT, plots.WRONG, "#000000"]
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
        {"step": 1, "epoch": 0, "train/loss": 2.5, "learning_rate": 0.05},
        {"step": 1, "epoch": 0, "validation/loss": 2, "validation/iou/cloud": 0.5, "validation/support/cloud": 9},
        {"step": 1, "epoch": 0, "test/loss": 1},
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    measured = run_page._measured(tmp_path / "metrics.csv")
    assert list(measured) == ["loss", "iou", "learning_rate"]
    assert measured["loss"] == {"train": ([0, 1], [3.0, 2.5]), "validation": ([1], [2.0])}
    figures, table = run_page._training(tmp_path / "metrics.csv")
    assert figures.count("<svg") == 2  # loss and learning rate
    assert "<td>IoU cloud</td>" in table
    assert "0.5000" in table
    assert "loss" not in table
