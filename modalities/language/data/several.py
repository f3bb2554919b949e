"""Several tasks: labelled texts of a few data sets, each with its own classes, in batches of one task each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch.utils.data import DataLoader

from modalities.language.data.splits import Loaders
from modalities.language.data.texts import SPLITS, Sample, Texts, collate
from shared.blocks.tasks import check_tasks
from shared.errors import RequestError
from shared.training.order import TaskBatches

Data = Annotated[Any, "data"]


class SeveralTasks(Loaders):
    """Joins data sets of labelled texts; a batch is one of ``Texts`` with its task's name as ``task``.

    tasks: by name, data such as ``TextFiles`` and ``GeneratedText``, with one tokenizer. Each keeps its classes, splits
        and batch size. Names are letters, digits, blanks, ``_`` and ``-``.
    temperature: T of the shares that tasks have in the batches of an epoch, ``N ** (1 / T)`` of a task's own number N:
        1 is every batch of every task once (VL-Adapter, Hyperformer as it runs it), more lifts the small tasks
        (Hyperformer: 10), None gives all the same number. The order is drawn.
    only: tasks that train; all if not given. The others are measured all the same, as when a further task is added.
    seed: of the order.

    Validation and test hold every text of every task once.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Data],
        temperature: float | None = 1.0,
        only: Sequence[str] = (),
        seed: int = 0,
    ):
        check_tasks("data", tuple(tasks))
        for name, data in tasks.items():
            if not re.fullmatch(r"[\w -]+", name):
                raise RequestError(f"tasks.{name}: use letters, digits, blanks, _ and - in the name of a task")
            if not isinstance(data, Texts):
                raise RequestError(f"tasks.{name}: {type(data).__name__} gives no texts with a class each")
        first, *rest = tasks
        for name in rest:
            ours, theirs = tasks[name].tokens.name, tasks[first].tokens.name
            if ours != theirs:
                raise RequestError(f"tasks.{name}: tokenizer {ours!r}, {first} has {theirs!r}: use one")
        if unknown := [name for name in only if name not in tasks]:
            raise RequestError(f"only: {unknown[0]!r} is none of the tasks {', '.join(tasks)}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise RequestError(f"temperature {temperature}: use a number above 0, or none for equal shares")
        self.tasks: dict[str, Texts] = dict(tasks)
        self.temperature, self.only, self.seed = temperature, tuple(only), seed
        self.classes = {name: data.classes for name, data in self.tasks.items()}
        self.vocabulary = tasks[first].vocabulary
        self.max_length = max(data.max_length for data in self.tasks.values())

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON: ``classes``, ``reading`` and each split by task."""
        found = {name: data.describe() for name, data in self.tasks.items()}
        return {
            "kind": type(self).__name__,
            "classes": {name: each["classes"] for name, each in found.items()},
            "reading": {name: each["reading"] for name, each in found.items()},
            "vocabulary": self.vocabulary,
            "temperature": self.temperature,
            "only": list(self.only),
            "seed": self.seed,
            "splits": {part: {name: each["splits"][part] for name, each in found.items()} for part in SPLITS},
        }

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        chosen = {n: d for n, d in self.tasks.items() if not (shuffle and self.only) or n in self.only}
        rows = [(name, sample) for name, data in chosen.items() for sample in data.samples[part]]
        sizes = [len(data.samples[part]) for data in chosen.values()]
        each = [data.batch_size for data in chosen.values()]
        if shuffle:
            order: Any = TaskBatches(sizes, each, self.temperature, torch.Generator().manual_seed(self.seed))
        else:
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            order = [
                list(range(start, min(start + by, end)))
                for size, by, end in zip(sizes, each, ends, strict=True)
                for start in range(end - size, end, by)
            ]
        return DataLoader(rows, batch_sampler=order, collate_fn=self._batch)  # type: ignore[arg-type]

    def _batch(self, rows: Sequence[tuple[str, Sample]]) -> dict[str, Any]:
        name = rows[0][0]
        data = self.tasks[name]
        return {**collate([sample for _, sample in rows], data.tokens, data.max_length), "task": name}
