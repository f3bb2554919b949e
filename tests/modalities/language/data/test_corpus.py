"""Running text: every token predicted once, bytes accounted for, nothing of a test split, bad input in one line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modalities.language.data import GeneratedCorpus, TextCorpus
from modalities.language.data.corpus import shared_out
from shared.errors import RequestError


def write(folder, count=40):
    (folder / "a").mkdir()
    (folder / "a" / "one.txt").write_text("\n\n".join(f"document {i} says ça {i * i}" for i in range(count)))
    (folder / "two.txt").write_text("another file, of one document")
    (folder / "other.md").write_text("not read")
    return folder


def corpus(folder, **more) -> TextCorpus:
    return TextCorpus(**{"files": [folder], "tokenizer": "bytes", "length": 16, "batch_size": 4, **more})


def test_every_token_is_predicted_once_and_every_byte_counted(tmp_path):
    data = corpus(write(tmp_path), validation=0.2, test=0.2)
    for part in ("train", "validation", "test"):
        ids, _ = data.streams[part]
        batches = list(getattr(data, part)())
        assert sum(int(batch["mask"][:, 1:].sum()) for batch in batches) == len(ids) - 1
        assert sum(int(b["bytes"].sum()) for b in batches) == sum(len(text.encode()) for text in data.documents[part])
    targets = torch.cat([b["tokens"][:, 1:][b["mask"][:, 1:]] for b in data.test()])
    assert torch.equal(targets, data.streams["test"][0][1:])
    assert data.tokens.decode(data.streams["test"][0].tolist()) == "".join(data.documents["test"])


def test_documents_are_of_all_text_files_and_in_one_split_each(tmp_path):
    data = corpus(write(tmp_path), validation=0.2, test=0.2)
    whole = [text for part in data.documents.values() for text in part]
    assert len(whole) == len(set(whole)) == 41
    assert "another file, of one document" in whole
    assert corpus(tmp_path, validation=0.2, test=0.2).documents == data.documents
    assert corpus(tmp_path, validation=0.2, test=0.2, seed=1).documents != data.documents
    splits = data.describe()["splits"]
    assert 0.15 < splits["test"]["bytes"] / sum(split["bytes"] for split in splits.values()) < 0.3


def test_labelled_texts_come_without_labels_and_never_those_of_a_test_split(tmp_path):
    from modalities.language.data import TextFiles

    write(tmp_path)
    rows = [f"{i % 2} sentence {i}" for i in range(50)]
    (tmp_path / "x.all").write_text("\n".join(rows))
    unseen = {s.text for s in TextFiles(train=tmp_path / "x.all", tokenizer="bytes").samples["test"]}
    (tmp_path / "two.txt").write_text("\n\n".join(["kept", *unseen]))
    data = corpus(tmp_path, labelled=[{"train": str(tmp_path / "x.all")}])
    whole = {text for part in data.documents.values() for text in part}
    assert len(unseen) == 10
    assert not unseen & whole
    assert {row[2:] for row in rows} - unseen < whole
    assert data.describe()["left_out"] == 10


def test_a_tokenizer_is_trained_on_the_training_documents(tmp_path):
    data = corpus(write(tmp_path), tokenizer=None, vocabulary=270)
    assert data.vocabulary == 270
    assert (
        data.describe()["tokenizer_sha256"]
        == corpus(tmp_path, tokenizer=None, vocabulary=270).describe()["tokenizer_sha256"]
    )
    assert len(data.streams["train"][0]) < len(corpus(tmp_path).streams["train"][0])


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=6, max_size=30), st.integers(0, 3))
def test_documents_are_shared_out_whole(texts, seed):
    try:
        parts = shared_out(texts, 0.2, 0.2, seed)
    except RequestError:
        return
    assert sorted(text for own in parts.values() for text in own) == sorted(texts)
    assert not set(parts["train"]) & (set(parts["test"]) | set(parts["validation"]))


def test_bad_input_is_one_line(tmp_path):
    folder = write(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.dat").write_text(" \n\n ")
    (tmp_path / "zero.dat").write_bytes(b"a\0b")
    (tmp_path / "latin.dat").write_bytes(b"fine\ncaf\xe9")
    (tmp_path / "short.dat").write_text("one\n\ntwo")
    for more, message in [
        ({"files": [tmp_path / "nowhere"]}, "no such file or folder"),
        ({"files": [tmp_path / "empty"]}, "holds no .txt file"),
        ({"files": [tmp_path / "blank.dat"]}, "it holds no text"),
        ({"files": [tmp_path / "zero.dat"]}, "a zero byte"),
        ({"files": [tmp_path / "latin.dat"]}, "line 2: byte 0xe9 is no utf-8"),
        ({"files": [tmp_path / "short.dat"]}, "2 documents in all are too few"),
        ({"files": []}, "there is no text"),
        ({"labelled": [{"trian": "x"}]}, "are not the arguments of TextFiles"),
        ({"validation": 0.6, "test": 0.5}, "together below 1"),
        ({"length": 0}, "length 0"),
    ]:
        with pytest.raises(RequestError) as caught:
            corpus(folder, **more)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_generated_corpus_is_repeatable():
    first, second = (GeneratedCorpus(count=200, tokenizer="bytes", seed=2) for _ in range(2))
    assert first.describe() == second.describe()
    assert first.describe()["splits"]["test"]["documents"] >= 1
