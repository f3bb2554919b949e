"""Objects of images as files, whole or not at all: maps of their numbers or their outlines, placed as the image is."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modalities.images.backbones.inputs import library
from modalities.images.opening import PLACED, Opened, Opener
from modalities.images.seeing import Found
from shared.errors import RequestError, WorkError
from shared.mapping import outlines
from shared.rasters import Georeference, write_raster
from shared.store import write_atomically

SUFFIXES = {"classes": (".png", *PLACED), "polygons": (".geojson", ".json")}


class Job(NamedTuple):
    """One image to do. inside: its path below its input."""

    source: Path
    inside: Path
    target: Path


def each_file(
    opener: Opener, inputs: Sequence[Path], output: Path, kind: str | None, overwrite: bool,
    make: Callable[[Job, str], str],
) -> None:  # fmt: skip
    """Do every image of ``inputs`` (files, and folders with their subfolders) and say what it became.

    output: a file for one image, else a folder, which is made where it is missing.  kind: "classes" or "polygons" (as
    the name of ``output`` says if None).  make: does a job of a kind, and returns what is to be said.

    Raises RequestError before anything is read where inputs and outputs do not fit together. A single image raises what
    ``make`` does; of several, the others are done, and a WorkError in the end names those that failed.
    """
    if kind is None:
        kind = "polygons" if output.suffix.lower() in SUFFIXES["polygons"] else "classes"
    if kind not in SUFFIXES:
        raise RequestError(f"--as {kind}: objects are written as classes (a map of their numbers) or polygons")
    jobs, failed = _jobs(opener, inputs, output, kind, overwrite), []
    for job in jobs:
        try:
            said = make(job, kind)
        except (RequestError, WorkError) as error:
            if len(jobs) == 1:
                raise
            print(f"omniadapt: {error}", file=sys.stderr)
            failed.append(str(job.source))
        else:
            print(f"{job.target}: {said}")
    if failed:
        raise WorkError(f"{len(failed)} of {len(jobs)} images failed: {', '.join(failed)}")


def _jobs(opener: Opener, inputs: Sequence[Path], output: Path, kind: str, overwrite: bool) -> list[Job]:
    files = opener.files(inputs)
    known = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    if len(files) == 1 and not inputs[0].is_dir() and output.suffix and not output.is_dir():
        if output.suffix.lower() not in SUFFIXES[kind]:
            raise RequestError(f"{output}: {kind} are written to a file named {' or '.join(SUFFIXES[kind])}")
        jobs = [Job(*files[0], output)]
    elif output.suffix.lower() in known or output.is_file():
        raise RequestError(f"{output}: several images are written to a folder; name one")
    else:
        jobs = [Job(file, inside, output / inside.with_suffix(_suffix(opener, file, kind))) for file, inside in files]
    sources: dict[Path, Path] = {}
    for job in jobs:
        if sources.setdefault(job.target, job.source) != job.source:
            raise RequestError(f"{sources[job.target]} and {job.source} would both become {job.target}; do them apart")
        if job.target.exists() and any(job.target.samefile(one.source) for one in jobs if one.source.exists()):
            raise RequestError(f"{job.target}: a result would overwrite an input; choose another name")
        if job.target.exists() and not overwrite:
            raise RequestError(f"{job.target} exists already; --overwrite replaces it")
    return jobs


def _suffix(opener: Opener, file: Path, kind: str) -> str:
    try:
        placed = opener.place(file) is not None
    except RequestError:  # which reading the file will tell
        placed = False
    if kind == "classes":
        return ".tif" if file.suffix.lower() in PLACED else ".png"
    return ".geojson" if placed else ".json"


def write_objects(job: Job, kind: str, opened: Opened, objects: Sequence[Found], *, inside: int | None = None) -> None:
    """Write a map uint16 of the numbers of objects, from 1, smaller ones over larger, 0 where there is none; or their
    outlines with their facts, in longitude and latitude where the image lies on Earth, else in pixels.

    inside: the value of all objects in the map, which is uint8 then.

    Raises RequestError where the file cannot say what the image does, and WorkError where it cannot be written.
    """
    check_target(job.target, kind, opened.place)
    if kind == "polygons":
        write_atomically(job.target, _outlined(opened, objects).encode())
        return
    if len(objects) > 65535:
        raise WorkError(f"{job.source}: {len(objects)} objects, a map holds 65535; ask for polygons")
    numbers = np.zeros(opened.size, np.uint16 if inside is None else np.uint8)
    for index in sorted(range(len(objects)), key=lambda i: -int(objects[i].mask.sum())):
        mask, (row, column), _ = objects[index]
        numbers[row : row + mask.shape[0], column : column + mask.shape[1]][mask] = inside or index + 1
    if job.target.suffix.lower() in PLACED:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_raster(job.target, numbers[None], georeference=opened.place)
        return
    file = io.BytesIO()
    library("PIL.Image").fromarray(numbers).save(file, format="PNG")
    write_atomically(job.target, file.getvalue())


def check_target(target: Path, kind: str, place: Georeference | None) -> None:
    """Raises RequestError where a file of this name cannot say where its image lies, or says that it lies somewhere."""
    suffix = target.suffix.lower()
    if kind == "classes" and suffix == ".png" and place is not None:
        raise RequestError(f"{target}: the image lies on Earth, which PNG cannot say; name a .tif file")
    if kind == "polygons" and suffix == ".geojson" and place is None:
        raise RequestError(
            f"{target}: the image has no coordinate reference system, and GeoJSON is in longitude and latitude; "
            "name a .json file for outlines in pixels"
        )


def _outlined(opened: Opened, objects: Sequence[Found]) -> str:
    features = []
    for number, (mask, at, facts) in enumerate(objects, 1):
        told: Mapping[str, Any] = {"object": number, **facts, "pixels": int(mask.sum())}
        geometry = outlines(mask, opened.place, at) if mask.size else None  # RFC 7946: a feature may lie nowhere
        features.append({"type": "Feature", "properties": told, "geometry": geometry})
    height, width = opened.size
    units = {} if opened.place is not None else {"units": "pixels", "width": width, "height": height}
    collection = {"type": "FeatureCollection", **units, "features": features}
    return json.dumps(collection, ensure_ascii=False, allow_nan=False) + "\n"
