"""One self-contained HTML page: inline style, escaped text; reads well on a phone, on paper, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from shared.store import write_atomically

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2328; --soft: #5b6770; --line: #d8dee3; --page: #ffffff; --card: #f5f7f8; --mark: #0b6e99; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ec; --soft: #9aa7b0; --line: #343d44; --page: #14191d; --card: #1d2429; --mark: #5bb8de; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.25rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
p { margin: .4rem 0; }
.lead { color: var(--soft); }
.note { border-left: 3px solid var(--mark); background: var(--card); padding: .5rem .75rem; margin: .75rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 600; color: var(--soft); }
td.number, th.number { text-align: right; white-space: nowrap; }
tr { break-inside: avoid; }
.bar { display: inline-block; width: min(11rem, 34vw); height: .6rem; background: var(--line); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--mark); border-radius: 2px; }
.pictures { display: grid; gap: .35rem; margin-bottom: 1rem; break-inside: avoid; }
.pictures img { width: 100%; display: block; border-radius: 3px; image-rendering: pixelated; }
.pictures p { grid-column: 1 / -1; margin: 0; font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; margin: .5rem 0; list-style: none; font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; border: 1px solid var(--soft); }
pre { background: var(--card); padding: .75rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; border-radius: 4px; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #f4f4f4; --mark: #0b6e99; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def page(title: str, *parts: str) -> str:
    """A whole document; ``parts`` are HTML made by this module's functions."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
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


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1) -> str:
    """Rows of text; the columns from index ``numbers`` on are right-aligned."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kind = [' class="number"' if i >= numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{k}>{escape(text)}</{tag}>" for k, text in zip(kind, row, strict=True))

    head = f"<thead><tr>{cells('th', heads)}</tr></thead>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def bars(values: Mapping[str, float]) -> str:
    """Named shares of 1 as bars with their numbers; one that is not a number shows as a dash."""
    rows = []
    for name, value in values.items():
        known = value == value
        width = f"{100 * min(max(value, 0), 1):.1f}%" if known else "0"
        bar = f'<span class="bar"><i style="width:{width}"></i></span>'
        text = f"{value:.3f}" if known else "–"
        rows.append(f'<tr><td>{escape(name)}</td><td>{bar}</td><td class="number">{text}</td></tr>')
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def figures(charts: Mapping[str, str]) -> str:
    """Charts (SVG text) by caption, side by side where there is room."""
    items = [f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for caption, svg in charts.items()]
    return f'<div class="figures">{"".join(items)}</div>'


def pictures(caption: str, images: Mapping[str, str]) -> str:
    """Images (data addresses) by label, side by side under one caption."""
    columns = f"grid-template-columns: repeat({len(images)}, minmax(0, 1fr))"
    items = [
        f'<figure><img alt="{escape(label)} of {escape(caption)}" src="{escape(source)}">'
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for label, source in images.items()
    ]
    return f'<div class="pictures" style="{columns}"><p>{escape(caption)}</p>{"".join(items)}</div>'


def legend(colours: Mapping[str, str]) -> str:
    items = [f'<li><i style="background:{escape(c)}"></i>{escape(name)}</li>' for name, c in colours.items()]
    return f'<ul class="legend">{"".join(items)}</ul>'
