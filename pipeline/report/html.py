"""Render the blocks of a report as one HTML page that needs no other file.

Styles are inside the page, images are embedded as data, and there is no script. Every string is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from pipeline.report.blocks import (
    Block,
    BulletList,
    ClassPredictions,
    CollapsibleSection,
    ExampleCard,
    ExampleGroup,
    Heading,
    Paragraph,
    SvgFigure,
    Table,
)

PAGE_STYLE = """
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
# A second protection: if a string were ever written without escaping, the page could still not run or load anything.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """A string that is HTML already; `tag` and `join_markup` escape every other string."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """Return an HTML element; children that are not `Markup` and the values of all attributes are escaped.

    Args:
        name: Name of the element, such as "div".
        children: Content of the element.
        attributes: HTML attributes. A trailing underscore is removed, so that `class_` gives "class".
    """
    head = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{head}>{join_markup(children)}</{name}>")


def join_markup(children: Iterable[str]) -> Markup:
    """Join several children into one string; those that are not `Markup` are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def inline_image(data: bytes, media_type: str, alt: str) -> Markup:
    """Return an image element whose data are inside the page."""
    content = base64.b64encode(data).decode("ascii")
    return Markup(f'<img src="data:{media_type};base64,{content}" alt="{html.escape(alt)}">')


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Return the report as one HTML document."""
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(CONTENT_SECURITY_POLICY)}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(PAGE_STYLE)),
    ]
    body = tag("body", tag("h1", title), *(_render_block(block) for block in blocks))
    return f"<!doctype html>\n{tag('html', tag('head', *head), Markup(chr(10)), body, lang='en')}\n"


def _render_block(block: Block) -> Markup:
    match block:
        case Heading(text):
            return tag("h2", text)
        case Paragraph(text):
            return tag("p", text)
        case BulletList(items):
            return tag("ul", *(tag("li", item) for item in items))
        case Table():
            return tag("figure", tag("div", _render_table(block), class_="wide"), tag("figcaption", block.caption))
        case SvgFigure(svg, alt, caption):
            image = inline_image(svg, "image/svg+xml", alt)
            return tag("figure", tag("div", image, class_="wide"), tag("figcaption", caption))
        case ExampleGroup(title, cards):
            return join_markup([tag("h3", title), tag("div", *(_render_card(card) for card in cards), class_="examples")])
        case CollapsibleSection(summary, blocks):
            return tag("details", tag("summary", summary), *(_render_block(inner) for inner in blocks))


def _render_table(table: Table) -> Markup:
    def render_row(cell_tag: str, values: Sequence[str]) -> Markup:
        css_classes = ["word" if table.is_text(column) else "number" for column in range(len(values))]
        return tag("tr", *(tag(cell_tag, value, class_=name) for value, name in zip(values, css_classes, strict=True)))

    body = tag("tbody", *(render_row("td", values) for values in table.rows))
    return tag("table", tag("thead", render_row("th", table.columns)), body)


def _render_card(card: ExampleCard) -> Markup:
    is_shown = bool(card.thumbnail)
    picture = inline_image(card.thumbnail, "image/png", card.id) if is_shown else tag("div", "not available", class_="blank")
    labels = tag("div", ", ".join(card.labels), class_="truth")
    predictions = tag("div", *(_render_predictions(predictions) for predictions in card.predictions), class_="answers")
    return tag("div", tag("div", picture, tag("span", card.id, class_="id")), tag("div", labels, predictions), class_="example")


def _render_predictions(predictions: ClassPredictions) -> Markup:
    """The top classes of one method, each with a bar as long as its confidence."""
    parts = [tag("div", predictions.method, class_="method")]
    for name, confidence, is_label in predictions.top_classes:
        words = [tag("span", f"✓ {name}" if is_label else name, title=name), tag("span", f"{100 * confidence:.0f} %")]
        parts.append(tag("div", *words, class_="class hit" if is_label else "class"))
        bar = tag("div", style=f"width: {100 * confidence:.1f}%")
        parts.append(tag("div", bar, class_="bar right" if is_label else "bar"))
    return tag("div", *parts)
