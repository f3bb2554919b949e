"""What ``omniadapt generate`` asks of a task, and what the task gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asked for; None: as the recipe's published setting says.

    prompt, negative: what to show and what not.  size: pixels, (height, width).  count: how many images or videos.
    views: cameras around an object.  frames: of a video.  image: a reference or first frame, with or without alpha.
    mesh: a file of a mesh.  steps, guidance: of the sampler.  seed: of everything random.
    """

    prompt: str = ""
    negative: str | None = None
    size: tuple[int, int] | None = None
    count: int = 1
    views: int | None = None
    frames: int | None = None
    image: Path | None = None
    mesh: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Made:
    """What came of it.

    kind: single images, the views of one object, or the frames of one video; ``images`` of each group, uint8
    (N, H, W, 3), or (N, H, W, 4) with alpha.  settings: all that is needed to make it again, JSON-able.
    names: of the N (such as "front").  rate: frames a second.  files: further files by name, such as a textured mesh.
    """

    kind: Literal["images", "views", "frames"]
    images: list[np.ndarray]
    settings: Mapping[str, Any]
    names: tuple[str, ...] = ()
    rate: float = 8.0
    files: Mapping[str, bytes] = field(default_factory=dict)
