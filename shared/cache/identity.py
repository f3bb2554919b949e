"""What the output of a frozen prefix depends on beside the image, as one hash: weights, settings, code, machine."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.attaching import stay_called
from shared.backbone import BlockBackbone
from shared.context import Context
from shared.errors import RequestError

_TORCHS = {*vars(nn.Module()), "_port"}  # attributes that every module has, or that hosts of adapters have
_NAMES = {"source", "name", "depths", "normed", "channels"}  # of a backbone: they say nothing of what blocks compute
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEP = 6


def modules(backbone: BlockBackbone, start: int) -> list[tuple[str, nn.Module]]:
    """All modules but those of the blocks from ``start`` on and of what comes after all blocks."""
    later = {id(m) for part in (*list(backbone.blocks)[start:], *backbone.later) for m in part.modules()}
    return [(path, module) for path, module in backbone.named_modules() if id(module) not in later]


def tensors(found: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Their frozen parameters and buffers. Those that train act behind the prefix, or there would be none."""
    for path, module in found:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not tensor.requires_grad:
                yield f"{path}.{name}", tensor


def describe(backbone: BlockBackbone, start: int, settings: Mapping[str, Any], outcome: Tensor) -> dict[str, Any]:
    """JSON-able: two prefixes with the same description compute the same.

    settings: further facts.  outcome: what the prefix makes of a fixed input, which shows what is not listed here.

    Raises RequestError where the source of a module cannot be read.
    """
    found = modules(backbone, start)
    configuration = {path: _configuration(module) for path, module in found}
    device = outcome.device
    return {
        **settings,
        "weights": _hash(f"{name}:{_text(tensor)}" for name, tensor in tensors(found)),
        "configuration": _hash([json.dumps(configuration)]),
        "code": _code([_type(module) for _, module in found], configuration),
        "libraries": _versions(found),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
            "matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "outcome": _text(outcome),
    }


def digest(description: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()


def _configuration(module: nn.Module) -> dict[str, Any]:
    """What a module is beside its tensors: type, plain attributes, hooks."""
    own = {key: value for key, value in vars(module).items() if key not in _TORCHS}
    if isinstance(module, BlockBackbone):
        own = {key: value for key, value in own.items() if key not in _NAMES}
    hooks = [hook for name in _HOOKS for hook in vars(module)[name].values() if hook is not stay_called]
    kind = _type(module)
    return {"": f"{kind.__module__}.{kind.__qualname__}", **_plain(own), "hooks": _plain(hooks)}


def _plain(value: Any, deep: int = 0) -> Any:
    """Any value as JSON, without what differs from one process to the next, such as addresses."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return _text(torch.as_tensor(value))
    if isinstance(value, (torch.dtype, torch.device, bytes)):
        return repr(value)
    if isinstance(value, (Context, nn.Module)):
        return type(value).__name__
    if deep == _DEEP:
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _plain(each, deep + 1) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, deep + 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, functools.partial):
        return [_plain(part, deep + 1) for part in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return [f"{type(value).__module__}.{type(value).__qualname__}", _plain(getattr(value, "__dict__", {}), deep + 1)]


def _code(kinds: Iterable[type], configuration: Any) -> dict[str, str]:
    """Hashes of the source files of these classes and their ancestors, of functions among the attributes, and ours."""
    names = {base.__module__ for kind in set(kinds) for base in kind.__mro__} | _functions(configuration)
    names -= {name for name in names if name.partition(".")[0] in ("torch", "builtins")}
    files = {}
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or not Path(file).is_file():
            raise RequestError(f"no source file of {name}, which the backbone is made of: its activations cannot be "
                               "kept, as nobody could tell when it changes")  # fmt: skip
        files[name] = Path(file)
    files |= {f"shared.cache.{path.stem}": path for path in Path(__file__).parent.glob("*.py")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def _functions(configuration: Any) -> set[str]:
    """Modules of the functions that the attributes name."""
    if isinstance(configuration, dict):
        return set().union(*map(_functions, configuration.values()))
    if isinstance(configuration, list):
        return set().union(*map(_functions, configuration))
    name = configuration.rpartition(".")[0] if isinstance(configuration, str) else ""
    while name and name not in sys.modules:
        name = name.rpartition(".")[0]
    return {name} if name and getattr(sys.modules[name], "__file__", None) else set()


def _versions(found: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    tops = {base.__module__.partition(".")[0] for _, module in found for base in _type(module).__mro__}
    versions = {top: str(getattr(sys.modules.get(top), "__version__", "")) for top in sorted(tops | {"torch"})}
    return {top: version for top, version in versions.items() if version}


def _type(module: nn.Module) -> type:
    """Its class, without the adapters that it may host."""
    return getattr(type(module), "_host_of", type(module))


def _text(tensor: Tensor) -> str:
    """Shape, dtype and a hash of every bit."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)}:{tensor.dtype}:{hashlib.sha256(data).hexdigest()}"


def _hash(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() + b"\n")
    return found.hexdigest()
