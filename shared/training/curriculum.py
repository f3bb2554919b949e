"""The difficulty-adaptive curriculum of RDTF (2025, arXiv 2503.17735): which of several tasks to train on next."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from shared.errors import RequestError

GAINS = (5.0, 3.0, 1.3)
# Weights of a family at the start, the middle and the end of the curriculum, and at the five levels of what the losses
# allow, from the easiest on.
ANCHORS = {"generation": (0.1, 0.5, 0.9), "interpolation": (0.9, 0.5, 0.1), "prediction": (0.7, 0.5, 0.3)}
LEVELS = {
    "generation": (0.1, 0.3, 0.5, 0.7, 0.9),
    "interpolation": (0.9, 0.7, 0.5, 0.3, 0.1),
    "prediction": (0.5, 0.5, 0.5, 0.5, 0.5),
}
NEUTRAL = 2  # the level before enough losses are known


class Curriculum:
    """Draws tasks by weights that follow the step and the training loss; knows nothing of what the tasks are.

    families: task to family; the families are those of ``anchors`` and ``levels``.
    end: the step at which the curriculum is over; the weights by step stay from then on.
    schedule: of the weights by step: "anchors" (linear from one to the next), "cosine" (there and half way back, kept
    in the released code as a comment; for the three families of RDTF) or "none" (all the same).
    adaptive: add the weights of the level that the losses allow: P = K_p L_t + K_i mean(L) + K_d (L_t - L_t-1), the
    mean over the last ``window`` losses, is ranked among the last ``window`` P; a low one allows what is harder.
    gains: (K_p, K_i, K_d), published (5.0, 3.0, 1.3).

    The released function for the adaptive part cannot run (names that do not exist, an index that never reaches the
    hardest level): level = floor(5 (1 - rank)), rank the share of kept P below the new one, and the middle level while
    fewer than 10 are kept, is our rule for its stated aim.

    ``state_dict`` holds all it has learnt from the losses; with it, a resumed run draws as an uninterrupted one.
    """

    def __init__(
        self,
        families: Mapping[str, str],
        end: int,
        *,
        schedule: Literal["anchors", "cosine", "none"] = "anchors",
        adaptive: bool = True,
        gains: tuple[float, float, float] = GAINS,
        window: int = 1000,
        anchors: Mapping[str, tuple[float, float, float]] = ANCHORS,
        levels: Mapping[str, tuple[float, ...]] = LEVELS,
    ):
        if not families or end < 1 or window < 2:
            raise RequestError(f"curriculum of {len(families)} tasks, end {end}, window {window}: at least 1, 1 and 2")
        if unknown := sorted(set(families.values()) - (anchors.keys() & levels.keys())):
            raise RequestError(f"curriculum: no weights for the families {', '.join(unknown)}")
        self.families, self.end, self.schedule, self.adaptive = dict(families), end, schedule, adaptive
        self.gains, self.anchors, self.levels = gains, dict(anchors), dict(levels)
        self.losses: deque[float] = deque(maxlen=window)
        self.signals: deque[float] = deque(maxlen=window)
        self.level = NEUTRAL

    def weights(self, step: int) -> dict[str, float]:
        """The weight of each task at a step, before division by their sum."""
        found = self.by_step(step)
        if self.adaptive:
            allowed = self.by_level(self.level)
            found = {task: weight + allowed[task] for task, weight in found.items()}
        return found

    def by_step(self, step: int) -> dict[str, float]:
        """The part of the weights that follows the step."""
        if self.schedule == "none":
            return dict.fromkeys(self.families, 1.0)
        family = self._cosine(step) if self.schedule == "cosine" else self._linear(step)
        return {task: family[kind] for task, kind in self.families.items()}

    def _linear(self, step: int) -> dict[str, float]:
        place = min(2 * step / self.end, 2.0)
        half, part = (0, place) if place < 1 else (1, place - 1)
        return {kind: a[half] + (a[half + 1] - a[half]) * part for kind, a in self.anchors.items()}

    def _cosine(self, step: int) -> dict[str, float]:
        angle = 2 * math.pi * min(step / self.end, 0.75)
        generation = (1 + math.sin(angle - math.pi / 2)) / 2
        return {
            "generation": generation,
            "interpolation": (1 + math.cos(angle)) / 2,
            "prediction": 0.5 * generation + 0.25,
        }

    def by_level(self, level: int) -> dict[str, float]:
        """The part of the weights that follows the losses."""
        return {task: self.levels[kind][level] for task, kind in self.families.items()}

    def draw(self, step: int, draws: Any = random) -> str:
        """The task of a step. draws: gives ``choices``."""
        weights = self.weights(step)
        return draws.choices(list(weights), weights=list(weights.values()))[0]

    def note(self, loss: float) -> float | None:
        """Learn from the loss of a step; gives its P, from the second loss on."""
        before = self.losses[-1] if self.losses else None
        self.losses.append(loss)
        if before is None:
            return None
        proportional, integral, derivative = self.gains
        mean = math.fsum(self.losses) / len(self.losses)
        signal = proportional * loss + integral * mean + derivative * (loss - before)
        self.level = self._level(signal)
        self.signals.append(signal)
        return signal

    def _level(self, signal: float) -> int:
        if len(self.signals) < 10:
            return NEUTRAL
        kept, below = len(self.signals), bisect_left(sorted(self.signals), signal)
        count = min(len(levels) for levels in self.levels.values())
        return min(count * (kept - below) // kept, count - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "signals": list(self.signals), "level": self.level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.signals.clear()
        self.signals.extend(state["signals"])
        self.level = state["level"]
