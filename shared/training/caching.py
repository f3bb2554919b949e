"""Training through the cache of what is frozen (``shared.cache``): whether it can be, and the model while it is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.cache import Cache, FrozenPrefix, span
from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.training.engine import Engine
    from shared.training.task import Task

_log = logging.getLogger("omniadapt")


def cacheable(task: Task, engine: Engine) -> None:
    """Raises RequestError where the engine has a cache and the task's model nothing to keep in it."""
    if engine.cache is None:
        return
    try:
        span(task.model)
    except RequestError as error:
        raise RequestError(f"trainer.cache: {error}") from None
    if task.redraws:
        raise RequestError(f"trainer.cache: {type(task).__name__} changes the images at random in every step, so none "
                           f"comes twice: {task.redraws}")  # fmt: skip


@contextlib.contextmanager
def through_cache(task: Task, engine: Engine) -> Iterator[FrozenPrefix | None]:
    """Within it the task's model goes through the engine's cache, where it has one; what came of it is told."""
    if engine.cache is None:
        yield None
        return
    found, total = span(task.model), len(list(task.model.backbone.blocks))  # type: ignore[arg-type]
    cache = task.model.cache = FrozenPrefix(task.model, Cache.of(engine.cache))
    what = f"{found.start} of {total} blocks lie below the lowest adapter"
    _log.info("cache %s: %s; %s", cache.root, what, cache.settings)
    try:
        yield cache
    finally:
        task.model.cache = None
        cache.close()
        _log.info("cache: %d images were computed, %d came from it", cache.computed, cache.read)
