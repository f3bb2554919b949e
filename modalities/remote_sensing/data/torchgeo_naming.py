"""Naming: datasets and samplers of TorchGeo, from what a recipe says of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Sampler

from shared.catalog import nearest
from shared.errors import RequestError


def installed() -> None:
    """Raises RequestError where TorchGeo cannot be imported."""
    try:
        importlib.import_module("torchgeo.datasets")
        importlib.import_module("torchgeo.samplers")
    except ImportError as error:
        raise RequestError(f"data of TorchGeo need torchgeo: pip install 'omniadapt[torchgeo]' ({error})") from error


def build_dataset(stated: Any, path: str) -> Any:
    """A dataset as it is, or made from ``{type: NAME, setting: value ...}``; ``path``: where the recipe states it.

    NAME is a class of ``torchgeo.datasets``, or a dotted name of one elsewhere. Settings are its constructor's, or
    attributes of a TorchGeo class that are meant to be set (``is_image``, ``filename_glob``, ``all_bands`` ...); a
    value with a ``type`` is a dataset itself, as those of an ``IntersectionDataset`` are. Raises RequestError.
    """
    if isinstance(stated, Mapping):
        stated = _built(stated, path, "torchgeo.datasets", Dataset)
    if isinstance(stated, IterableDataset) or not (isinstance(stated, Dataset) and hasattr(stated, "__len__")):
        raise RequestError(
            f"{path}: wants a dataset that has a length, or a mapping with its type, got {_short(stated)}"
        )
    return stated


def build_sampler(stated: Any, path: str, dataset: Any, batch_size: int) -> Any:
    """A sampler of ``dataset`` as it is, or made from ``{type: NAME, setting: value ...}``, of ``torchgeo.samplers``.

    ``roi`` may be [xmin, ymin, xmax, ymax], ``toi`` [start, end] and ``units`` "pixels" or "crs"; the batch size of a
    sampler of batches is ``batch_size`` unless said. Raises RequestError.
    """
    if isinstance(stated, Mapping):
        return _built(stated, path, "torchgeo.samplers", Sampler, dataset, batch_size=batch_size)
    if not isinstance(stated, Sampler):
        raise RequestError(f"{path}: wants a sampler, or a mapping with its type and settings, got {_short(stated)}")
    return stated


def _built(stated: Mapping[str, Any], path: str, home: str, base: type, *wired: Any, **defaults: Any) -> Any:
    given = dict(stated)
    kind = _class(given.pop("type", None), path, home, base)
    parameters = inspect.signature(kind).parameters
    given = {name: default for name, default in defaults.items() if name in parameters} | given
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = {} if open_ended else {name: given.pop(name) for name in [*given] if name not in parameters}
    if strange := [name for name in own if not _settable(kind, name)]:
        raise RequestError(f"{path}.{strange[0]}: {kind.__name__} has no such setting{nearest(strange[0], parameters)}")
    values = {name: _value(name, value, f"{path}.{name}") for name, value in given.items()}
    made = kind.__new__(kind)  # pyright: ignore[reportCallIssue]
    vars(made).update(own)  # the constructors of TorchGeo read them from the instance
    try:
        inspect.signature(kind).bind(*wired, **values)
        made.__init__(*wired, **values)  # pyright: ignore
    except RequestError:
        raise
    except Exception as error:  # whatever a dataset finds wrong with its files
        raise RequestError(
            f"{path}: {kind.__name__}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    return made


def _class(name: Any, path: str, home: str, base: type) -> type:
    what = base.__name__.lower()
    if not isinstance(name, str):
        raise RequestError(f"{path}.type: wants the name of a {what} of {home}, got {name!r}")
    module, _, last = name.rpartition(".")
    try:
        package = importlib.import_module(module or home)
    except ImportError as error:
        raise RequestError(f"{path}.type: {name!r} cannot be imported: {error}") from error
    kind = getattr(package, last, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        known = [n for n, v in vars(package).items() if isinstance(v, type) and issubclass(v, base)]
        raise RequestError(f"{path}.type: no {what} of {module or home} is called {last!r}{nearest(last, known)}")
    return kind


def _settable(kind: type, name: str) -> bool:
    """Whether a name is an attribute of the class that its users set: public, and neither method nor property."""
    value = getattr(kind, name, property())
    return not (name.startswith("_") or callable(value) or isinstance(value, property))


def _value(name: str, value: Any, path: str) -> Any:
    """What a constructor of TorchGeo takes, from what YAML can say."""
    if isinstance(value, Mapping) and "type" in value:
        return build_dataset(value, path)
    if name == "units" and isinstance(value, str):
        from torchgeo.samplers import Units

        if value.upper() not in Units.__members__:
            raise RequestError(f"{path}: wants pixels or crs, got {value!r}")
        return Units[value.upper()]
    if name == "roi" and isinstance(value, (list, tuple)):
        numbers = len(value) == 4 and all(isinstance(v, (int, float)) for v in value)
        if not (numbers and value[0] < value[2] and value[1] < value[3]):
            raise RequestError(f"{path}: wants [xmin, ymin, xmax, ymax] in the dataset's coordinates, got {value}")
        from shapely import box

        return box(*value)
    if name == "toi" and isinstance(value, (list, tuple)):
        import pandas

        try:
            start, end = (pandas.Timestamp(day) for day in value)
        except (ValueError, TypeError):
            start = end = pandas.NaT
        if not start < end:  # NaT is neither
            raise RequestError(f"{path}: wants [start, end], two dates, got {value}")
        return pandas.Interval(start, end, closed="both")  # pyright: ignore[reportArgumentType]
    numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
    return tuple(value) if numbers else value


def _short(value: Any) -> str:
    """A value as one line of an error: TorchGeo's objects print several."""
    return repr(value) if isinstance(value, (str, int, float, list, type(None))) else type(value).__name__
