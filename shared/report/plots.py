"""Charts as SVG text that takes the page's colours, and arrays as pictures within the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
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
WRITTEN = 8  # classes of a confusion matrix whose numbers are written in
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


RIGHT, WRONG = "#d9dee2", "#c1272d"  # in a map of errors


class Pictures(NamedTuple):
    """What a task shows of its data.

    rows: caption, then (H, W, 3) uint8 arrays by label.  legends: what colours mean, by name, for each kind of picture.
    """

    rows: Sequence[tuple[str, Mapping[str, np.ndarray]]]
    legends: Mapping[str, Mapping[str, str]]


def curves(series: Series, x: str) -> str:
    """Lines through (xs, ys) points by name, over whole numbers; names are shown where there are several."""
    from matplotlib.ticker import MaxNLocator

    lines_of_names = math.ceil(len(series) / 2) if len(series) > 1 else 0
    figure, axes = _axes(x, size=(4.4, 2.5 + 0.2 * lines_of_names))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for (name, (xs, ys)), colour in zip(series.items(), _cycle(len(series)), strict=True):
        axes.plot(xs, ys, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) < 2 else "")
    if len(at := {x for xs, _ in series.values() for x in xs}) == 1:
        axes.set_xticks(list(at))
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=INK)
    return _svg(figure)


def scatter(points: Mapping[str, tuple[float, float, float]], x: str, y: str) -> str:
    """Named points (x, y, spread of y) over a logarithmic x; names stand clear of points and of each other."""
    figure, axes = _axes(x, y)
    axes.set_xscale("log")
    colours = _cycle(len(points))
    for (at, value, spread), colour in zip(points.values(), colours, strict=True):
        axes.errorbar([at], [value], yerr=[spread] if spread > 0 else None, fmt="o", color=colour, capsize=3)
    axes.margins(x=0.12, y=0.15)
    _few_decades(axes, [at for at, _, _ in points.values()])
    _label(figure, axes, points, colours)
    return _svg(figure)


def _few_decades(axes: Any, xs: Sequence[float]) -> None:
    """Ticks that can be read: 1, 2 and 5 of each decade where there are few decades; 20k for 20,000."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if high / low < 10:  # one method, or methods alike
        axes.set_xlim(min(xs) / 2, max(xs) * 2)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(figure: Any, axes: Any, points: Mapping[str, tuple[float, float, float]], colours: Sequence[str]) -> None:
    """Put each name at the nearest place where it covers nothing, with a line to its point where that is far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale, frame = figure.dpi / 72, axes.get_window_extent(renderer)
    taken = []
    for at, value, spread in points.values():
        (left, low), (right, high) = axes.transData.transform([(at, value - spread), (at, value + spread)])
        taken.append(Bbox([[left - 5 * scale, low - 5 * scale], [right + 5 * scale, high + 5 * scale]]))
    for (name, (at, value, _)), colour in zip(points.items(), colours, strict=True):
        text = axes.annotate(
            name, (at, value), xytext=(0, 0), textcoords="offset points", color=INK, fontsize=9, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        for across, along, side in _places():
            text.set_horizontalalignment(side)
            text.set_position((across, along))
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(scale)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        if math.hypot(across, along) < 12:
            text.arrow_patch.set_visible(False)
        taken.append(box)


def _places() -> Iterator[tuple[float, float, str]]:
    """Offsets in points from a point, near ones first, with the side of the text that is there."""
    for far in range(9, 120, 6):
        yield from ((far, 0, "left"), (-far, 0, "right"), (0, far + 2, "center"), (0, -far - 2, "center"))
        for up in (far * 0.7, -far * 0.7):
            yield from ((far * 0.7, up, "left"), (-far * 0.7, up, "right"))


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Counts (rows truth, columns prediction) as squares, coloured by their share of the row, with share and count
    written in where there are at most ``WRITTEN`` classes."""
    from matplotlib.colors import to_rgba

    table = np.asarray(counts, float)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(max(3.4, 1.4 + 0.19 * len(names)), 12)
    figure, axes = _axes("prediction", "truth", (max(side, 4.4), side))
    colour = np.broadcast_to(to_rgba(COLOURS[0]), (*shares.shape, 4)).copy()
    colour[..., 3] = 0.04 + 0.96 * shares
    edges = {"edgecolors": INK, "linewidth": 0.3} if len(names) <= WRITTEN else {}
    axes.pcolormesh(colour, rasterized=len(names) > 30, **edges)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    short = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    centres = np.arange(len(names)) + 0.5
    wide = len(names) > 4 or max(map(len, short)) > 11
    axes.set_xticks(centres, short, fontsize=9, rotation=45 if wide else 0, ha="right" if wide else "center")
    axes.set_yticks(centres, short, fontsize=9)
    if len(names) <= WRITTEN:
        for row, column in np.ndindex(shares.shape):
            told = f"{shares[row, column]:.0%}"
            if len(names) <= 5:
                told += f"\n{int(table[row, column]):,}"
            ink = "#ffffff" if shares[row, column] > 0.55 else INK
            axes.text(column + 0.5, row + 0.5, told, ha="center", va="center", fontsize=8.5, color=ink)
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


def mistakes(truth: np.ndarray, said: np.ndarray, ignore: int) -> np.ndarray:
    """Two (H, W) masks of class indices as a map of what is RIGHT and WRONG, (H, W, 3) uint8; ignored pixels black."""
    return paint(np.where(truth == ignore, ignore, (truth != said).astype(int)), (RIGHT, WRONG), ignore)


def _cycle(count: int) -> list[str]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(c) for c in matplotlib.colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))]


def _axes(x: str, y: str = "", size: tuple[float, float] = (4.4, 2.8)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
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
        # Tight: the layout is made for the ticks before it, and what comes out may need wider labels.
        facts = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", metadata=facts, bbox_inches="tight", pad_inches=0.04)
    text = buffer.getvalue().replace(INK, "currentColor")
    return text[text.index("<svg") :]
