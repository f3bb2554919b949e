"""Adapters that hold several tasks: which task a call is for, a branch for each, and further tasks added later."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared import store
from shared.adapter import Adapter
from shared.attaching import Bank
from shared.blocks.bottleneck import Bottleneck
from shared.blocks.placement import on_output
from shared.context import Context
from shared.errors import RequestError
from shared.trained import parameters as trainable

ALL = "all"  # the branch that serves every task


class ByTask(Bank):
    """What each task has of its own, by its name."""


def task_of(context: Context, tasks: Iterable[str]) -> str:
    """The task of this call: ``context.task``, or the only one there is. Raises RequestError where it is not known."""
    known = tuple(tasks)
    named = vars(context).get("task", known[0] if len(known) == 1 else None)
    if named not in known:
        what = "names no task" if named is None else f"names the task {named!r}"
        raise RequestError(f'this call {what}: give context={{"task": ...}}, one of {", ".join(known)}')
    return named


def freeze(root: nn.Module | None, further: Sequence[str]) -> None:
    """Freeze all but what the tasks of ``further`` have of their own, as ``ByTask`` tells; nothing where there are
    none."""
    if root is None or not further:
        return
    parts = [(task, part) for bank in root.modules() if isinstance(bank, ByTask) for task, part in bank.items()]
    own = {id(p) for task, part in parts if task in further for p in part.parameters()}
    own -= {id(p) for task, part in parts if task not in further for p in part.parameters()}
    for parameter in root.parameters():
        parameter.requires_grad_(id(parameter) in own)


def start_from(model: Any, name: str, method: Any, path: Path) -> None:
    """Fill the adapter ``name`` and the head, but for what trains, from the file of a run without the further tasks.

    Raises RequestError where the file is of another backbone, method, settings or tasks, or does not fit.
    """
    tensors, header = store.read(path)
    store.check_belongs(model, header, path, False)
    theirs, mine = header["method"]["arguments"], method.arguments()
    before = [*theirs["tasks"], *theirs.get("further", ())]
    if before != list(method.tasks):
        raise RequestError(f"{path}: it has the tasks {', '.join(before)}: give method.tasks these, in this order")
    for key in theirs.keys() - {"tasks", "further", "earlier", "track_z"}:
        if json.dumps(theirs[key]) != json.dumps(mine.get(key)):
            raise RequestError(f"{path}: made with method.{key} {theirs[key]!r}, now {mine.get(key)!r}: give the same")
    own = model.trained_state()
    given = {f"adapter.{name}.{n.removeprefix('adapter.')}" if n.startswith("adapter.") else n: t
             for n, t in tensors.items()}  # fmt: skip
    trained = {n for n, p in trainable(model).items()}
    wanted = {n: t for n, t in own.items() if n not in trained}
    if odd := [n for n in (*wanted, *given) if n not in wanted or n not in given or wanted[n].shape != given[n].shape]:
        raise RequestError(f"{path}: {odd[0]} does not fit what the earlier tasks have here ({len(odd)} tensors)")
    with torch.no_grad():
        for key, tensor in given.items():
            own[key].copy_(tensor)


def check_tasks(method: str, tasks: Sequence[str]) -> None:
    """Raises RequestError where there is no task, or where a name is empty, given twice, "all", or has a dot."""
    bad = isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks)
    if bad or any(not task or "." in task or task == ALL for task in tasks):
        raise RequestError(f"{method} tasks {tasks!r}: give one or more different names without dots, none {ALL!r}")


def check_further(method: str, tasks: Sequence[str], further: Sequence[str], earlier: Path | None) -> None:
    """Raises RequestError unless tasks, further tasks and the earlier file are given together."""
    if bool(further) != (earlier is not None) or (further and not tasks):
        raise RequestError(
            f"{method}: further tasks need tasks and the file that has them (earlier), and it needs both"
        )


class AfterByTask(Adapter):
    """``y + after(branch(before(y)))`` with the call's branch: series, on the output.

    branches: bottlenecks by task, or one named ``ALL``.  before, after: norms of the branch that all tasks share.
    axis: of the channels.  squares: where it is a list, calls add the mean square of what their bottleneck holds after
    its activation.
    """

    def __init__(
        self, branches: Mapping[str, Bottleneck], before: nn.Module | None = None, after: nn.Module | None = None,
        *, axis: int = -1,
    ):  # fmt: skip
        super().__init__()
        self.branches = ByTask(branches)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()
        self.axis = axis
        self.squares: list[Tensor] | None = None

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        branch: Any = self.branches[ALL if ALL in self.branches else task_of(self.context, self.branches)]

        def change(y: Tensor) -> Tensor:
            x = y.movedim(self.axis, -1)
            z = branch.inner(self.before(x.to(next(branch.parameters()).dtype)))
            if self.squares is not None and torch.is_grad_enabled():
                self.squares.append(z.square().mean())
            return y + self.after(branch.outer(z)).to(y.dtype).movedim(-1, self.axis)

        return on_output(base(*args, **kwargs), change)
