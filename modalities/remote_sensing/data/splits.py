"""Splits by scene: tiles of one scene resemble each other, so a scene is in one split only."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shared.errors import RequestError

SPLITS = ("train", "validation", "test")


class Split(NamedTuple):
    """Names of the scenes in each split: disjoint, and together all of them."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def scene_of(name: str, pattern: str | None) -> str:
    """The scene a file belongs to: the group ``scene`` of ``pattern`` found in its name, else the first group, else
    the whole match. Without a pattern every file is a scene of its own."""
    if pattern is None:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise RequestError(f"group {pattern!r} is not a regular expression: {error}") from error
    if match is None:
        raise RequestError(f"group {pattern!r} does not match {name!r}, so its scene is unknown")
    return match["scene"] if "scene" in match.groupdict() else match[1 if match.groups() else 0]


def split_scenes(
    scenes: Iterable[str], *, validation: float | Sequence[str], test: float | Sequence[str], seed: int = 0
) -> Split:
    """Scenes into train, validation and test.

    validation, test: a fraction of all scenes, drawn by ``seed`` and at least one unless 0, or the names of scenes
    (one name leaves that scene out). The rest trains. Raises RequestError for a name that is no scene or stands in
    both, for a fraction outside 0 to 1, and where nothing is left to train on.
    """
    everything = sorted(set(scenes))
    named: dict[str, tuple[str, ...]] = {}
    for part, wanted in (("validation", validation), ("test", test)):
        if not isinstance(wanted, (int, float)):
            named[part] = _known(part, wanted, everything)
    if both := set(named.get("validation", ())) & set(named.get("test", ())):
        raise RequestError(f"scene {min(both)!r} is named for both validation and test; a scene is in one split only")
    free = [scene for scene in everything if not any(scene in names for names in named.values())]
    random.Random(seed).shuffle(free)
    for part, wanted in (("test", test), ("validation", validation)):
        if isinstance(wanted, (int, float)):
            count = _count(part, wanted, len(everything))
            named[part], free = tuple(sorted(free[:count])), free[count:]
    if not free:
        raise RequestError(
            f"no scene is left to train on: {len(everything)} in all, {len(named['validation'])} for validation and "
            f"{len(named['test'])} for test; ask for less, or group files into more scenes"
        )
    return Split(tuple(sorted(free)), named["validation"], named["test"])


def deal_scenes(class_pixels: Mapping[str, Sequence[int]], folds: int) -> list[tuple[str, ...]]:
    """Scenes into ``folds`` parts that share out the rarest class evenly.

    class_pixels: for each scene, its pixels of each class. Scenes are ordered by how much they hold of the rarest
    class (then of the next rarest, then by name) and dealt in turn, so each part has the class if ``folds`` scenes do.
    """
    if not 2 <= folds <= len(class_pixels):
        raise RequestError(f"folds {folds}: use 2 to {len(class_pixels)}, the number of scenes")
    totals = [sum(column) for column in zip(*class_pixels.values(), strict=True)]
    rarest_first = sorted(range(len(totals)), key=totals.__getitem__)
    order = sorted(class_pixels, key=lambda scene: (*(-class_pixels[scene][c] for c in rarest_first), scene))
    return [tuple(sorted(order[fold::folds])) for fold in range(folds)]


def _known(part: str, names: Sequence[str], scenes: list[str]) -> tuple[str, ...]:
    for name in [names] if isinstance(names, str) else names:
        if name not in scenes:
            near = difflib.get_close_matches(name, scenes, n=1) or scenes[:1]
            raise RequestError(
                f"{part} names {name!r}, which is no scene; nearest: {near[0]!r}" if near else "no scenes"
            )
    return tuple(sorted({names} if isinstance(names, str) else set(names)))


def _count(part: str, fraction: float, scenes: int) -> int:
    if not 0 <= fraction < 1:
        raise RequestError(f"{part} {fraction}: a fraction of the scenes from 0 to below 1, or names of scenes")
    return max(1, round(fraction * scenes)) if fraction else 0
