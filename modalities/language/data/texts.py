"""Texts: samples with a class each, tokenized, as the loaders a classification task is fed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from modalities.language.data.splits import Loaders, few
from modalities.language.tokens import Tokens
from shared.errors import RequestError

SPLITS = ("train", "validation", "test")


class Sample(NamedTuple):
    """text: as read.  label: index of its class.  name: where it stands ("reviews.csv:12")."""

    text: str
    label: int
    name: str


class Texts(Loaders):
    """What a task is fed: ``train()``, ``validation()``, ``test()`` loaders of labelled texts.

    A batch is ``{"tokens": int64 (B, N), "mask": bool (B, N), "label": int64 (B,), "text": [str], "name": [str]}``,
    padded on the right to its longest text.

    samples: of each split.  classes: names, in the order of the index.  The other arguments are those of ``TextFiles``.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[Sample]], classes: Sequence[str], *, tokenizer: str, max_length: int,
        per_class: int | None, batch_size: int, seed: int,
    ):  # fmt: skip
        if len(set(classes)) < len(classes) or len(classes) < 2:
            raise RequestError(f"classes {tuple(classes)}: two or more different names")
        if batch_size < 1 or max_length < 1 or seed < 0:
            raise RequestError(f"batch_size {batch_size}, max_length {max_length} and seed {seed}: at least 1, 1 and 0")
        self.classes, self.max_length, self.batch_size = tuple(classes), max_length, batch_size
        self.per_class, self.seed, self.tokens = per_class, seed, Tokens(tokenizer)
        self.vocabulary = self.tokens.size
        self.samples = {part: list(samples[part]) for part in SPLITS}
        if per_class is not None:
            own = self.samples["train"]
            self.samples["train"] = [own[i] for i in few([s.label for s in own], per_class, seed, self.classes)]
        self._check()

    def _check(self) -> None:
        for part, own in self.samples.items():
            if not own:
                raise RequestError(f"the {part} split has no text: ask for a fraction above 0 or name its file")
        there = {sample.label for sample in self.samples["train"]}
        if absent := [name for index, name in enumerate(self.classes) if index not in there]:
            raise RequestError(f"class {absent[0]!r} has no text to train on")

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; ``reading`` is what it takes to feed a new text to a model trained on these."""
        return {
            "kind": type(self).__name__,
            "classes": list(self.classes),
            "reading": {"tokenizer": self.tokens.name, "max_length": self.max_length},
            "vocabulary": self.vocabulary,
            "per_class": self.per_class,
            "seed": self.seed,
            "splits": {part: self._describe(own) for part, own in self.samples.items()},
        }

    def _describe(self, own: list[Sample]) -> dict[str, Any]:
        sizes = [len(ids) for ids in self.tokens.encode(sample.text for sample in own)]
        counts = {name: sum(s.label == index for s in own) for index, name in enumerate(self.classes)}
        cut = sum(size > self.max_length for size in sizes)
        return {"texts": len(own), **counts, "tokens": sum(sizes), "longest": max(sizes), "truncated": cut}

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self.samples[part],  # type: ignore[arg-type]
            self.batch_size,
            shuffle=shuffle,
            collate_fn=partial(collate, tokens=self.tokens, longest=self.max_length),
            generator=torch.Generator().manual_seed(self.seed),
        )


def collate(samples: Sequence[Sample], tokens: Tokens, longest: int) -> dict[str, Any]:
    """Samples as a batch (see ``Texts``)."""
    return {
        **padded(tokens.encode([sample.text for sample in samples], longest), tokens.padding),
        "label": torch.tensor([sample.label for sample in samples]),
        "text": [sample.text for sample in samples],
        "name": [sample.name for sample in samples],
    }


def padded(rows: Sequence[Sequence[int]], padding: int) -> dict[str, torch.Tensor]:
    """Rows of indices as ``tokens`` int64 (B, N) and ``mask`` bool (B, N), true at tokens; padded on the right."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    return {"tokens": tokens, "mask": torch.tensor([[i < len(row) for i in range(width)] for row in rows])}
