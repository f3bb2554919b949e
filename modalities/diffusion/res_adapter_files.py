"""The released files of ResAdapter: their names and keys, and reading them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from shared.errors import RequestError

LORA_FILES = ("pytorch_lora_weights.safetensors", "resolution_lora.safetensors")
NORM_FILES = ("diffusion_pytorch_model.safetensors", "resolution_normalization.safetensors")
_LORA_KEY = re.compile(r"lora_unet_\w+samplers_\d+_conv\.(lora_down\.weight|lora_up\.weight|alpha)")
_LEVEL = re.compile(r"(?:lora_unet_)?down_blocks[._](\d+)[._](resnets|downsamplers)")
_NORM_KEY = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+\.norm[12]\.(weight|bias)")


def other_base(given: Iterable[str], names: Iterable[str]) -> str:
    """How the base of a file with these keys differs from the one with those names; empty where that is not told."""
    theirs, mine = (_levels(keys) for keys in (given, names))
    known = {4: "4 levels, as Stable Diffusion 1.5", 3: "3 levels, as SDXL"}
    said = [known.get(count, f"{count} levels") for count in (theirs, mine)]
    return f"a base of {said[0]}, where here are {said[1]}" if theirs and mine and theirs != mine else ""


def _levels(keys: Iterable[str]) -> int:
    """Levels of the UNet that the keys are of; the last one has resnets but no downsampler."""
    found = [m for key in keys if (m := _LEVEL.match(key))]
    return max((int(m[1]) + (2 if m[2] == "downsamplers" else 1) for m in found), default=0)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The convolution and the normalisation tensors, told by their keys; from the known names, else from any name.

    folder: or one file, which is taken alone.
    """
    if not folder.exists():
        raise RequestError(f"{folder}: no such folder")
    alone = [] if folder.is_dir() else [folder]
    paths = alone or [folder / name for name in (*LORA_FILES, *NORM_FILES) if (folder / name).is_file()]
    found: dict[re.Pattern, tuple[Path, dict[str, Tensor]]] = {}
    for path in paths or sorted(folder.glob("*.safetensors")):
        tensors = _read(path)
        kind = next((p for p in (_LORA_KEY, _NORM_KEY) if any(p.fullmatch(key) for key in tensors)), None)
        if kind is None:
            if paths:
                raise RequestError(f"{path}: neither resampling convolutions nor resnet norms inside")
            continue
        if kind in found:
            raise RequestError(f"{folder}: {found[kind][0].name} and {path.name} hold the same part; keep one of them")
        found[kind] = (path, tensors)
    if not found:
        raise RequestError(f"{folder}: no ResAdapter here: looked for {' or '.join((*LORA_FILES, *NORM_FILES))}")
    return tuple(found.get(kind, (None, {}))[1] for kind in (_LORA_KEY, _NORM_KEY))  # type: ignore[return-value]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: cut short or not a safetensors file ({error})") from error
    if bad := [key for key, t in tensors.items() if not t.isfinite().all()]:
        raise RequestError(f"{path}: {bad[0]} holds a value that is not a finite number")
    return tensors
