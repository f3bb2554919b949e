"""The linear probe on sentences: its floor, its protocol."""

from __future__ import annotations

import torch

from modalities.language import text_probe
from modalities.language.backbones import SmallLM
from modalities.language.data import GeneratedText
from modalities.language.data.texts import Sample
from shared.logistic import logistic_regression


def test_words_are_weighted_by_their_rarity():
    train = [Sample("a b", 0, ""), Sample("a b c", 0, ""), Sample("a", 0, "")]
    found = text_probe.words(train, [Sample("A b unknown", 0, ""), Sample("c", 0, "")])
    assert found.shape == (2, 2)  # c is in one text only
    rare, common = 1 + torch.log(torch.tensor(4 / 3)), torch.tensor(1.0)
    expected = torch.stack([common, rare]) / torch.stack([common, rare]).norm()
    assert torch.allclose(found[0].sort().values, expected.sort().values, atol=1e-6)
    assert found[1].tolist() == [0, 0]


def test_states_come_back_in_the_order_of_the_texts():
    data, backbone = GeneratedText(count=60), SmallLM()
    samples = data.samples["test"]
    together = text_probe.states(backbone, data, samples, "mean")
    alone = torch.cat([text_probe.states(backbone, data, [sample], "mean") for sample in samples[:4]])
    assert torch.allclose(together[:4], alone, atol=1e-5)


def test_the_probe_tells_what_can_be_told_and_nothing_else():
    labels = {part: torch.arange(n) % 2 for part, n in (("train", 100), ("validation", 40), ("test", 40))}
    told = {part: torch.randn(len(y), 3) + 4 * y[:, None] for part, y in labels.items()}
    noise = {part: torch.randn(len(y), 3) for part, y in labels.items()}
    assert text_probe.probe(told, labels, 0) > 0.95
    assert abs(text_probe.probe(noise, labels, 0) - 0.5) < 0.25


def test_a_regression_is_at_the_minimum_of_its_objective():
    features, labels = torch.randn(60, 3), torch.arange(60) % 3
    for standardise in (True, False):
        predict = logistic_regression(features, labels, 3, decay=0.1, standardise=standardise)
        assert predict(features).shape == (60,)
    shifted = logistic_regression(features * 100 + 7, labels, 3, decay=0.1)
    assert torch.equal(shifted(features * 100 + 7), logistic_regression(features, labels, 3, decay=0.1)(features))


def test_it_runs_on_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text_probe, "SETS", {"Own": {"train": "own.all"}})
    data = GeneratedText(count=120, tokenizer="bytes")
    rows = [f"{s.label} {s.text}" for part in data.samples.values() for s in part]
    (tmp_path / "own.all").write_text("\n".join(rows))
    assert text_probe.main([str(tmp_path), "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Own: train 8")
    accuracy = [float(line.split("+-")[0].split()[-1]) for line in lines[1:]]
    assert len(accuracy) == 3
    assert min(accuracy) > 0.3
    assert text_probe.main([str(tmp_path / "nowhere")]) == 2


def test_the_test_texts_are_none_the_model_was_trained_on(materials):
    """As the recipe of its pretraining has them left out."""
    from shared import recipe

    folder = materials / "data"
    chosen = recipe.load("language/pretrain", files=False)
    given = dict(chosen.sections["data"].arguments)
    given["files"] = [folder / "text_corpus"]
    given["labelled"] = [
        {k: str(folder.parent / v) if k in ("train", "test") else v for k, v in each.items()}
        for each in given["labelled"]
    ]
    corpus = chosen.sections["data"].entry.load()(**{**given, "tokenizer": "bytes"})
    seen = {text for part in corpus.documents.values() for text in part}
    for name in text_probe.SETS:
        test = text_probe.read(folder / "text_classification", name).samples["test"]
        assert len(test) > 800
        assert not seen & {sample.text for sample in test}
