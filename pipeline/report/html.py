"""Blocks -> one HTML page that needs nothing else: styles inside, pictures as data, no script; every string is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from pipeline.report.blocks import Answer, Block, Bullets, Example, Examples, Folded, Grid, Heading, Picture, Text

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5c6873; --line: #dfe4e8; --paper: #ffffff; --shade: #f4f6f8;
  --bar: #b9c3cc; --hit: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7eb; --soft: #98a4af; --line: #2e363e; --paper: #14181c;
  --shade: #1c2228; --bar: #4a5560; --hit: #3aa0e0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 3.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 1.5rem; font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 3.5rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.25rem; font-weight: 650; }
h3 { margin: 2rem 0 .75rem; font-size: 1rem; font-weight: 600; }
p, ul { max-width: 46rem; margin: .75rem 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
figure { margin: 1.75rem 0; }
figcaption { max-width: 46rem; margin-top: .6rem; color: var(--soft); font-size: .85rem; line-height: 1.5;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.wide img { display: block; width: 100%; min-width: 42rem; height: auto; }
table { border-collapse: collapse; min-width: 24rem; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
th.word, td.word { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
th:first-child, td.word:first-child { overflow-wrap: break-word; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .55rem .9rem; }
summary { cursor: pointer; font-weight: 600; font-size: .9rem; overflow-wrap: anywhere; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.example { display: grid; grid-template-columns: 5rem minmax(0, 1fr); gap: 1rem; padding: 1rem; background: var(--shade);
  border-radius: .5rem; font-size: .8rem; line-height: 1.4; }
.example img, .blank { width: 5rem; height: 5rem; object-fit: contain; background: #fff; border-radius: .35rem; }
.blank { display: grid; place-items: center; padding: .5rem; text-align: center; background: var(--line); color: var(--soft); }
.id { display: block; margin-top: .4rem; color: var(--soft); overflow-wrap: anywhere; }
.truth { font-weight: 600; margin-bottom: .4rem; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .4rem 1.25rem; }
.method { color: var(--soft); overflow-wrap: anywhere; }
.class { display: flex; white-space: nowrap; justify-content: space-between; gap: .5rem; }
.class span:first-child { overflow: hidden; text-overflow: ellipsis; }
.hit { font-weight: 600; }
.bar { height: .25rem; margin: .05rem 0 .35rem; background: var(--line); border-radius: .2rem; overflow: hidden; }
.bar div { height: 100%; background: var(--bar); }
.bar.right div { background: var(--hit); }
@media (max-width: 32rem) { .examples { grid-template-columns: 1fr; } .example { grid-template-columns: 1fr; } }
"""
# Were a string ever to slip through unescaped, the page still may neither run nor load anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """A string that is HTML already; any other string is text."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """An element; children that are no `Markup` are escaped, and so are all attributes ("class_" is class)."""
    head = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{head}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Several children as one, escaped as by `tag`."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def image(data: bytes, media_type: str, alt: str) -> Markup:
    """An image inside the page."""
    content = base64.b64encode(data).decode("ascii")
    return Markup(f'<img src="data:{media_type};base64,{content}" alt="{html.escape(alt)}">')


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one HTML document."""
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    body = tag("body", tag("h1", title), *(_block(block) for block in blocks))
    return f"<!doctype html>\n{tag('html', tag('head', *head), Markup(chr(10)), body, lang='en')}\n"


def _block(block: Block) -> Markup:
    match block:
        case Heading(text):
            return tag("h2", text)
        case Text(text):
            return tag("p", text)
        case Bullets(items):
            return tag("ul", *(tag("li", item) for item in items))
        case Grid():
            return tag("figure", tag("div", _table(block), class_="wide"), tag("figcaption", block.caption))
        case Picture(svg, alt, caption):
            return tag("figure", tag("div", image(svg, "image/svg+xml", alt), class_="wide"), tag("figcaption", caption))
        case Examples(title, items):
            return join([tag("h3", title), tag("div", *(_example(item) for item in items), class_="examples")])
        case Folded(summary, blocks):
            return tag("details", tag("summary", summary), *(_block(inner) for inner in blocks))


def _table(grid: Grid) -> Markup:
    def row(cell: str, values: Sequence[str]) -> Markup:
        return tag("tr", *(tag(cell, value, class_="word" if i < grid.words else "number") for i, value in enumerate(values)))

    return tag("table", tag("thead", row("th", grid.columns)), tag("tbody", *(row("td", values) for values in grid.rows)))


def _example(example: Example) -> Markup:
    shown = bool(example.thumbnail)
    picture = image(example.thumbnail, "image/png", example.id) if shown else tag("div", "not available", class_="blank")
    truth = tag("div", ", ".join(example.labels), class_="truth")
    answers = tag("div", *(_answer(answer) for answer in example.answers), class_="answers")
    return tag("div", tag("div", picture, tag("span", example.id, class_="id")), tag("div", truth, answers), class_="example")


def _answer(answer: Answer) -> Markup:
    parts = [tag("div", answer.method, class_="method")]
    for name, confidence, is_label in answer.classes:
        words = [tag("span", f"✓ {name}" if is_label else name, title=name), tag("span", f"{100 * confidence:.0f} %")]
        parts.append(tag("div", *words, class_="class hit" if is_label else "class"))
        bar = tag("div", style=f"width: {100 * confidence:.1f}%")
        parts.append(tag("div", bar, class_="bar right" if is_label else "bar"))
    return tag("div", *parts)
