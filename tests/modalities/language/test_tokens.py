"""Tokenizers: what they give back, the bytes they account for, what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities.language.tokens import SPECIAL, Tokens, train
from shared.errors import RequestError

TEXTS = ["the cat sat on the mat", "a dog ate the hat", "Grüße, ça va? 猫"] * 5
BYTES = Tokens("bytes")
TRAINED = train(TEXTS, 280)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
@pytest.mark.parametrize("tokens", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_a_text_comes_back_and_its_bytes_sum_up(tokens, text):
    if any(name in text for name in SPECIAL):
        return
    ids, sizes = tokens.document(text)
    assert ids == tokens.encode([text])[0]
    assert tokens.decode(ids) == text
    assert sum(sizes) == len(text.encode())
    assert min(sizes) >= 0
    assert (ids[0], ids[-1]) == (1, 2)


def test_bytes_are_a_token_each():
    assert BYTES.size == 256 + 4
    assert len(BYTES.encode(["héllo"])[0]) == 2 + 6
    assert BYTES.padding == 0


def test_training_merges_what_is_frequent_and_is_repeatable():
    assert TRAINED.size == 280
    assert len(TRAINED.encode(["the cat"])[0]) < len(BYTES.encode(["the cat"])[0])
    assert train(TEXTS, 280).tokenizer.to_str() == TRAINED.tokenizer.to_str()


def test_a_tokenizer_is_saved_and_read_from_a_file_and_a_folder(tmp_path):
    TRAINED.save(tmp_path / "tokenizer.json")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokens(str(name))
        assert again.encode(TEXTS) == TRAINED.encode(TEXTS)
        assert again.size == 280


def test_long_texts_are_cut_and_keep_their_end():
    cut = BYTES.encode(["abcdefgh"], 5)[0]
    assert cut == [1, *BYTES.encode(["abc"])[0][1:-1], 2]
    assert len(BYTES.encode(["abcdefgh"])[0]) == 10  # the limit does not stay


def test_what_cannot_be_is_one_line(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for name in ("nowhere.json", str(tmp_path / "bad.json"), str(tmp_path)):
        with pytest.raises(RequestError) as caught:
            Tokens(name)
        assert "\n" not in str(caught.value)
        assert name.rpartition("/")[2] in str(caught.value)
    with pytest.raises(RequestError, match="adds 2 tokens"):
        BYTES.encode(["a"], 2)
    with pytest.raises(RequestError, match="at least 260"):
        train(TEXTS, 259)
