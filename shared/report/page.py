"""One self-contained HTML page: inline style, escaped text; reads well on a phone, on paper, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from shared.store import write_atomically


def page(title: str, *parts: str) -> str:
    """A whole document; ``parts`` are HTML made by this module's functions."""
    heading = escape(title).replace("/", "/<wbr>").replace("_", "_<wbr>")  # long names of recipes break there
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{heading}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def write(path: Path, document: str) -> None:
    """Write the page whole or not at all."""
    write_atomically(path, document.encode())


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def lead(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def links(targets: Mapping[str, str]) -> str:
    """Addresses by name; relative ones, within the folder of the page."""
    return (
        "<ul>"
        + "".join(f'<li><a href="{escape(to)}">{escape(name)}</a></li>' for name, to in targets.items())
        + "</ul>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1) -> str:
    """Rows of text; the columns from index ``numbers`` on are right-aligned. On a phone a row of more than three
    columns becomes a list, each cell with its head before it."""

    def cells(tag: str, row: Sequence[str]) -> str:
        named = [f' data-head="{escape(head)}"' if tag == "td" and head and i else "" for i, head in enumerate(heads)]
        kind = [' class="number"' if i >= numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{k}{n}>{escape(text)}</{tag}>" for k, n, text in zip(kind, named, row, strict=True))

    head = f"<thead><tr>{cells('th', heads)}</tr></thead>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "facts" if len(heads) <= 3 else "wide"
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def bars(values: Mapping[str, float | None], counts: Mapping[str, float | None], unit: str = "px") -> str:
    """Named shares of 1 as bars with their numbers and, where known, how many of ``unit`` they rest on."""
    rows = []
    for name, value in values.items():
        width = f"{100 * min(max(value or 0, 0), 1):.1f}%"
        bar = f'<span class="bar"><i style="width:{width}"></i></span>'
        count = counts.get(name)
        share = "–" if value is None else f"{value:.3f}"
        support = "" if count is None else f"{count:,.0f} {unit}"
        numbers = f'<td class="number">{share}</td><td class="number soft">{support}</td>'
        rows.append(f"<tr><td>{escape(name)}</td><td>{bar}</td>{numbers}</tr>")
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'


def figures(charts: Mapping[str, str]) -> str:
    """Charts (SVG text) by caption, side by side where there is room."""
    items = [f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in charts.items()]
    return f'<div class="figures">{"".join(items)}</div>'


def pictures(caption: str, images: Mapping[str, str]) -> str:
    """Images (data addresses) by label, side by side under one caption."""
    many = " many" if len(images) > 3 else ""
    items = [
        f'<figure><img alt="{escape(label)} of {escape(caption)}" src="{escape(source)}">'
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for label, source in images.items()
    ]
    return f'<div class="pictures{many}" style="--n: {len(images)}"><p>{escape(caption)}</p>{"".join(items)}</div>'


def gallery(rows: Iterable[str]) -> str:
    """Rows of ``pictures``, two beside each other where there is room."""
    return f'<div class="gallery">{"".join(rows)}</div>'


def legend(colours: Mapping[str, str], title: str = "") -> str:
    """What each colour means, after what they are the colours of."""
    head = f"<li><b>{escape(title)}</b></li>" if title else ""
    items = [f'<li><i style="background:{escape(c)}"></i>{escape(name)}</li>' for name, c in colours.items()]
    return f'<ul class="legend">{head}{"".join(items)}</ul>'
