"""Render a map of samples with BokehJS: filters, a plane with pictures on hover, and a gallery of the same samples.

The library, which is under the BSD licence in its own first lines, and all data are inside the page.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from pipeline.report.blocks import SampleMap, without_controls

ALL_CLASSES = "-1"
ANSWERS = {  # value -> what readers choose
    "all": "all examples",
    "right": "the method is right",
    "wrong": "the method is wrong",
    "gained": "the method is right where the baseline is wrong",
    "lost": "the method is wrong where the baseline is right",
    "both right": "both are right",
    "both wrong": "both are wrong",
}
CASES = ("both wrong", "lost", "gained", "both right")  # the baseline is right in every second, the method in the last two
CASE_COLOURS = {"both right": "#7f8a94", "gained": "#0072b2", "lost": "#d55e00", "both wrong": "#e69f00"}
NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
PLANE_PIXELS = 520
MARGIN = 0.05  # around the dots, as a share of their width and height
ROW_PIXELS = 78
# The colours of the page, light or dark, in place of Bokeh's own: its elements are in shadow trees, which see variables alone.
PAGE_COLOURS = """{ --color: var(--ink); --background-color: var(--paper); --surface-background-color: var(--shade);
  --border-color: var(--soft); --divider-color: var(--line); --hover-color: var(--shade); --icon-color: var(--soft); }"""
TABLE_STYLE = """.slick-row, .slick-row.odd, .slick-header-column.ui-state-default { background: var(--paper); }
.slick-row, .slick-header-column.ui-state-default { color: var(--ink); }
.slick-row.selected, .slick-cell.selected { background: var(--shade); }
.slick-cell { white-space: normal; overflow-wrap: anywhere; line-height: 1.3; }"""
# A picture and texts for the sample under the pointer. Bokeh escapes what it puts in place of a name with an @.
TOOLTIP = (
    f'<div style="max-width: 15rem; overflow-wrap: anywhere"><style>:host(.bk-Tooltip) {PAGE_COLOURS}</style>'
    """<img src="@picture" alt="" width="72"><div><b>@label</b></div>
<div>@method: @prediction (@confidence{0.00})</div><div>baseline: @base</div><div>@id</div></div>"""
)
GALLERY_PICTURE = '<img src="<%- value %>" alt="" style="height: 72px">'
# What happens when a reader chooses: other columns are shown, and other samples.
UPDATE = """
const at = (name) => numbers.data[name]
const own = `method ${method.value}`, base = `method ${baseline < 0 ? method.value : baseline}`
const place = `space ${space.value} ${projection.value}`
const right = at(`${own} right`), base_right = at(`${base} right`)
const cases = labels.map((_, i) => names_of_cases[2 * right[i] + base_right[i]])
const fits = (i) => ({"all": true, "right": right[i], "wrong": !right[i]}[answers.value] ?? cases[i] === answers.value)
const wanted = Number(label.value)
const shown = labels.map((each, i) => (wanted < 0 || each.includes(wanted)) && Boolean(fits(i)))
const method_name = method.options[Number(method.value)][1]
source.data = {...source.data, x: at(`${place} x`), y: at(`${place} y`), confidence: at(`${own} confidence`),
  prediction: Array.from(at(`${own} predicted`), (k) => class_names[k]), method: cases.map(() => method_name),
  base: Array.from(at(`${base} predicted`), (k) => baseline < 0 ? "-" : class_names[k]),
  colour: cases.map((each) => colours[each])}
filter.booleans = shown
if (cb_obj === space || cb_obj === projection) {
  for (const [axis, range] of Object.entries(ranges)) {
    const values = at(`${place} ${axis}`), low = Math.min(...values), high = Math.max(...values)
    const [start, end] = [low - margin * (high - low), high + margin * (high - low)]
    range.setv({start, end, reset_start: start, reset_end: end})
  }
}
source.selected.indices = []
count.text = `${shown.filter(Boolean).length} of ${shown.length} examples`
"""


PLACE_ID, DATA_ID = "explorer", "explorer-data"
EMBED = f"""
addEventListener("DOMContentLoaded", () => {{
  Bokeh.embed.embed_item(JSON.parse(document.getElementById("{DATA_ID}").textContent))
}})
"""


def page_scripts() -> list[str]:
    """Return the scripts of a page with a map, in order."""
    from bokeh.resources import Resources

    return [*Resources(mode="inline", log_level="warn", components=["bokeh", "bokeh-widgets", "bokeh-tables"]).js_raw, EMBED]


def map_data(block: SampleMap) -> str:
    """Return the map as JSON, without a letter that could end the element around it."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item

    item: Any = json_item(_build(block), ID(PLACE_ID))
    return json.dumps(_number_ids(item, {})).replace("<", "\\u003c")


def library_note() -> str:
    """Return whose work draws the map, and under which licence."""
    from bokeh import __version__

    return (
        f"Drawn by BokehJS {__version__}, © Anaconda, Inc., and Bokeh Contributors, BSD-3-Clause: see the source of this page."
    )


def _build(block: SampleMap) -> Any:
    """Return the controls, the plane and the gallery as one model of Bokeh."""
    from bokeh.layouts import column, row
    from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, CustomJS, Div, InlineStyleSheet, Select

    names = [each.name for each in block.methods]
    baseline = names.index(block.baseline) if block.baseline in names else -1
    first = names.index(block.shown_first)
    positions = next(iter(block.spaces.values()))
    numbers = ColumnDataSource(_numbers(block))
    shown_filter = BooleanFilter(booleans=[True] * len(block.ids))
    source, view = ColumnDataSource(_first_columns(block, first, baseline)), CDSView(filter=shown_filter)
    clean = [without_controls(name) for name in block.class_names]
    choices = {
        "method": Select(title="Predictions of", value=str(first), options=_options(names)),
        "answers": Select(title="Show where", value="all", options=list(ANSWERS.items())),
        "label": Select(title="Class", value=ALL_CLASSES, options=[(ALL_CLASSES, "all classes"), *_options(clean)]),
        "space": Select(title="Features", value="0", options=_options(list(block.spaces))),
        "projection": Select(title="Projection", value=next(iter(positions)), options=list(positions)),
    }
    colours = InlineStyleSheet(css=f":host {PAGE_COLOURS}")
    count = Div(text=f"{len(block.ids)} of {len(block.ids)} examples", name="count", stylesheets=[colours])
    plane = _plane(source, view, next(iter(positions.values())))
    arguments = {
        **choices,
        "source": source,
        "numbers": numbers,
        "filter": shown_filter,
        "count": count,
        "labels": [list(each) for each in block.labels],
        "class_names": clean,
        "baseline": baseline,
        "names_of_cases": CASES,
        "colours": CASE_COLOURS,
        "ranges": {"x": plane.x_range, "y": plane.y_range},
        "margin": MARGIN,
    }
    update = CustomJS(args=arguments, code=UPDATE)
    for name, choice in choices.items():
        choice.name, choice.width, choice.stylesheets = name, 190, [colours]
        choice.js_on_change("value", update)
    controls = row(*choices.values(), styles={"flex-wrap": "wrap"}, sizing_mode="stretch_width")
    return column(controls, count, plane, _gallery(source, view), sizing_mode="stretch_width")


def _options(names: list[str]) -> Any:
    return [(str(number), name) for number, name in enumerate(names)]


def _numbers(block: SampleMap) -> dict[str, Any]:
    """All columns that readers can choose: "space <i> <projection> x" and y; "method <i> predicted", confidence and right."""
    columns: dict[str, Any] = {}
    for number, positions in enumerate(block.spaces.values()):
        for projection, plane in positions.items():
            columns |= {f"space {number} {projection} {axis}": plane[:, k] for k, axis in enumerate("xy")}
    for number, method in enumerate(block.methods):
        own = {"predicted": method.predicted, "confidence": method.confidence, "right": method.is_right.astype(np.uint8)}
        columns |= {f"method {number} {name}": values for name, values in own.items()}
    return columns


def _first_columns(block: SampleMap, first: int, baseline: int) -> dict[str, Any]:
    """The columns that are shown before a reader has chosen anything."""
    own = block.methods[first]
    base = block.methods[baseline] if baseline >= 0 else own
    clean = [without_controls(name) for name in block.class_names]
    plane = next(iter(next(iter(block.spaces.values())).values()))
    return {
        "id": [without_controls(each) for each in block.ids],
        "picture": [_data_address(each) for each in block.pictures],
        "label": [", ".join(clean[k] for k in each) for each in block.labels],
        "x": plane[:, 0],
        "y": plane[:, 1],
        "method": [own.name] * len(block.ids),
        "prediction": [clean[k] for k in own.predicted],
        "confidence": own.confidence,
        "base": [clean[k] if baseline >= 0 else "-" for k in base.predicted],
        "colour": [CASE_COLOURS[CASES[case]] for case in 2 * own.is_right + base.is_right],
    }


def _data_address(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" if picture else NO_PICTURE


def _plane(source: Any, view: Any, positions: np.ndarray) -> Any:
    from bokeh.models import HoverTool, Range1d
    from bokeh.plotting import figure

    tools = ["pan", "wheel_zoom", "box_zoom", "box_select", "lasso_select", "reset", HoverTool(tooltips=TOOLTIP)]
    low, high = positions.min(axis=0), positions.max(axis=0)
    starts, ends = low - MARGIN * (high - low), high + MARGIN * (high - low)
    x_range, y_range = (Range1d(start=float(start), end=float(end)) for start, end in zip(starts, ends, strict=True))
    plane = figure(
        x_range=x_range,
        y_range=y_range,
        height=PLANE_PIXELS,
        sizing_mode="stretch_width",
        tools=tools,
        active_drag="box_select",
        toolbar_location="above",
    )
    plane.scatter("x", "y", source=source, view=view, size=8, fill_color="colour", line_color=None, fill_alpha=0.8)
    plane.name = "plane"
    plane.axis.visible = plane.grid.visible = False
    plane.background_fill_color = plane.border_fill_color = None  # the page's own
    plane.toolbar.logo = None
    return plane


def _gallery(source: Any, view: Any) -> Any:
    from bokeh.models import DataTable, HTMLTemplateFormatter, InlineStyleSheet, NumberFormatter, TableColumn

    columns = [
        TableColumn(
            field="picture",
            title="picture",
            formatter=HTMLTemplateFormatter(template=GALLERY_PICTURE),
            sortable=False,
            width=90,
        ),
        TableColumn(field="label", title="label"),
        TableColumn(field="prediction", title="prediction"),
        TableColumn(field="confidence", title="confidence", formatter=NumberFormatter(format="0.00"), width=80),
        TableColumn(field="base", title="baseline"),
        TableColumn(field="id", title="example"),
    ]
    return DataTable(
        source=source,
        view=view,
        columns=columns,
        row_height=ROW_PIXELS,
        height=7 * ROW_PIXELS,
        stylesheets=[InlineStyleSheet(css=f":host {PAGE_COLOURS} {TABLE_STYLE}")],
        reorderable=False,
        name="gallery",
        sizing_mode="stretch_width",
        index_position=None,
    )


def _number_ids(value: Any, numbers: dict[str, str]) -> Any:
    """Return the JSON of a model with its ids counted from 1, so that equal maps give equal bytes."""
    if isinstance(value, list | tuple):
        return [_number_ids(each, numbers) for each in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, each in value.items():
        is_id = key in ("id", "root_id") and isinstance(each, str)
        renamed[key] = numbers.setdefault(each, f"m{len(numbers) + 1}") if is_id else _number_ids(each, numbers)
    return renamed
