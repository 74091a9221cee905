"""The blocks of code on the pages of docs/ and in README.md, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from pipeline.commands import app as cli

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# A fence, and what a comment directly before it says: <!-- needs: a GPU -->, <!-- run by: tests/… -->, <!-- part: … -->.
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>needs|part|run by): (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_TEMPLATES = {"finetune.sbatch": "finetune", "extract.sbatch": "extract"}  # what the templates of examples/slurm/ run


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str
    text: str
    needs: str  # what it needs that a test cannot have, or the test that runs it; "": it can be run

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command of a block of `bash`."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "|" in words:  # a pipe is two commands
                yield words[: words.index("|")]
                words = words[words.index("|") + 1 :]
            if words:
                yield words


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(text))
    assert all((ROOT / found["why"]).is_file() for found in blocks if found["mark"] == "run by")
    return [Block(found["language"], found["text"], found["why"] or "") for found in blocks]


def arguments_of(words: list[str]) -> list[str] | None:
    """Return the arguments that a command gives to diffalign, directly, by torchrun or by a template of Slurm; None: no one."""
    if words[0] == "diffalign":
        return words[1:]
    if words[:2] == ["python", "cli.py"]:
        return words[2:]
    if words[0] == "torchrun":
        return words[words.index("pipeline") + 1 :]
    if words[0] == "sbatch":
        template = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[template]).is_file(), words
        return [_TEMPLATES[Path(words[template]).name], *words[template + 1 :]]
    return None


@cache
def _program() -> Any:
    return typer.main.get_command(cli.app)


def check_arguments(arguments: list[str]) -> None:
    """Check the names of a command and of its options, and the choices of options, with the parser, without running it."""
    command = _program()
    context = command.make_context("diffalign", [], resilient_parsing=True)
    rest = list(arguments)
    while hasattr(command, "get_command"):  # a group: its next word is the name of a command
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found, f"there is no command {name!r}: {shlex.join(arguments)}"
        command, context = found, found.context_class(found, info_name=name, parent=context)
    values, left, _ = command.make_parser(context).parse_args(rest)
    assert not left, f"{left} are too many arguments: {shlex.join(arguments)}"
    for parameter in command.get_params(context):
        assert not parameter.required or values.get(parameter.name), f"{parameter.name} is missing: {shlex.join(arguments)}"
