"""Stratified splits: the same share of every class, or a few images of each, drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from shared.errors import RequestError

SPLITS = ("train", "validation", "test")


def draw(
    labels: Sequence[int], classes: Sequence[str], *, validation: float | Literal["train"],
    test: float | Literal["rest"], per_class: int | None, seed: int,
) -> dict[str, list[int]]:  # fmt: skip
    """Indices of each split, in order; every class is split by itself, in an order that the seed draws.

    Of a class come first test and validation (fractions, each rounded and at least one image unless 0), then the first
    ``per_class`` of the others train, all if None. ``validation`` "train": those that train.  ``test`` "rest": those
    that are neither trained nor validated on.

    Raises RequestError where a class is too small, or a setting does not fit.
    """
    _check(validation, test, per_class, seed)
    found: dict[str, list[int]] = {part: [] for part in SPLITS}
    truth = np.asarray(labels)
    for label, name in enumerate(classes):
        members = np.random.default_rng([seed, label]).permutation(np.flatnonzero(truth == label)).tolist()
        total = len(members)
        for part, share in (("test", test), ("validation", validation)):
            if isinstance(share, (int, float)):
                count = max(1, round(share * total)) if share else 0
                found[part] += members[:count]
                members = members[count:]
        if len(members) < (wanted := per_class or 1) + (test == "rest"):
            taken = f"{total - len(members)} are taken for validation and test"
            more = f"{wanted} train and 1 tests" if test == "rest" else f"{wanted} train"
            raise RequestError(f"class {name!r} has {total} images, of which {taken}: too few, where {more}")
        found["train"] += members[:per_class]
        if test == "rest":
            found["test"] += members[per_class:]
    if validation == "train":
        found["validation"] = found["train"]
    return {part: sorted(members) for part, members in found.items()}


def _check(validation: float | str, test: float | str, per_class: int | None, seed: int) -> None:
    for part, share in (("validation", validation), ("test", test)):
        if isinstance(share, (int, float)) and not 0 <= share < 1:
            raise RequestError(f"{part} {share}: use a fraction of each class from 0 to below 1")
    if per_class is not None and per_class < 1:
        raise RequestError(f"per_class {per_class}: use a number above 0, or null for all")
    if test == "rest" and per_class is None:
        raise RequestError("test rest: give per_class, the images of each class that train")
    if seed < 0:
        raise RequestError(f"seed {seed}: use 0 or more")
