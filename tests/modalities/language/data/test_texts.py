"""Labelled texts: formats, splits, batches, few-shot, and every kind of bad input in one line."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modalities.language.data import GeneratedText, TextFiles
from modalities.language.data.grammar import TOPICS
from modalities.language.data.splits import few, stratified
from shared.errors import RequestError

ROWS = [(f"text number {i}, {'good' if i % 3 else 'bad'}", "pos" if i % 3 else "neg") for i in range(30)]


def write(path, rows=ROWS):
    if path.suffix in (".csv", ".tsv"):
        comma = "," if path.suffix == ".csv" else "\t"
        lines = [f"label{comma}text", *(f'{label}{comma}"{text}"' for text, label in rows)]
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    else:
        lines = [f"{label} {text}" for text, label in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def files(path, **more) -> TextFiles:
    return TextFiles(train=path, tokenizer="bytes", **more)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.all", "x.txt"])
def test_every_format_gives_the_same_samples(name, tmp_path):
    data = files(write(tmp_path / name))
    assert data.classes == ("neg", "pos")
    found = {(s.text, data.classes[s.label]) for part in data.samples.values() for s in part}
    assert found == set(ROWS)
    assert [len(data.samples[part]) for part in ("train", "validation", "test")] == [21, 3, 6]


def test_a_batch_is_padded_to_its_longest_text(tmp_path):
    data = files(write(tmp_path / "x.csv"), batch_size=4)
    batch = next(iter(data.validation()))
    lengths = [2 + len(text.encode()) for text in batch["text"]]
    assert batch["tokens"].shape == batch["mask"].shape == (3, max(lengths))
    assert batch["mask"].sum(1).tolist() == lengths
    assert batch["mask"].dtype == torch.bool
    assert (batch["tokens"][~batch["mask"]] == 0).all()
    assert data.tokens.decode(batch["tokens"][0].tolist()) == batch["text"][0]
    assert batch["label"].tolist() == [s.label for s in data.samples["validation"]]


def test_long_texts_are_cut_and_counted(tmp_path):
    data = files(write(tmp_path / "x.csv"), max_length=10)
    assert next(iter(data.test()))["tokens"].shape[1] == 10
    assert data.describe()["splits"]["test"]["truncated"] == 6


def test_given_files_make_the_splits_and_columns_may_have_other_names(tmp_path):
    (tmp_path / "a.csv").write_text("kind,body\n1,first\n0,second\n1,third\n")
    test = tmp_path / "b.csv"
    test.write_text('kind,body\n0,"a text,\nof two lines"\n')
    data = files(tmp_path / "a.csv", test=test, validation=test, text="body", label="kind", class_names=["no", "yes"])
    assert data.classes == ("no", "yes")
    assert [s.text for s in data.samples["test"]] == ["a text,\nof two lines"]
    assert [s.label for s in data.samples["train"]] == [1, 0, 1]


def test_the_drawn_test_split_depends_on_split_seed_alone(tmp_path):
    path = write(tmp_path / "x.csv")
    tests = [files(path, seed=seed, per_class=3).samples["test"] for seed in (0, 1)]
    assert tests[0] == tests[1] != files(path, split_seed=1).samples["test"]


def test_few_shot_draws_so_many_of_each_class(tmp_path):
    path = write(tmp_path / "x.csv")
    first, second = (files(path, per_class=4, seed=seed) for seed in (0, 1))
    for data in (first, second):
        assert torch.tensor([s.label for s in data.samples["train"]]).bincount().tolist() == [4, 4]
    assert first.samples["train"] != second.samples["train"]
    assert set(first.samples["train"]) <= set(files(path).samples["train"])
    with pytest.raises(RequestError, match="class 'neg' has only 7 texts"):
        files(path, per_class=8)


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("xy")), min_size=20, max_size=60),
    st.floats(0.05, 0.6), st.integers(0, 5),
)  # fmt: skip
def test_a_split_divides_the_texts_and_never_equal_ones(pairs, share, seed):
    texts, labels = (list(column) for column in zip(*pairs, strict=True))
    try:
        stay, drawn = stratified(texts, labels, share, seed)
    except RequestError:
        return
    assert sorted(stay + drawn) == list(range(len(texts)))
    assert not {texts[i] for i in stay} & {texts[i] for i in drawn}
    assert (stay, drawn) == stratified(texts, labels, share, seed)


def test_a_split_shares_out_every_class():
    labels = ["a"] * 80 + ["b"] * 20
    stay, drawn = stratified([str(i) for i in range(100)], labels, 0.25, 0)
    assert sum(labels[i] == "b" for i in drawn) == 5
    assert len(drawn) == 25
    assert stratified([str(i) for i in range(4)], ["a"] * 4, 0, 0) == ([0, 1, 2, 3], [])
    assert len(few([0, 0, 1, 1, 1], 2, 0, ("a", "b"))) == 4
    assert len(stay) == 75


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "no column 'text'; it has none"),
        ("x.all", b"", "it holds no text"),
        ("x.csv", b"text,label\n", "it holds no text"),
        ("x.csv", b"text,kind\na,b\n", "no column 'label'; it has text, kind"),
        ("x.csv", b"text,label\na,x\nb\n", "line 3: not the 2 fields"),
        ("x.csv", b"text,label\na,x\nb,y,z\n", "line 3: not the 2 fields"),
        ("x.csv", b'text,label\n"a,x\n', "line 1: unexpected end of data"),
        ("x.csv", b"text,label\na,x\n  ,y\n", "x.csv:3: the text is empty"),
        ("x.csv", b"text,label\na,x\nb,NaN\n", "x.csv:3: the label is 'NaN'"),
        ("x.csv", b"text,label\na,x\nb,\n", "x.csv:3: the label is 'missing'"),
        ("x.csv", b"text,label\na,x\nb,x\n", "every label is 'x'"),
        ("x.all", b"0 caf\xe9\n1 b\n", "line 1: byte 0xe9 is no utf-8 text; give encoding=latin-1"),
        ("x.all", b"0 fine\n1\n", "x.all:2: the text is empty"),
        ("x.all", b"0 a\0b\n1 c\n", "x.all:1: a zero byte"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": 1', "line 2: no JSON"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n[1]\n', "line 2: wants an object with a text"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "label": NaN}\n', "line 2: nan is no label"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": "b"}\n', "x.jsonl:2: the label is 'missing'"),
        ("x.all", b"0 a\n1 b\n1 c\n1 d\n", "class '0' has 1 different texts"),
        ("x.all", b"0 " + b"a" * 1_000_001 + b"\n", "a text of 1,000,001 characters"),
    ],
)
def test_bad_files_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        files(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "x." in str(caught.value) or "class" in str(caught.value)


def test_bad_settings_are_one_line(tmp_path):
    path, other = write(tmp_path / "x.csv"), write(tmp_path / "y.csv", [("a", "pos"), ("b", "ne")])
    for more, message in [
        ({"test": other}, "y.csv:3: label 'ne' is none of the classes neg, pos; nearest: 'neg'"),
        ({"train": tmp_path / "z.csv"}, "z.csv: no such file"),
        ({"validation": 0.0}, "the validation split has no text"),
        ({"test": 1.0}, "use a fraction from 0 to below 1"),
        ({"class_names": ["a"]}, "1 names for the 2 labels neg, pos"),
        ({"classes": ["neg", "pos", "new"]}, "class 'new' has no text to train on"),
        ({"encoding": "utf-9"}, "no encoding that Python knows"),
        ({"max_length": 0}, "max_length 0"),
        ({"per_class": 0}, "per_class 0"),
    ]:
        with pytest.raises(RequestError) as caught:
            TextFiles(**{"train": path, "tokenizer": "bytes", **more})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_generated_sentences_are_repeatable_and_their_words_tell_the_topic():
    data = GeneratedText(count=400, tokenizer="bytes", seed=3)
    again = GeneratedText(count=400, tokenizer="bytes", seed=3)
    assert data.samples == again.samples
    assert data.samples != GeneratedText(count=400, tokenizer="bytes", seed=4).samples
    assert data.classes == GeneratedText.classes == tuple(TOPICS)
    own = [{word for kind in topic.values() for word in kind} for topic in TOPICS.values()]
    samples = [s for part in data.samples.values() for s in part]
    votes = [[len(set(s.text.split()) & words) for words in own] for s in samples]
    right = sum(max(range(4), key=vote.__getitem__) == s.label for vote, s in zip(votes, samples, strict=True))
    assert 0.7 < right / len(samples) < 0.97  # by the words alone, and never for sure


@pytest.mark.parametrize("more", [{"count": 0}, {"count": 4}, {"validation": 0.0}, {"test": 0.9}])
def test_too_few_sentences_are_refused(more):
    with pytest.raises(RequestError):
        GeneratedText(**{"tokenizer": "bytes", **more})


def test_the_shared_sets_are_read(materials):
    folder = materials / "data" / "text_classification"
    trec = files(folder / "TREC.train.all", encoding="latin-1")
    assert [len(trec.samples[part]) for part in ("train", "validation", "test")] == [3817, 546, 1089]
    sst = files(folder / "stsa.binary.train", test=folder / "stsa.binary.dev", class_names=["negative", "positive"])
    assert len(sst.samples["test"]) == 872
    with pytest.raises(RequestError, match=r"TREC\.train\.all: line \d+: byte 0xf0 is no utf-8"):
        files(folder / "TREC.train.all")
