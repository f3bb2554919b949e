"""Many rasters: files and folders mapped one after another, with a progress bar; a failure does not stop the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import RequestError, WorkError
from shared.mapping.blending import Scores
from shared.mapping.feed import Feed
from shared.mapping.raster import SUFFIXES, Mapped, Tick, has_crs, map_raster
from shared.rasters import gather, rasters_below, read_header


def map_files(
    scores: Scores, feed: Feed, inputs: Sequence[Path], output: Path, *, kind: str | None = None,
    after: Path | None = None, **options: Any,
) -> list[Mapped]:  # fmt: skip
    """Map every raster of ``inputs`` (files, and folders as ``rasters_below`` searches them) and say what each became.
    For a model trained on band files the inputs are folders, searched for the files of each scene.

    output: a file, for one raster; else a folder, which is made where it is missing and repeats the folders of the
    inputs.  kind: the ``output`` of ``map_raster`` ("polygons" where ``output`` is a .geojson, else "classes").
    after: the second date of the one input: a file for a file, a folder with the same names for a folder.
    options: further arguments of ``map_raster``.

    Raises RequestError before anything is written where inputs and outputs do not fit together. A single raster raises
    what ``map_raster`` does; of several, the others are mapped, and a WorkError in the end names those that failed.
    """
    kind = kind or ("polygons" if output.suffix.lower() in SUFFIXES["polygons"] else "classes")
    if feed.band_files is None:
        pairs = [((source,), target) for source, target in targets(inputs, output, kind)]
    else:
        pairs = stacks(inputs, output, kind, feed)
    later = {} if after is None else second_dates(inputs[0], after, [source for (source, *_), _ in pairs])
    done, failed = [], []
    with _progress(len(pairs)) as track:
        for files, target in pairs:
            source = files[0]
            try:
                second = later.get(source)
                found = map_raster(
                    scores, files, target, feed, output=kind, tick=track(source), after=second, **options
                )
            except (RequestError, WorkError) as error:
                if len(pairs) == 1:
                    raise
                print(f"omniadapt: {error}", file=sys.stderr)
                failed.append(str(source))
            else:
                print(_said(found, has_crs(read_header(source, layout=feed.layout))))
                done.append(found)
    if failed:
        raise WorkError(f"{len(failed)} of {len(pairs)} rasters failed: {', '.join(failed)}")
    return done


def targets(inputs: Sequence[Path], output: Path, kind: str) -> list[tuple[Path, Path]]:
    """Each raster to read with the file to write. Raises RequestError where two share one or a raster is in the way."""
    if kind not in SUFFIXES:
        raise RequestError(f"output {kind!r}: use {', '.join(SUFFIXES)}")
    if len(inputs) == 1 and not inputs[0].is_dir() and output.suffix and not output.is_dir():
        return [(inputs[0], output)]
    if output.suffix.lower() in (*SUFFIXES["classes"], *SUFFIXES["polygons"]) or output.is_file():
        raise RequestError(f"{output}: several rasters are written to a folder; name one")
    found: dict[Path, Path] = {}
    for source, inside in (pair for path in inputs for pair in _rasters(path, output)):
        target = output / inside.with_suffix(SUFFIXES[kind][0])
        if found.setdefault(target, source) != source:
            raise RequestError(f"{found[target]} and {source} would both become {target}; map them one by one")
    for target in found:
        if target.exists() and any(target.samefile(source) for source in found.values()):
            raise RequestError(f"{target}: a result would overwrite an input; choose another folder")
    return [(source, target) for target, source in found.items()]


def stacks(inputs: Sequence[Path], output: Path, kind: str, feed: Feed) -> list[tuple[tuple[Path, ...], Path]]:
    """The files of each scene below the folders ``inputs`` with the file to write, named after the scene."""
    if kind not in SUFFIXES:
        raise RequestError(f"output {kind!r}: use {', '.join(SUFFIXES)}")
    if output.suffix.lower() in (*SUFFIXES["classes"], *SUFFIXES["polygons"]) or output.is_file():
        raise RequestError(f"{output}: scenes of band files are written to a folder; name one")
    found: dict[Path, tuple[Path, ...]] = {}
    for folder in inputs:
        if folder.is_file():
            feed.check_files(str(folder), 1)
        for name, files in gather(folder, dict(feed.band_files or ())).items():
            target = output / f"{name}{SUFFIXES[kind][0]}"
            if found.setdefault(target, files) != files:
                raise RequestError(f"{found[target][0]} and {files[0]} would both become {target}; map them one by one")
    return [(files, target) for target, files in found.items()]


def second_dates(before: Path, after: Path, sources: Sequence[Path]) -> dict[Path, Path]:
    """The second date of each source: ``after``, or the file of its name there. Raises RequestError for one without."""
    if not before.is_dir():
        return dict.fromkeys(sources, after)
    there = {path.relative_to(after).with_suffix(""): path for path in rasters_below(after)}
    names = {source: source.relative_to(before).with_suffix("") for source in sources}
    if alone := [source for source, name in names.items() if name not in there]:
        raise RequestError(f"{alone[0]} has no second date: {after / names[alone[0]]}.* is missing")
    return {source: there[name] for source, name in names.items()}


def _rasters(path: Path, output: Path) -> list[tuple[Path, Path]]:
    """A file, or the rasters of a folder but for those of ``output``: with the place in the output."""
    if not path.is_dir():
        return [(path, Path(path.name))]
    results = _inside(output, path) and not _inside(path, output)
    files = [file for file in rasters_below(path) if not (results and _inside(file, output))]
    if not files:
        raise RequestError(f"{path}: holds no raster but the results in {output}")
    return [(file, file.relative_to(path)) for file in files]


def _inside(path: Path, folder: Path) -> bool:
    path, folder = (Path(os.path.realpath(p)) for p in (path, folder))  # which stands links that lead to themselves
    return path.is_relative_to(folder)


def _said(found: Mapped, placed: bool) -> str:
    """One line about a finished raster."""
    if found.pixels is None:
        return f"{found.target}: done before"
    total = found.height * found.width
    parts = [f"{name} {count / total:.1%}" for name, count in found.pixels.items() if count]
    parts += [f"no data {found.nodata / total:.1%}"] if found.nodata else []
    notes = "; carried on from where it was cut off" if found.resumed else ""
    if not placed:
        notes += "; without a coordinate reference system, as its input"
    return f"{found.target}: {found.width} x {found.height} pixels: {', '.join(parts)}{notes}"


@contextmanager
def _progress(count: int) -> Iterator[Callable[[Path], Tick]]:
    """A bar for what is being done to a raster, with the time left of it, where there is a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise RequestError("the progress bar needs rich: pip install 'omniadapt[run]'") from error

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    numbers = iter(range(1, count + 1))
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task = bar.add_task("")

        def track(source: Path) -> Tick:
            name, before = f"{next(numbers)}/{count} {source.name}", ""

            def tick(stage: str, done: int, total: int) -> None:
                nonlocal before
                if stage != before:  # the time left is told from the work of now, not from what was there already
                    bar.reset(task, description=f"{name}: {stage}", completed=done, total=total)
                before = stage
                bar.update(task, completed=done)

            return tick

        yield track
