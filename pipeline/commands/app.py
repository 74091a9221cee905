"""The command line: every command by its name, and what a mistake looks like. Stages are imported inside the commands."""

from __future__ import annotations

import errno
import os
import sys

import typer

from pipeline.commands import cache, data, doctor, features, finetune, grid, heads, report, studies
from pipeline.commands.options import CommandGroup
from pipeline.runtime.logs import set_up_logging

HELP = """Image classifiers that learn from text which exists only in training (MARNet, SeDA), on cached features.

prepare → extract → train-head → evaluate → report. `diffalign demo` runs them all."""

app = CommandGroup(HELP)
for command in (
    data.fetch,
    data.prepare,
    data.datasets,
    features.extract,
    features.encoders,
    heads.train_head,
    heads.evaluate,
    heads.methods,
    grid.grid,
    finetune.finetune,
    report.report,
    doctor.doctor,
    studies.demo,
    studies.demo_joint,
):
    app.command()(command)
app.add_typer(cache.app, name="cache")
app.add_typer(studies.ablations, name="ablate")

REMEDIES = {
    errno.ENOSPC: "free some space, or take another disk with --home; the same command goes on from here",
    errno.EDQUOT: "free some of your quota, or take another disk with --home; the same command goes on from here",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or take smaller --shard-rows",
    errno.EROFS: "make the disk writable, or take another one with --home",
    errno.EACCES: "get permission, or take a folder of yours with --home",
}


def _call() -> int:
    """The exit code of the command; typer returns one for a Ctrl-C, too."""
    code = app(standalone_mode=False) or 0
    if code == 130:
        raise KeyboardInterrupt
    return code


def main() -> None:
    """Exit code 0 done, 2 bad input with one line on stderr, 130 interrupted, 1 anything else."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_up_logging()
    try:
        sys.exit(_call())
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "give a readable file, or a writable folder with --home")
        print(f"diffalign: {place}{error.strerror or error}; {remedy}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message.startswith("Usage:"):  # a bare `diffalign` asks for help
            print(message)
            sys.exit(0)
        print(f"diffalign: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("diffalign: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
