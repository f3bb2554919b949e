"""Charts as SVG text that takes the page's colours, and arrays as pictures within the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

INK = "#010203"  # drawn in this colour by matplotlib, in the page's ink in the end
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#999999",
)  # Okabe and Ito, 2008
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


class Pictures(NamedTuple):
    """What a task shows of its data. rows: caption, then (H, W, 3) uint8 arrays by label.  colours: by class."""

    rows: Sequence[tuple[str, Mapping[str, np.ndarray]]]
    colours: Mapping[str, str]


def curves(series: Series, x: str) -> str:
    """Lines through (xs, ys) points by name, over whole numbers; names are shown where there are several."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(x)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for (name, (xs, ys)), colour in zip(series.items(), _cycle(len(series)), strict=True):
        axes.plot(xs, ys, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) < 2 else "")
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK)
    return _svg(figure)


def scatter(points: Mapping[str, tuple[float, float, float]], x: str, y: str) -> str:
    """Named points (x, y, spread of y) over a logarithmic x."""
    figure, axes = _axes(x, y)
    axes.set_xscale("log")
    for (name, (at, value, spread)), colour in zip(points.items(), _cycle(len(points)), strict=True):
        axes.errorbar([at], [value], yerr=[spread] if spread > 0 else None, fmt="o", color=colour, capsize=3)
        axes.annotate(name, (at, value), xytext=(0, 8), textcoords="offset points", ha="center", color=INK)
    axes.margins(x=0.18, y=0.22)
    return _svg(figure)


def png(pixels: np.ndarray) -> str:
    """An (H, W, 3) uint8 array as a data address."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """A colour for each class, told apart by colour-blind readers up to eight."""
    return dict(zip(classes, _cycle(len(classes)), strict=True))


def paint(mask: np.ndarray, colours: Sequence[str], ignore: int) -> np.ndarray:
    """An (H, W) mask of class indices as (H, W, 3) uint8 colours; ignored pixels are black."""
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], dtype=np.uint8)
    painted = palette[np.clip(mask, 0, len(colours) - 1)]
    painted[mask == ignore] = 0
    return painted


def _cycle(count: int) -> list[str]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(c) for c in matplotlib.colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))]


def _axes(x: str, y: str = "") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "omniadapt", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    return text[text.index("<svg") :]
