"""The packaged language model: what its card says of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from modalities.language import export_weights, floors
from modalities.language.backbones import SmallLM
from modalities.language.backbones.small_lm import WEIGHTS
from modalities.language.data import GeneratedCorpus
from modalities.language.tokens import PACKAGED, Tokens
from shared import cli
from shared.errors import RequestError

PRAISE = "a moving and thoughtful film that is worth seeing ."


def nats(backbone: SmallLM, text: str) -> float:
    """Mean loss a token of a text."""
    ids = torch.tensor(Tokens("small_lm").encode([text]))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(backbone.logits(backbone(ids).states)[0, :-1], ids[0, 1:]).item()


def test_the_model_has_the_size_and_tokens_of_its_card():
    backbone, tokens = SmallLM(), Tokens("small_lm")
    assert sum(p.numel() for p in backbone.parameters()) == 2_557_632
    assert sum(p.numel() for p in SmallLM(lm_head=True).parameters()) == 2_557_632  # head and embedding are one
    assert tokens.size == backbone.vocabulary == 4096
    assert tokens.padding == backbone.config.pad_token_id == 0
    assert tokens.decode(tokens.encode([PRAISE])[0]) == PRAISE
    assert WEIGHTS.stat().st_size + PACKAGED.stat().st_size < 6_000_000
    assert (backbone.name, backbone.source) == ("small_lm", "packaged: small_lm.safetensors")
    with safe_open(WEIGHTS, "pt") as file:
        metrics = json.loads(file.metadata()["pretraining"])["metrics"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["perplexity"] < 61


def test_it_knows_its_language_better_than_random_weights_and_than_another_order():
    ours, random = SmallLM(lm_head=True), SmallLM(lm_head=True, weights="random")
    shuffled = " ".join(sorted(PRAISE.split()))
    assert nats(ours, PRAISE) < 5.5 < 8 < nats(random, PRAISE) < 9
    assert nats(ours, PRAISE) < nats(ours, shuffled) - 1


def test_a_run_is_exported_as_the_package_holds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ["run", "language/pretrain", "--tiny", "--output", "run", "trainer.device=cpu", "data.count=60"]
    assert cli.main([*recipe, "--debug"]) == 0
    capsys.readouterr()
    assert export_weights.main(["run", "out"]) == 0
    assert "5.12 MB" in capsys.readouterr().out
    ours = SmallLM(checkpoint="out/small_lm.safetensors", lm_head=True)
    from shared.store import read

    tensors, _ = read(tmp_path / "run" / "adapter.safetensors")
    for name, tensor in ours.state_dict().items():
        trained = tensors["backbone.model.embed_tokens.weight" if name == "lm_head.weight" else f"backbone.{name}"]
        assert torch.equal(tensor, trained.half().float())
    assert Tokens(str(tmp_path / "out" / "small_lm_tokenizer.json")).size == 260  # bytes, in the tiny run


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ["run", "language/quickstart_text", "--tiny", "--output", "run", "trainer.device=cpu"]
    assert cli.main([*recipe, "--debug"]) == 0
    capsys.readouterr()
    assert export_weights.main(["run", "out"]) == 2
    assert "export a run of the method Full" in capsys.readouterr().err


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        SmallLM(checkpoint=str(tmp_path / "x.safetensors"))
    with pytest.raises(RequestError, match="exclude each other"):
        SmallLM(weights="random", checkpoint="x.safetensors")


def test_floors_are_those_of_counting():
    """On a two-token world whose next token follows from the one before: the bigram knows, the unigram does not."""
    train = torch.tensor([0, 1] * 500)
    alone = floors.unigram(train, 2)
    assert torch.allclose(alone, torch.tensor([0.5, 0.5]))
    loss, share = floors.bigram(train, train[:100], train[:101], 2)
    assert share == pytest.approx(0.95)
    assert loss == pytest.approx(-math.log(0.95 + 0.05 * 0.5), rel=1e-5)


def test_floors_of_a_corpus_are_in_order(capsys):
    data = GeneratedCorpus(count=400, tokenizer="bytes")
    found = floors.floors(data)
    assert found["bigram"]["loss"] < found["unigram"]["loss"] < math.log(260)
    ids, sizes = data.streams["test"]
    expected = found["unigram"]["loss"] * (len(ids) - 1) / math.log(2) / int(sizes.sum())
    assert found["unigram"]["bits_per_byte"] == pytest.approx(expected)
    assert floors.main(["language/nothing"]) == 2
    assert "no recipe" in capsys.readouterr().err
