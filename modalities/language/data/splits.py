"""Splits of texts: their loaders; and labelled ones shared out alike, equal texts never in two splits."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

from torch.utils.data import DataLoader

from shared.errors import RequestError

T = TypeVar("T")


def stratified(
    texts: Sequence[str], labels: Sequence[Hashable], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the texts that stay and of those drawn: about ``share`` of every class.

    Texts that are equal (their first one's class counts) are drawn together. Raises RequestError for a share outside 0
    to below 1, and where a class would have none on one side.
    """
    if not 0 <= share < 1:
        raise RequestError(f"a split of {share}: use a fraction from 0 to below 1")
    same: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        same[text].append(index)
    groups: dict[Hashable, list[list[int]]] = defaultdict(list)
    for members in same.values():
        groups[labels[members[0]]].append(members)
    drawn: list[int] = []
    for label, here in sorted(groups.items(), key=lambda pair: str(pair[0])):
        random.Random(f"{seed} {label}").shuffle(here)
        count = max(1, round(share * len(here))) if share else 0
        if count >= len(here):
            raise RequestError(
                f"class {label!r} has {len(here)} different texts: too few to keep {share:g} of them apart"
            )
        drawn += [index for members in here[:count] for index in members]
    chosen = set(drawn)
    return [index for index in range(len(texts)) if index not in chosen], sorted(drawn)


def few(labels: Sequence[int], count: int, seed: int, classes: Sequence[str]) -> list[int]:
    """Indices of ``count`` samples of each class, drawn by the seed. Raises RequestError where a class has fewer."""
    if count < 1:
        raise RequestError(f"per_class {count}: use a number above 0")
    drawn: list[int] = []
    for index, name in enumerate(classes):
        members = [i for i, label in enumerate(labels) if label == index]
        if len(members) < count:
            raise RequestError(f"per_class {count}: class {name!r} has only {len(members)} texts to train on")
        drawn += random.Random(f"{seed} {index}").sample(members, count)
    return sorted(drawn)


class Loaders:
    """The loaders of the three splits, which ``_loader`` makes."""

    def train(self) -> DataLoader:
        """Shuffled anew each epoch."""
        return self._loader("train", shuffle=True)

    def validation(self) -> DataLoader:
        return self._loader("validation")

    def test(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        raise NotImplementedError
