"""Segment Anything on files: the objects of images, all of them or those that prompts ask about, written as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modalities.images.asking import Asked, prompt_file, read_prompts
from modalities.images.object_files import Job, check_target, each_file, write_objects
from modalities.images.opening import Opener
from modalities.images.seeing import Found, Seer, asked_for, everything, views
from shared.adapted import Adapted
from shared.errors import RequestError

# Of SamAutomaticMaskGenerator, what may be set: whole numbers from 1, and numbers.
COUNTS = ("points_per_side", "points_per_batch")
LEVELS = ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset", "box_nms_thresh")


def find_files(
    model: Adapted, multimask: bool, device: torch.device, described: Mapping[str, Any], inputs: Sequence[Path],
    output: Path, *, kind: str | None = None, window: int | None = None, bands: Sequence[int] | None = None,
    prompts: Path | None = None, generator: Mapping[str, Any] | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Find the objects of every image of ``inputs`` and write them as ``object_files`` does.

    They are those that the image's file of prompts asks about (``asking.prompt_file``: ``prompts``, a file or a folder
    of them, else one beside the image); without one all that the library's generator finds, by its settings
    ``generator``.  described: of the data that the model was trained on.  window, bands: as of ``Opener``.

    Images of a run trained on whole images are brought to the size that it was trained on. Those of one trained on
    rasters are seen at their own resolution, in squares of the trained size where they are larger, and once as a whole.
    An image is held in memory. Raises as ``object_files.each_file``.
    """
    settings = _checked(dict(generator or {}))
    if settings and prompts is not None:
        raise RequestError("--generator finds all objects, --prompts those that are asked about: give one of them")
    opener = Opener(described, window, bands)
    if prompts is not None and not prompts.exists():
        raise RequestError(f"{prompts}: no such file or folder of prompts")
    if prompts is not None and not prompts.is_dir() and len(opener.files(inputs)) > 1:
        raise RequestError(f"{prompts}: several images have a file of prompts each; name their folder")
    seer = Seer(model, opener.side, opener.stretched, multimask, device)

    def make(job: Job, kind: str) -> str:
        opened = opener.open(job.source)
        check_target(job.target, kind, opened.place)
        source = prompt_file(job.source, prompts, job.inside)
        parts = views(opened.size, max(opened.size) if opener.stretched else opener.side)
        asked: list[Asked] | None = None if source is None else read_prompts(source, opened.size)
        if asked is None:
            objects = everything(seer, opened.image, opened.valid, parts, settings)
        else:
            objects = asked_for(seer, opened.image, opened.valid, parts, asked)
        write_objects(job, kind, opened, objects)
        return _said(opened.size, objects, source)

    each_file(opener, inputs, output, kind, overwrite, make)


def _said(size: tuple[int, int], objects: Sequence[Found], source: Path | None) -> str:
    empty = sum(not one.mask.size for one in objects)
    how = "found from a grid of points" if source is None else f"asked for by {source}"
    none = f", {empty} of them without a pixel" if empty else ""
    return f"{size[1]} x {size[0]} pixels: {len(objects)} object{'s' * (len(objects) != 1)} {how}{none}"


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name, value in settings.items():
        if name not in (*COUNTS, *LEVELS):
            raise RequestError(f"--generator {name}: no such setting (it has: {', '.join((*COUNTS, *LEVELS))})")
        whole = name in COUNTS
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or (whole and value < 1):
            raise RequestError(f"--generator {name}={value}: use a {'whole number from 1' if whole else 'number'}")
    return settings
