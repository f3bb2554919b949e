"""What there is to know of one thing: a class and its settings, a recipe's text, what an adapter file holds."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from shared import catalog, recipe
from shared.errors import RequestError


def show(what: str) -> None:
    """Print a class with its settings, or the text of a recipe."""
    if what in recipe.names() or Path(what).is_file():
        print(recipe.locate(what).read_text(encoding="utf-8"), end="")
        return
    names = [*(e.name for e in catalog.entries()), *recipe.names()]
    if catalog.fold(what) not in map(catalog.fold, names):
        raise RequestError(f"nothing is called {what!r}{catalog.nearest(what, names)}; see omniadapt list")
    entry = catalog.find(what)
    print(f"{entry.name}: {entry.kind} of {entry.module}\n\n{entry.doc}\n")
    for a in entry.arguments:
        print(f"  {a.name}: {a.type}" + (" (must be given)" if a.required else f" = {a.default}"))


def inspect(file: Path) -> None:
    """Print what an adapter file, here or on the Hub, holds."""
    from shared.hub import local_file
    from shared.store import read_header

    file = local_file(file)
    header = read_header(file)
    method, backbone, tensors = header["method"], header["backbone"], header["tensors"]
    print(f"{file}: {file.stat().st_size:,} bytes, written by omniadapt {header['version']}")
    print(f"method    {method['type']} {_spell(method['arguments'])}")
    print(f"backbone  {backbone['name']}, fingerprint {backbone['fingerprint']}")
    print(f"metrics   {_spell(header['metrics']) or 'none'}")
    print(f"sites     {len(header['sites'])}")
    for key in header["sites"]:
        print(f"  {key}")
    print(f"tensors   {len(tensors)}, {sum(_size(t) for t in tensors.values()):,} values")
    for name, tensor in tensors.items():
        print(f"  {name}  {tensor['dtype']} {' x '.join(map(str, tensor['shape'])) or 'scalar'}")


def _spell(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={textwrap.shorten(str(value), 100)}"
        for key, value in values.items()
    )


def _size(tensor: dict[str, Any]) -> int:
    size = 1
    for extent in tensor["shape"]:
        size *= extent
    return size
