"""Several tasks: batches of one task, shares of an epoch, an order that can be had again, refusals."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modalities.language.data import GeneratedForms, GeneratedText, SeveralTasks
from modalities.language.data.corpus import GeneratedCorpus
from modalities.language.data.grammar import FORMS, TOPICS
from shared.errors import RequestError
from shared.training.order import TaskBatches, shares


def several(**more) -> SeveralTasks:
    topic = GeneratedText(count=100, batch_size=8, tokenizer="bytes")
    return SeveralTasks(
        tasks={"topic": topic, "form": GeneratedForms(count=50, batch_size=4, tokenizer="bytes")}, **more
    )


def test_a_batch_is_of_one_task_and_an_epoch_holds_every_text_once():
    data = several()
    for loader, part in ((data.train(), "train"), (data.validation(), "validation"), (data.test(), "test")):
        batches = list(loader)
        sizes = {name: len(own.samples[part]) for name, own in data.tasks.items()}
        assert len(loader) == len(batches) == -(-sizes["topic"] // 8) + -(-sizes["form"] // 4)
        for name, own in data.tasks.items():
            mine = [batch for batch in batches if batch["task"] == name]
            said = Counter((t, int(y)) for b in mine for t, y in zip(b["text"], b["label"], strict=True))
            assert said == Counter((s.text, s.label) for s in own.samples[part])
            assert {len(batch["name"]) for batch in mine[:-1]} <= {own.batch_size, sizes[name] % own.batch_size}
    order = [batch["task"] for batch in data.train()]
    assert order != sorted(order) != order[::-1]


def test_the_forms_are_those_of_the_same_sentences():
    topics, forms = GeneratedText(count=60), GeneratedForms(count=60)
    first = {s.name: s.text for part in topics.samples.values() for s in part}
    second = {s.name: s for part in forms.samples.values() for s in part}
    assert first == {name: sample.text for name, sample in second.items()}
    for sample in second.values():
        assert (sample.text.startswith("why")) == (forms.classes[sample.label] == "question")
    assert (topics.classes, forms.classes) == (tuple(TOPICS), tuple(FORMS))


def test_shares_of_an_epoch():
    assert shares([84, 5, 11], 1.0) == [84, 5, 11]
    assert shares([84, 5, 11], None) == [34, 33, 33]
    weights = [n**0.1 for n in (84, 5, 11)]  # Hyperformer's temperature of 10
    expected = [100 * w / sum(weights) for w in weights]
    assert all(abs(a - b) < 1 for a, b in zip(shares([84, 5, 11], 10.0), expected, strict=True))
    assert shares([1000, 1], 0.01) == [1000, 1]  # none is left out


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6), st.one_of(st.none(), st.floats(0.05, 1000, allow_nan=False))
)
def test_shares_are_whole_and_together_those_of_one_pass(batches, temperature):
    found = shares(batches, temperature)
    assert sum(found) == sum(batches)
    assert min(found) >= 1
    for a, b in zip(batches, found, strict=True):
        for c, d in zip(batches, found, strict=True):
            assert a >= c or b <= d + 1  # the larger never has fewer, but for rounding


def test_a_task_with_more_than_a_pass_is_shuffled_again():
    order = TaskBatches([40, 4], [4, 4], None, torch.Generator().manual_seed(0))
    batches = list(order)
    small = [batch for batch in batches if batch[0] >= 40]
    assert len(batches) == len(order) == 11
    assert [sorted(batch) for batch in small] == [[40, 41, 42, 43]] * 5
    assert len({tuple(batch) for batch in small}) > 1
    large = [index for batch in batches for index in batch if index < 40]
    assert len(set(large)) == len(large) == 24


def test_the_order_follows_from_the_generator():
    order = TaskBatches([40, 12], [4, 3], 3.0, torch.Generator().manual_seed(0))
    first = list(order)
    assert list(order) != first
    order.generator.manual_seed(0)
    assert list(order) == first


def test_tasks_that_alone_train_and_all_that_are_measured():
    data = several(only=["form"])
    assert {batch["task"] for batch in data.train()} == {"form"}
    assert {batch["task"] for batch in data.test()} == {"topic", "form"}


def test_it_describes_itself_by_task():
    found = several().describe()
    assert found["classes"] == {"topic": list(TOPICS), "form": list(FORMS)}
    assert found["reading"]["form"] == {"tokenizer": "bytes", "max_length": 64}
    assert found["splits"]["test"]["topic"]["texts"] == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeveralTasks(tasks={}), "data tasks"),
        (lambda: SeveralTasks(tasks={"a/b": GeneratedText()}), "tasks.a/b: use letters"),
        (lambda: SeveralTasks(tasks={"a": GeneratedCorpus(count=50)}), "tasks.a: GeneratedCorpus gives no texts with"),
        (
            lambda: SeveralTasks(tasks={"a": GeneratedText(), "b": GeneratedText(tokenizer="bytes")}),
            "tasks.b: tokenizer 'bytes', a has 'small_lm': use one",
        ),
        (lambda: several(only=["from"]), "only: 'from' is none of the tasks topic, form"),
        (lambda: several(temperature=0.0), "temperature 0.0: use a number above 0"),
    ],
)
def test_wrong_settings_are_one_line(make, message):
    with pytest.raises(RequestError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
