"""Render the blocks of a report as one HTML page that needs no other file.

Styles are inside the page and images are embedded as data. Links lead to places of the page and to the files beside it, which
the page does not need. Every string is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from pipeline.report import explorer
from pipeline.report.blocks import (
    Block,
    BulletList,
    ClassPredictions,
    CollapsibleSection,
    ExampleCard,
    ExampleGroup,
    Heading,
    Paragraph,
    SampleMap,
    SvgFigure,
    Table,
    without_controls,
)
from pipeline.report.page_style import PAGE_STYLE

# A second protection: if a string were ever written without escaping, the page could still not load anything, and run nothing
# but the scripts whose hashes are added. Bokeh compiles the templates and callbacks that `explorer` gives it.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """A string that is HTML already; `tag` and `join_markup` escape every other string."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """Return an HTML element; children that are not `Markup` and the values of all attributes are escaped.

    Args:
        name: Name of the element, such as "div".
        children: Content of the element.
        attributes: HTML attributes. `class_` gives "class", and `aria_label` "aria-label".
    """
    head = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape_html(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{head}>{join_markup(children)}</{name}>")


def join_markup(children: Iterable[str]) -> Markup:
    """Join several children into one string; those that are not `Markup` are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape_html(child) for child in children))


def escape_html(text: str) -> str:
    """Return plain text as HTML; nothing in it is read as markup, and it does not turn the direction of the text around it."""
    return html.escape(without_controls(text))


def inline_image(data: bytes, media_type: str, alt: str) -> Markup:
    """Return an image element whose data are inside the page."""
    content = base64.b64encode(data).decode("ascii")
    return Markup(f'<img src="data:{media_type};base64,{content}" alt="{escape_html(alt)}">')


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Return the report as one HTML document, with at most one map of samples."""
    scripts = explorer.page_scripts() if any(isinstance(block, SampleMap) for block in blocks) else []
    head = [
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_policy(scripts))}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(PAGE_STYLE)),
        *(tag("script", Markup(script)) for script in scripts),
    ]
    headings = [block for block in blocks if isinstance(block, Heading)]
    anchors = {id(block): f"section-{number}" for number, block in enumerate(headings, 1)}
    body = tag("body", tag("h1", title), _render_contents(blocks, anchors), *(_render_block(each, anchors) for each in blocks))
    return f"<!doctype html>\n{tag('html', tag('head', *head), Markup(chr(10)), body, lang='en')}\n"


def _policy(scripts: Sequence[str]) -> str:
    """The content security policy of a page with these scripts."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(["'unsafe-eval'", *(f"'sha256-{digest}'" for digest in digests)])
    return f"{CONTENT_SECURITY_POLICY}; script-src {allowed}" if scripts else CONTENT_SECURITY_POLICY


def _render_contents(blocks: Sequence[Block], anchors: Mapping[int, str]) -> Markup:
    """A list of links to the sections; nothing for a page without two of them."""
    sections = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    if len(sections) < 2:
        return Markup()
    links = [tag("li", tag("a", section.text, href=f"#{anchors[id(section)]}")) for section in sections]
    return tag("nav", tag("ol", *links), aria_label="Contents")


def _render_block(block: Block, anchors: Mapping[int, str] = MappingProxyType({})) -> Markup:
    match block:
        case Heading(text, level):
            return tag(f"h{level}", text, **({"id": anchors[id(block)]} if id(block) in anchors else {}))
        case Paragraph(text):
            return tag("p", text)
        case BulletList(items):
            return tag("ul", *(tag("li", item) for item in items))
        case Table():
            return tag("figure", tag("div", _render_table(block), class_="wide"), _render_caption(block))
        case SvgFigure(svg, alt):
            image = inline_image(svg, "image/svg+xml", alt)
            return tag("figure", tag("div", image, class_="wide"), _render_caption(block))
        case ExampleGroup(title, cards):
            return join_markup([tag("h3", title), tag("div", *(_render_card(card) for card in cards), class_="examples")])
        case SampleMap():
            data = tag("script", Markup(explorer.map_data(block)), type="application/json", id=explorer.DATA_ID)
            place = tag("div", id=explorer.PLACE_ID, class_="explorer screen")
            caption = tag("figcaption", f"{block.caption} {explorer.library_note()}")
            return tag("figure", place, data, caption)
        case CollapsibleSection(summary, blocks):
            return tag("details", tag("summary", summary), *(_render_block(inner) for inner in blocks))


def _render_caption(block: Table | SvgFigure) -> Markup:
    """The caption and the links to the files of a table or figure."""
    links = [tag("a", file.rpartition(".")[2].upper(), href=file, download="") for file in block.files]
    return tag("figcaption", block.caption, *(Markup(f" {link}") for link in links))


def _render_table(table: Table) -> Markup:
    def render_row(cell_tag: str, values: Sequence[str]) -> Markup:
        css_classes = ["word" if table.is_text(column) else "number" for column in range(len(values))]
        return tag("tr", *(tag(cell_tag, value, class_=name) for value, name in zip(values, css_classes, strict=True)))

    rows: Sequence[Sequence[str]] = table.rows
    if table.row_details:
        opened = [
            tag("details", tag("summary", row[0]), text, class_="row")
            for row, text in zip(rows, table.row_details, strict=True)
        ]
        rows = [(first, *row[1:]) for first, row in zip(opened, rows, strict=True)]
    body = tag("tbody", *(render_row("td", values) for values in rows))
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
