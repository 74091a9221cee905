"""The entry point of the command line: it registers all commands and turns errors into one line and an exit code.

The commands import the stages when they run, so that `diffalign --help` is quick.
"""

from __future__ import annotations

import errno
import sys

import typer

from pipeline.commands import cache, data, doctor, features, finetune, grid, heads, report, studies
from pipeline.commands.options import CommandGroup
from pipeline.runtime.environment import set_environment
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
app.add_typer(cache.cache_commands, name="cache")
app.add_typer(studies.ablate_commands, name="ablate")

REMEDIES = {  # of errors of the operating system
    errno.ENOSPC: "free some space, or take another disk with --home; the same command goes on from here",
    errno.EDQUOT: "free some of your quota, or take another disk with --home; the same command goes on from here",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or take smaller --shard-rows",
    errno.EROFS: "make the disk writable, or take another one with --home",
    errno.EACCES: "get permission, or take a folder of yours with --home",
}


def _run_command() -> int:
    """Run the command and return its exit code; typer returns 130 for a Ctrl-C, which becomes `KeyboardInterrupt` again."""
    code = app(standalone_mode=False) or 0
    if code == 130:
        raise KeyboardInterrupt
    return code


def main() -> None:
    """Run the command of `sys.argv` and exit.

    The exit code is 0 for success, 2 for bad input (with one line on stderr), 130 after an interruption, else 1.
    """
    set_environment()
    set_up_logging()
    try:
        sys.exit(_run_command())
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "give a readable file, or a writable folder with --home")
        print(f"diffalign: {file}{error.strerror or error}; {remedy}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message.startswith("Usage:"):  # `diffalign` without a command asks for help
            print(message)
            sys.exit(0)
        print(f"diffalign: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("diffalign: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
