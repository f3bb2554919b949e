"""The adapter file: one safetensors file of trained tensors with JSON metadata, written whole or not at all."""

from __future__ import annotations

import functools
import io
import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from shared import masks
from shared.errors import RequestError, WorkError

FORMAT = 1
KEY = "omniadapt"
KEYS = ("method", "backbone", "sites", "metrics", "version", "extra")  # of every header, beside the format


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header: to a temporary name beside ``path``, flushed, then renamed; see ``shared.masks``."""
    from safetensors.torch import save_file

    if not tensors:
        raise RequestError(f"{path}: nothing to save: no trained tensor")
    path = Path(path)
    tensors, masked = masks.pack(tensors)
    header = {"format": FORMAT, **header, **({"masked": masked} if masked else {})}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _replace(path, lambda temporary: save_file(whole, temporary, metadata={KEY: text}))


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new, also after a power cut.

    Raises WorkError where the disk refuses (full, read-only); ``path`` is then as it was.
    """
    _replace(path, lambda temporary: temporary.write_bytes(data))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to the disk, and put it in place of ``path``."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:  # its own word for what the disk refuses
        raise WorkError(f"{path}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of an adapter file plus ``tensors`` (name to dtype and shape), without reading the tensors.

    Raises RequestError where the file is missing, cannot be read, is cut short, no safetensors file, or none of ours.
    """
    path = Path(path)
    with _opened(path) as file:
        return _parsed(path, os.fstat(file.fileno()).st_size, file.read)


def _parsed(path: Path, size: int, read: Callable[[int], bytes]) -> dict[str, Any]:
    """``read_header`` of a file of ``size`` bytes, from its beginning."""
    start = read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= size - 8:
        raise RequestError(f"{path}: cut short or not a safetensors file ({size} bytes)")
    try:
        entries = json.loads(read(length))
        metadata = entries.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {name: {"dtype": e["dtype"], "shape": tuple(e["shape"])} for name, e in sorted(entries.items())}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RequestError(f"{path}: not a safetensors file (its header does not parse)") from error
    if size != 8 + length + end:
        raise RequestError(f"{path}: cut short: {size} bytes where its header promises {8 + length + end}")
    return {**_header(path, metadata), "tensors": tensors}


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the header of an adapter file, read at one go; errors as ``read_header``."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    with _opened(path) as file:
        data = file.read()
    header = _parsed(path, len(data), io.BytesIO(data).read)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise RequestError(f"{path}: not a safetensors file ({error})") from error
    return masks.unpack(tensors, header.pop("masked", {}), str(path)), header


def _opened(path: Path) -> IO[bytes]:
    check_readable(path)
    return open(path, "rb")


def check_readable(path: Path) -> None:
    """Raises RequestError that says what is the matter with a file that cannot be read."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise RequestError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'a pipe or device'}, not a file")
        open(path, "rb").close()
    except FileNotFoundError:
        what = "a link that leads nowhere" if path.is_symlink() else "no such file"
        raise RequestError(f"{path}: {what}") from None
    except OSError as error:  # no permission, a link to itself, a failing disk
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error


def _header(path: Path, metadata: Any) -> dict[str, Any]:
    try:
        header = json.loads(metadata[KEY])
        version = header["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise RequestError(f"{path}: a safetensors file, but not an omniadapt adapter (no {KEY!r} metadata)") from error
    if version != FORMAT:
        raise RequestError(f"{path}: adapter format {version}; this version reads format {FORMAT}")
    if missing := [key for key in KEYS if key not in header]:
        raise RequestError(f"{path}: its header lacks {missing[0]!r}; write it anew")
    return header


def save_adapter(model: Any, path: str | os.PathLike, metrics: Mapping[str, float], extra: Mapping[str, Any]) -> None:
    """Write the one active adapter of an adapted model and its head."""
    prefix = f"adapter.{only_active(model, path)}."
    tensors = {_swap(n, prefix, "adapter."): t for n, t in model.trained_state().items()}
    save(path, tensors, header(model, path, metrics, extra))


def header(
    model: Any, path: str | os.PathLike, metrics: Mapping[str, float], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """What a file says of the one active adapter of a model."""
    name = only_active(model, path)
    method, digests = model.methods[name], model.methods[name].digests(model)
    described = {"type": type(method).__name__, "arguments": method.arguments()}
    return {
        "method": {**described, "digests": digests} if digests else described,
        "backbone": {"name": model.backbone_name, "fingerprint": model.fingerprint},
        "sites": list(model.bank[name]),
        "metrics": dict(metrics),
        "version": _version(),
        "extra": dict(extra),
    }


def load_adapter(model: Any, path: str | os.PathLike, other_backbone: bool, head: bool = True) -> dict[str, Any]:
    """Fill the one active adapter and the head from a file; nothing is changed where anything does not fit.

    head: whether the file's head is taken; if not, the model keeps its own.
    """
    from shared.hub import local_file

    tensors, header = read(local_file(path))
    check_belongs(model, header, path, other_backbone)
    if not head:
        kept = {n: t for n, t in model.trained_state().items() if n.startswith("head.")}
        tensors = {n: t for n, t in tensors.items() if not n.startswith("head.")} | kept
    prefix = f"adapter.{only_active(model, path)}."
    model.load_trained_state({_swap(n, "adapter.", prefix): t for n, t in tensors.items()}, str(path))
    return header


def check_belongs(model: Any, header: Mapping[str, Any], path: str | os.PathLike, other_backbone: bool) -> None:
    """Raises RequestError where a file is for another backbone (unless that is asked for), another method, or one that
    works through other adapters than the file's did (by whatever names)."""
    theirs, mine = header["backbone"], model.fingerprint
    if theirs["fingerprint"] != mine and not other_backbone:
        raise RequestError(
            f"{path}: made for backbone {theirs['name']} with fingerprint {theirs['fingerprint']}; this is "
            f"{model.backbone_name} with {mine}. Load the same weights, or pass other_backbone=True"
        )
    wanted, method = header["method"]["type"], type(model.methods[only_active(model, path)]).__name__
    if method != wanted:
        raise RequestError(f"{path}: an adapter of method {wanted}; the active one is {method}")
    told = header["method"].get("digests", {})
    mine = model.methods[only_active(model, path)].digests(model)
    if sorted(told.values()) != sorted(mine.values()):
        strange = [name for name, digest in mine.items() if digest not in told.values()]
        missing = [name for name, digest in told.items() if digest not in mine.values()]
        raise RequestError(
            f"{path}: made with other adapters: {', '.join(strange) or 'none'} of this {method} "
            f"changed since or was not among them, {', '.join(missing) or 'none'} of theirs is not here"
        )


def only_active(model: Any, path: str | os.PathLike) -> str:
    """The name of the adapter a file is about; RequestError where not exactly one is active."""
    if len(model.active) != 1:
        raise RequestError(f"{path}: one adapter a file; active are {', '.join(model.active) or 'none'}")
    return model.active[0]


def _swap(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


@functools.cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("omniadapt")
    except PackageNotFoundError:
        return "uninstalled"
