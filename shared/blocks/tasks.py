"""Adapters that hold several tasks: which task a call is for, and one branch for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shared.adapter import Adapter
from shared.attaching import Bank
from shared.blocks.placement import on_output
from shared.context import Context
from shared.errors import RequestError

ALL = "all"  # the branch that serves every task


def task_of(context: Context, tasks: Iterable[str]) -> str:
    """The task of this call: ``context.task``, or the only one there is. Raises RequestError where it is not known."""
    known = tuple(tasks)
    named = vars(context).get("task", known[0] if len(known) == 1 else None)
    if named not in known:
        what = "names no task" if named is None else f"names the task {named!r}"
        raise RequestError(f'this call {what}: give context={{"task": ...}}, one of {", ".join(known)}')
    return named


def check_tasks(method: str, tasks: Sequence[str]) -> None:
    """Raises RequestError where there is no task, or where a name is empty, given twice, "all", or has a dot."""
    bad = isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks)
    if bad or any(not task or "." in task or task == ALL for task in tasks):
        raise RequestError(f"{method} tasks {tasks!r}: give one or more different names without dots, none {ALL!r}")


class AfterByTask(Adapter):
    """``y + after(branch(before(y)))`` with the call's branch: series, on the output.

    branches: by task, or one named ``ALL``.  before, after: norms of the branch that all tasks share.
    """

    def __init__(
        self, branches: Mapping[str, nn.Module], before: nn.Module | None = None, after: nn.Module | None = None
    ):
        super().__init__()
        self.branches = Bank(branches)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        branch = self.branches[ALL if ALL in self.branches else task_of(self.context, self.branches)]

        def change(y: Tensor) -> Tensor:
            h = y.to(next(branch.parameters()).dtype)
            return y + self.after(branch(self.before(h))).to(y.dtype)

        return on_output(base(*args, **kwargs), change)
