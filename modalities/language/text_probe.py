"""The linear probe on sentences: how well a logistic regression on frozen states tells classes apart.

    python -m modalities.language.text_probe FOLDER [--weights FILE] [--seeds 3] [--pooling mean]

FOLDER holds TREC.train.all, stsa.binary.train, stsa.binary.dev and subj.part_shared.all. The test texts are those that
``TextFiles`` draws, and the development set of SST-2: no text that SmallLM was trained on. Each seed trains on another
nine tenths of the training texts (and draws other random weights, where these are probed); the weight decay is the best
on the validation texts. The table gives mean and standard deviation of the accuracy over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities.language.backbones import SmallLM, TransformersText
from modalities.language.data import TextFiles
from modalities.language.data.texts import Sample, padded
from modalities.language.heads import pool
from shared.errors import exit_status
from shared.logistic import logistic_regression

SETS: dict[str, dict[str, Any]] = {
    "TREC": {"train": "TREC.train.all", "encoding": "latin-1"},
    "SST-2": {"train": "stsa.binary.train", "test": "stsa.binary.dev"},
    "Subj": {"train": "subj.part_shared.all", "encoding": "latin-1"},
}
DECAYS = (0.003, 0.03, 0.3)  # of standardised states
WORD_DECAYS = (0.00003, 0.0001, 0.0003, 0.001)  # of rows of unit length
PARTS = ("train", "validation", "test")


def read(folder: Path, name: str) -> TextFiles:
    """One of ``SETS``."""
    files = {key: folder / value for key, value in SETS[name].items() if key in ("train", "test")}
    return TextFiles(**{**SETS[name], **files})


@torch.no_grad()
def states(backbone: TransformersText, data: TextFiles, samples: Sequence[Sample], pooling: str) -> Tensor:
    """Frozen, pooled states (N, C) of texts; batches hold texts of about one length."""
    rows = data.tokens.encode([sample.text for sample in samples], data.max_length)
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), torch.empty(len(rows), backbone.width)
    backbone.eval()
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = padded([rows[i] for i in chosen], data.tokens.padding)
        found[chosen] = pool(backbone(batch["tokens"], batch["mask"]), pooling).float()
    return found


def words(train: Sequence[Sample], samples: Sequence[Sample], least: int = 2) -> Tensor:
    """The floor: tf-idf (N, words) of the words that ``least`` training texts hold, each text of unit length."""
    seen = Counter(word for sample in train for word in set(sample.text.lower().split()))
    place = {word: i for i, word in enumerate(w for w, count in seen.items() if count >= least)}
    found = torch.zeros(len(samples), len(place))
    for row, sample in zip(found, samples, strict=True):
        for word, count in Counter(sample.text.lower().split()).items():
            if word in place:
                row[place[word]] = count * (1 + math.log((1 + len(train)) / (1 + seen[word])))
    return torch.nn.functional.normalize(found, dim=1)


def probe(features: dict[str, Tensor], labels: dict[str, Tensor], seed: int, sparse: bool = False) -> float:
    """Accuracy on the test part of a regression on nine tenths of the training part, drawn by the seed."""
    order = torch.randperm(len(labels["train"]), generator=torch.Generator().manual_seed(seed))
    drawn, classes = order[: round(0.9 * len(order))], int(labels["train"].max()) + 1
    known, scores = features["train"][drawn], []
    for decay in WORD_DECAYS if sparse else DECAYS:
        predict = logistic_regression(known, labels["train"][drawn], classes, decay, standardise=not sparse)
        scores.append([_accuracy(predict(features[part]), labels[part]) for part in ("validation", "test")])
    return max(scores, key=lambda pair: pair[0])[1]


def _accuracy(said: Tensor, truth: Tensor) -> float:
    return (said == truth).float().mean().item()


def measure(data: TextFiles, weights: str | None, pooling: str, seeds: int) -> dict[str, list[float]]:
    """Accuracies by features: the pretrained model, the same with random weights, and words."""
    labels = {part: torch.tensor([s.label for s in data.samples[part]]) for part in PARTS}
    found: dict[str, list[float]] = {}

    def add(name: str, features: dict[str, Tensor], seed: int, sparse: bool = False) -> None:
        found.setdefault(name, []).append(probe(features, labels, seed, sparse))

    ours = SmallLM(checkpoint=weights)
    mine = {part: states(ours, data, data.samples[part], pooling) for part in PARTS}
    bag = {part: words(data.samples["train"], data.samples[part]) for part in PARTS}
    for seed in range(seeds):
        random = SmallLM(weights="random", seed=seed)
        add(f"{ours.name}, {ours.source}", mine, seed)
        add("the same, random weights", {p: states(random, data, data.samples[p], pooling) for p in PARTS}, seed)
        add("tf-idf of words", bag, seed, sparse=True)
    return found


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modalities.language.text_probe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", help="other weights of SmallLM than the packaged ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pooling", choices=("mean", "first", "last"), default="mean")
    given = parser.parse_args(arguments)
    for name in SETS:
        data = read(given.folder, name)
        print(f"{name}: {', '.join(f'{part} {len(data.samples[part])}' for part in PARTS)} texts")
        for features, scores in measure(data, given.weights, given.pooling, given.seeds).items():
            values = torch.tensor(scores)
            print(f"  {features:50s} {values.mean():.3f} +- {values.std():.3f}")


if __name__ == "__main__":
    sys.exit(main())
