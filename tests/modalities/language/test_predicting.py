"""Prediction for files of texts: the command line, the table, everything that may be in the way."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from modalities.language.data.texts import padded
from modalities.language.predicting import targets
from modalities.language.tokens import Tokens
from shared import cli, run
from shared.errors import RequestError

TEXTS = ["the wet cloud covers the boat .", "why does the recipe stay salty ?", "a " + "very " * 200 + "long one"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    words = ["run", "language/quickstart_text", "--tiny", "--output", str(folder), "trainer.device=cpu", "--debug"]
    assert cli.main(words) == 0
    return folder


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_file_becomes_a_table_of_what_the_model_says(trained, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n\n".join(TEXTS) + "\n")
    assert cli.main(["predict", str(trained), str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.csv")]) == 0
    assert "out.csv: 3 texts: " in capsys.readouterr().out
    rows, model = table(tmp_path / "out.csv"), run.load(trained)
    assert [row["text"] for row in rows] == TEXTS
    classes, how = model.described["classes"], model.described["reading"]
    for row, text in zip(rows, TEXTS, strict=True):
        batch = padded(Tokens(how["tokenizer"]).encode([text], how["max_length"]), 0)
        expected = model.task.scores(batch["tokens"], batch["mask"])[0]
        assert [float(row[name]) for name in classes] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["label"] == classes[int(expected.argmax())]


def test_a_loaded_run_scores_as_it_was_tested(trained):
    from shared import recipe

    found, measured = run.load(trained), json.loads((trained / "metrics.json").read_text())["test"]
    with torch.no_grad():
        for batch in recipe.load(str(trained / "recipe.yaml")).build("data").test():
            found.task.evaluate(batch)
    again = found.task.results()
    assert again["confusion"] == measured["confusion"]
    assert again["loss"] == pytest.approx(measured["loss"], rel=1e-5)


def test_the_page_shows_classes_and_confusion(trained):
    page = (trained / "report.html").read_text()
    for text in ("F1 by class", "recall by class", "Confusion of classes (texts)", "macro-F1", "harbour"):
        assert text in page


def test_tables_and_folders_are_read_and_a_bad_file_does_not_stop_the_rest(trained, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.csv").write_text('id,text\n1,cold rain\n2,"fresh, sweet bread"\n')
    (tmp_path / "in" / "deep" / "b.jsonl").write_text('{"text": "a rusty crane"}\n')
    (tmp_path / "in" / "deep" / "c.txt").write_bytes(b"")
    (tmp_path / "in" / "d.md").write_text("not read")
    assert cli.main(["predict", str(trained), str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), len(err.splitlines())) == (2, 2)
    assert "c.txt: it holds no text" in err
    assert [row["text"] for row in table(tmp_path / "out" / "a.csv")] == ["cold rain", "fresh, sweet bread"]
    assert len(table(tmp_path / "out" / "deep" / "b.csv")) == 1
    assert not (tmp_path / "out" / "deep" / "c.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.txt", "-o", "out.csv"], "nowhere.txt: no such file"),
        (["a.txt", "-o", "there.csv"], "there.csv exists; add --overwrite"),
        (["a.txt", "-o", "a.txt"], "would overwrite an input"),
        (["a.txt", "b.txt", "-o", "out.csv"], "several files are written to a folder"),
        (["folder", "-o", "out"], "holds no file of texts"),
        (["a.txt", "-o", "out.csv", "--window", "8"], "--window is for rasters"),
        (["a.txt", "-o", "out.csv", "--as", "polygons"], "texts give classes and probabilities"),
    ],
)
def test_what_is_in_the_way_is_one_line_and_nothing_is_written(trained, tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "there.csv"):
        (tmp_path / name).write_text("some text\n")
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(["predict", str(trained), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwriting_is_asked_for(trained, tmp_path):
    (tmp_path / "in.txt").write_text("some text\n")
    (tmp_path / "out.csv").write_text("old")
    words = ["predict", str(trained), str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.csv"), "--overwrite"]
    assert cli.main(words) == 0
    assert len(table(tmp_path / "out.csv")) == 1


def test_two_files_that_would_become_one_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RequestError, match="would both become"):
        targets([tmp_path / "a.txt", tmp_path / "a.csv"], tmp_path / "out", False)
