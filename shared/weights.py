"""Where a backbone's weights come from: a seed, the hub or a file, which must fit the model tensor by tensor."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shared.errors import RequestError
from shared.store import check_readable

M = TypeVar("M", bound=nn.Module)

PREFIXES = ("module.", "backbone.", "model.")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher", "encoder")
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
CLASSIFIERS = ("head.", "head_dist.", "fc.")


def build(make: Callable[[], M], seed: int) -> M:
    """A module whose random weights depend on ``seed`` alone, on the default device; all random states are kept.

    It is made on the CPU first, so that the same seed gives the same weights on every device; on "meta" it stays there.
    """
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every accelerator
        model = make()
    return model if device.type == "meta" else model.to(device)


def check_choice(name: str, weights: str, checkpoint: str | None) -> None:
    """Raises RequestError where random weights and those of a file are asked for at once."""
    if weights == "random" and checkpoint is not None:
        raise RequestError(f"{name}: weights 'random' and checkpoint {checkpoint!r} exclude each other")


def is_meta(model: nn.Module) -> bool:
    """Whether a model has shapes only: nothing is read or fetched for it."""
    return any(p.is_meta for p in model.parameters())


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without wrappers (``state_dict``) or a prefix all names share.

    Raises RequestError where the file is missing, is no .safetensors, .pt, .pth, .bin or .ckpt file of tensors, is
    damaged, or holds a number that is not finite. Nothing is unpickled but tensors.
    """
    path = Path(path)
    check_readable(path)
    return clean(_tensors(path), f"checkpoint {path}")


def _tensors(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.name.endswith(SUFFIXES):
            with warnings.catch_warnings(action="ignore"):  # that a TorchScript archive is none of ours, said below
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(f"checkpoint {path}: it holds more than tensors, or is no torch file; not loaded") from error
    except Exception as error:  # whatever the readers make of bytes that are none of theirs
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise RequestError(f"checkpoint {path}: it cannot be read as plain tensors ({reason})") from error
    raise RequestError(f"checkpoint {path}: use a file that ends in .safetensors or {', '.join(SUFFIXES)}")


def fetch(name: str, repository: str, files: Sequence[str]) -> Path:
    """The first of ``files`` that a hub repository has, from the local cache or downloaded into it.

    Raises RequestError with the command that gets the file, and how to pass it, where it cannot be fetched.
    """
    import huggingface_hub as hub
    from huggingface_hub.constants import ENDPOINT

    cached = [found for file in files if isinstance(found := hub.try_to_load_from_cache(repository, file), str)]
    if cached:
        return Path(cached[0])
    try:
        hub.get_session().head(ENDPOINT, timeout=10)  # offline is known at once, without retries
        present = [file for file in files if hub.file_exists(repository, file)]
        return Path(hub.hf_hub_download(repository, (present or files)[0]))
    except Exception as error:  # whatever the client raises: offline, gated, gone
        reason = str(error).strip().split("\n")[0]
        raise RequestError(
            f"{name}: its weights cannot be fetched ({type(error).__name__}: {reason}); where there is a network run "
            f"`hf download {repository} {files[0]}` and add checkpoint=FILE with the path it prints"
        ) from error


def clean(state: Any, source: str) -> dict[str, Tensor]:
    """``state`` as {name: tensor}: out of its wrappers, without shared prefixes, every number finite."""
    while isinstance(state, Mapping) and (inner := next((state[w] for w in WRAPPERS if _wraps(state, w)), None)):
        state = inner
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise RequestError(f"{source}: it holds no state dict, a mapping of names to tensors")
    state = dict(state)
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RequestError(f"{source}: tensor {name} holds numbers that are not finite")
    return state


def _wraps(state: Mapping[str, Any], name: str) -> bool:
    return isinstance(state.get(name), Mapping) and len(state[name]) > 0


def fill(model: nn.Module, state: Mapping[str, Tensor], name: str, source: str) -> None:
    """Copy ``state`` into ``model``; every tensor must have its place, a classification head apart.

    Raises RequestError with counts and first names of what is missing, unexpected or of another shape; nothing is
    changed then.
    """
    mine = model.state_dict()
    state = {n: t for n, t in state.items() if n in mine or not n.startswith(CLASSIFIERS)}
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(t.shape)}"
        for n, t in mine.items()
        if n in state and state[n].shape != t.shape
    ]
    missing, extra = [n for n in mine if n not in state], [n for n in state if n not in mine]
    if missing or extra or shapes:
        fit = len(mine) - len(missing) - len(shapes)
        kinds = (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        wrong = [f"{len(found)} {what} ({_first(found)})" for what, found in kinds if found]
        raise RequestError(f"{source}: {fit} of the {len(mine)} tensors of {name} are there; {'; '.join(wrong)}")
    model.load_state_dict(state)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
