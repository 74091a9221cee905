"""Write docs/api.md: the public names of `pipeline` with their signatures and docstrings, from the code.

Run by `make docs`; a test compares the page with the code.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """# The public API

`import pipeline as da` gives these names; everything else is internal and may change. Written by `make docs` from the code:
change the docstrings, not this page. Letters of shapes: B batch, N samples, T tokens, D width, C classes.
[quickstart.ipynb](../examples/quickstart.ipynb) shows them at work."""
ORDER = (
    *("Workspace", "load_run", "Run", "Runs", "Features", "Manifest", "Cache", "Method", "Encoder", "Dataset", "UserError"),
    *("load_export", "ExportedClassifier"),
)


def public_members(owner: type[Any]) -> Iterator[tuple[str, Any]]:
    """The methods and properties that a class itself defines, in the order of the source."""
    for name, member in vars(owner).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        is_shown = inspect.isfunction(function) and not name.startswith("_") and function.__module__ == owner.__module__
        if is_shown:
            yield name, member


def signature(function: Any, name: str) -> str:
    """A name with its parameters as the source spells them; long ones are written one per line."""
    shown = inspect.signature(function)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts: list[str] = []
    may_be_positional = True
    for parameter in shown.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if may_be_positional and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parts.append("*")
        may_be_positional = may_be_positional and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        default = default.replace("mappingproxy({})", "{}")
        parts.append(f"{stars.get(parameter.kind, '')}{parameter.name}: {parameter.annotation}{default}")
    returned = "" if shown.return_annotation in (inspect.Signature.empty, "None") else f" -> {shown.return_annotation}"
    text = f"{name}({', '.join(parts)}){returned}"
    if len(text) > 110:
        text = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returned}"
    return text.replace("'", '"')


def escaped(text: str) -> str:
    """Text with < and > as Markdown shows them, but for code in backticks, where they stay."""
    parts = text.split("`")
    return "`".join(html.escape(part, quote=False) if number % 2 == 0 else part for number, part in enumerate(parts))


def documented(docstring: str | None) -> str:
    """A docstring as Markdown: the sections Args, Returns and Raises become bold lines and lists."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields):", line)
        item = re.match(r"    (\w+): (.*)", line)
        if heading:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section in ("Args", "Raises") and item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section:
            lines.append(f"  {line.strip()}" if section in ("Args", "Raises") and line else line.strip())
        else:
            lines.append(line)
    return escaped("\n".join(lines).rstrip())


def fields_table(owner: type[Any]) -> list[str]:
    """The fields of a dataclass, one line each, with the comment that stands beside them in the source."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*(?:= [^#\n]*)?# (.*)$", inspect.getsource(owner), re.MULTILINE))
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    types = {field.name: str(field.type).replace("'", '"') for field in fields}
    return [
        f"- `{name}: {kind}`" + (f": {escaped(comments[name])}" if name in comments else "") for name, kind in types.items()
    ]


def section(name: str) -> Iterator[str]:
    """The paragraphs on one public name."""
    value: Any = getattr(pipeline, name)
    yield f"## {name}"
    if inspect.isfunction(value):
        yield f"```python\n{signature(value, name)}\n```"
        yield documented(value.__doc__)
        return
    own_init = "__init__" in vars(value) and value.__init__.__doc__ and not value.__init__.__doc__.startswith("Initialize")
    if own_init:
        yield f"```python\n{signature(value.__init__, name)}\n```"
    yield documented(value.__doc__)
    if own_init:
        yield documented(value.__init__.__doc__)
    yield "\n".join(fields_table(value))
    for member_name, member in public_members(value):
        if isinstance(member, property):
            yield f"### {name}.{member_name}"
            yield f"```python\n{member_name}: {inspect.signature(member.fget).return_annotation}\n```" if member.fget else ""
        else:
            yield f"### {name}.{member_name}()"
            yield f"```python\n{signature(getattr(value, member_name), member_name)}\n```"
        yield documented(member.__doc__)


def page() -> str:
    """The whole page; the same code gives the same text."""
    assert set(ORDER) == set(pipeline.__all__), "name every public name in ORDER"
    return "\n\n".join([INTRODUCTION, *(part for name in ORDER for part in section(name) if part)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
