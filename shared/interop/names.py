"""Names of modules: those of the library's own model, with which other libraries' files name them, and ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from shared.backbone import Backbone
from shared.errors import RequestError

HOLDERS = ("model", "tower", "unet")  # where our backbones hold the library's model


def holder(backbone: nn.Module) -> str:
    """The prefix, with its dot, of the library's own model within a backbone; "" where the backbone is that model."""
    inside = backbone._modules if isinstance(backbone, Backbone) else {}
    return next((f"{name}." for name in HOLDERS if inside.get(name) is not None), "")


def whole_prefix(backbone: nn.Module) -> str:
    """What stands before the names of the library's model where it is a part of a larger one with a head ("model.")."""
    if getattr(backbone, "lm_head", None) is None:
        return ""
    base: Any = backbone._modules.get("model")
    name = getattr(base, "base_model_prefix", "")
    return f"{name}." if name else ""


def layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """The modules that have parameters of their own, by path."""
    return {path: module for path, module in backbone.named_modules() if any(_own(module))}


def _own(module: nn.Module) -> Iterable[bool]:
    return (parameter is not None for parameter in module._parameters.values())


def locate(backbone: nn.Module, names: Iterable[str], source: str, mark: str = ".") -> dict[str, str]:
    """The path in the backbone of each module that a file names.

    The same number of leading words, none of them an index, is taken off all names until each is the path of one
    module or the end of just one path. mark: what stands between words in the file, "_" in kohya's names.

    Raises RequestError naming the first that then still is none or several, and where two are the same module.
    """
    names = list(names)
    if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
        raise RequestError(f"{source}: {twice[0]} is named twice")
    ends: dict[str, list[str]] = {}
    paths = {path.replace(".", mark): path for path in layers(backbone)}
    for path in paths.values():
        words = path.split(".")
        for start in range(len(words)):
            ends.setdefault(mark.join(words[start:]), []).append(path)
    best: dict[str, list[str]] = {}
    fewest = (len(names) + 1, 0)
    words = {name: name.split(mark) for name in names}
    for count in range(min(map(len, words.values()))):
        if any(parts[count].isdigit() for parts in words.values()):
            break  # an index and the name of its list stay
        tails = {name: mark.join(parts[count:]) for name, parts in words.items()}
        found = {name: [paths[tail]] if tail in paths else ends.get(tail, []) for name, tail in tails.items()}
        wrong = [places for places in found.values() if len(places) != 1]
        if (len(wrong), wrong.count([])) < fewest:
            best, fewest = found, (len(wrong), wrong.count([]))
        if not wrong:
            break
    return _one_each(best, backbone, source)


def _one_each(found: dict[str, list[str]], backbone: nn.Module, source: str) -> dict[str, str]:
    owner = backbone.name if isinstance(backbone, Backbone) else type(backbone).__name__
    wrong = [name for name, places in found.items() if len(places) != 1]
    if wrong:
        places = found[wrong[0]]
        what = f"names {len(places)} modules ({', '.join(places[:2])})" if places else "names no module"
        fit = len(found) - len(wrong)
        raise RequestError(f"{source}: {fit} of its {len(found)} modules fit {owner}: {wrong[0]} {what}")
    taken: dict[str, str] = {}
    for name, (path,) in found.items():
        if path in taken:
            raise RequestError(f"{source}: {taken[path]} and {name} are one module of {owner}, {path}")
        taken[path] = name
    return {name: path for name, (path,) in found.items()}
