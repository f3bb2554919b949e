"""The tasks of text: metrics against those worked out by hand, training that learns, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modalities.language.backbones import SmallLM, TransformersText
from modalities.language.classification import TextClassification, measure
from modalities.language.data import GeneratedCorpus, GeneratedText
from modalities.language.heads import TextHead
from modalities.language.modelling import LanguageModelling
from shared.adapted import adapt
from shared.errors import RequestError, WorkError
from shared.methods import Full, LoRA, Probe
from shared.training.engine import Engine, fit
from shared.training.optimiser import Optimiser

SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def classifier(method=None, data=None, **more):
    data = data or GeneratedText(count=160, tokenizer="bytes", batch_size=16)
    backbone = TransformersText(name="llama", weights="random", config=SMALL, **more)
    model = adapt(backbone, method or LoRA(rank=2), head=TextHead(backbone.channels, len(data.classes)))
    return TextClassification(model, data, Optimiser(learning_rate=3e-3)), data


def modeller(method=None, **more):
    data = GeneratedCorpus(count=200, tokenizer="bytes")
    backbone = TransformersText(name="llama", weights="random", config=SMALL, lm_head=True, **more)
    return LanguageModelling(adapt(backbone, method or LoRA(rank=2)), data, Optimiser(learning_rate=3e-3)), data


def test_a_confusion_matrix_is_measured():
    found = measure(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1/a"] == pytest.approx(6 / 9)
    assert found["f1/b"] == pytest.approx(8 / 11)
    assert found["f1/c"] is None
    assert found["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert found["recall/c"] is None
    assert [found[f"support/{name}"] for name in "abc"] == [4, 6, 0]
    assert measure(torch.zeros(2, 2), ("a", "b"))["accuracy"] is None


def test_classification_measures_what_the_model_says():
    task, data = classifier()
    task.eval()
    said, truth, loss = [], [], 0.0
    with torch.no_grad():
        for batch in data.test():
            task.evaluate(batch)
            logits = task.model(batch["tokens"], batch["mask"])
            said.append(logits.argmax(1))
            truth.append(batch["label"])
            loss += F.cross_entropy(logits, batch["label"], reduction="sum").item()
    found, said, truth = task.results(), torch.cat(said), torch.cat(truth)
    assert found["accuracy"] == pytest.approx((said == truth).float().mean().item())
    assert found["loss"] == pytest.approx(loss / len(truth), rel=1e-5)
    assert sum(map(sum, found["confusion"])) == len(truth) == 32


def test_the_loss_is_the_criterion_of_the_outputs():
    for task, data in (classifier(), modeller()):
        batch = next(iter(data.test()))
        assert torch.equal(task.loss(batch), task.criterion(task.outputs(batch), batch))


def test_language_modelling_measures_every_token_once():
    task, data = modeller()
    task.eval()
    with torch.no_grad():
        for batch in data.test():
            task.evaluate(batch)
        ids, sizes = data.streams["test"]
        nats = 0.0
        for start in range(0, len(ids) - 1, data.length):
            window = ids[start : start + data.length + 1][None]
            backbone = task.model.backbone
            logits = backbone.logits(backbone(window).states)[0, :-1]
            nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    found = task.results()
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / int(sizes.sum()), rel=1e-5)


def test_training_a_language_model_leaves_its_frozen_head_as_it_was_and_lowers_the_loss(tmp_path):
    task, data = modeller()
    before = {n: t.clone() for n, t in task.model.backbone.state_dict().items()}
    with torch.no_grad():
        for batch in data.test():
            task.evaluate(batch)
    start = task.results()["loss"]
    found = fit(task, data, Engine(epochs=2, device="cpu"), tmp_path)
    assert found["test"]["loss"] < start - 0.05
    assert all(torch.equal(before[n], t) for n, t in task.model.backbone.state_dict().items())


def test_full_training_moves_the_head_too_and_learns_the_letters(tmp_path):
    task, data = modeller(Full())
    found = fit(task, data, Engine(epochs=2, device="cpu", precision="bf16-mixed"), tmp_path)
    assert "backbone.lm_head.weight" in task.model.trainable()
    assert found["test"]["bits_per_byte"] < 5.0  # 8 where nothing is known


def test_lora_on_the_packaged_model_learns_topics(tmp_path):
    data, backbone = GeneratedText(count=500, batch_size=8), SmallLM()
    model = adapt(backbone, LoRA(rank=4), head=TextHead(backbone.channels, 4))
    task = TextClassification(model, data, Optimiser(learning_rate=1e-2))
    found = fit(task, data, Engine(epochs=3, device="cpu"), tmp_path)
    assert found["test"]["accuracy"] > 0.55  # chance 0.25


def test_scores_that_are_not_finite_name_their_samples():
    task, data = classifier(Probe())
    nn.init.constant_(task.head.classify.bias, float("nan"))
    with pytest.raises(WorkError, match="not finite on samples sentence "):
        task.evaluate(next(iter(data.test())))


def test_parts_that_do_not_fit_are_one_line():
    data = GeneratedText(count=160, tokenizer="bytes")
    backbone = TransformersText(name="llama", weights="random", config=SMALL | {"vocab_size": 100})
    wrong = adapt(backbone, Probe(), head=TextHead(backbone.channels, 4))
    for make, message in [
        (lambda: TextClassification(wrong, data, Optimiser()), "has 260 tokens, llama knows 100"),
        (lambda: TextClassification(wrong, SimpleNamespace(classes="ab"), Optimiser()), "4 classes, the data 2"),
        (lambda: classifier(data=GeneratedText(count=160, tokenizer="bytes", max_length=129)), "llama takes 128"),
        (lambda: TextClassification(adapt(nn.Linear(2, 2), Probe()), data, Optimiser()), "needs a head"),
        (lambda: LanguageModelling(classifier()[0].model, data, Optimiser()), "backbone.lm_head=true"),
    ]:
        with pytest.raises(RequestError) as caught:
            make()
        assert message in str(caught.value)
    bert = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    masked = TransformersText(name="bert", weights="random", config=bert, lm_head=True)
    with pytest.raises(RequestError, match="is no causal model"):
        LanguageModelling(adapt(masked, Probe()), data, Optimiser())
