"""The entry point of the command line: it registers all commands and turns errors into one line and an exit code.

The commands import the stages when they run, so that `diffalign --help` is quick.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from pipeline.commands import (
    cache,
    data,
    doctor,
    export,
    features,
    finetune,
    grid,
    heads,
    plan,
    predict,
    report,
    reproduce,
    runs,
    studies,
    tune,
)
from pipeline.commands.options import CommandGroup
from pipeline.runtime.environment import set_environment
from pipeline.runtime.errors import UserError, describe_error, is_out_of_memory, traceback_file
from pipeline.runtime.logs import inert, set_up_logging
from pipeline.runtime.places import is_address
from pipeline.runtime.plugins import failed_file
from pipeline.runtime.version import DISTRIBUTION, program_version

HELP = """Image classifiers that learn from text which exists only in training (MARNet, SeDA), on cached features.

prepare → extract → train-head → evaluate → report. `diffalign demo` runs them all."""

app = CommandGroup(HELP, add_completion=True)
for command in (
    data.fetch,
    data.prepare,
    data.datasets,
    data.card,
    plan.plan,
    features.extract,
    features.encoders,
    heads.train_head,
    heads.evaluate,
    predict.predict,
    export.export,
    heads.methods,
    grid.grid,
    tune.tune,
    finetune.finetune,
    runs.compare,
    report.report,
    reproduce.reproduce,
    doctor.doctor,
    studies.demo,
    studies.demo_joint,
):
    app.command()(command)
app.add_typer(runs.runs_commands, name="runs")
app.add_typer(cache.cache_commands, name="cache")
app.add_typer(studies.ablate_commands, name="ablate")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"{DISTRIBUTION} {program_version()}")
        raise typer.Exit


@app.callback()
def read_global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options that stand before the command."""


REMEDIES = {  # of errors of the operating system
    errno.ENOSPC: "free some space, or take another disk with --home; the same command goes on from here",
    errno.EDQUOT: "free some of your quota, or take another disk with --home; the same command goes on from here",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or, for a cache, take smaller --shard-rows",
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

    The exit code is 0 for success, 2 for bad input (with one line on stderr), 130 after an interruption, by Ctrl-C or by the
    SIGTERM of a batch system, and 1 for a bug, whose traceback follows one line that says so.
    """
    on_end = signal.getsignal(signal.SIGTERM)
    if "LOCAL_RANK" not in os.environ:  # a process of torchrun may wait for another one for ever, and hears no signal then
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    set_environment()
    set_up_logging()
    try:
        sys.exit(_run_command())
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        remedy = f"; {REMEDIES.get(error.errno or 0, 'give a readable file, or a writable folder with --home')}"
        if is_address(error.filename or ""):  # whose errors name their remedy
            remedy = ""
        print(f"diffalign: {file}{error.strerror or error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except (UserError, typer.TyperException) as error:
        message = _describe_usage(error) if isinstance(error, typer.TyperException) else str(error)
        if message.startswith("Usage:"):  # `diffalign` without a command asks for help
            print(message)
            sys.exit(0)
        print(f"diffalign: {inert(' '.join(message.split()))}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("diffalign: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(f"diffalign: {_describe_unexpected(error)}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, on_end)


def _describe_usage(error: typer.TyperException) -> str:
    """Return what is wrong with the words of a command; of an option that stands before the command, where it belongs."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", "")
    if context and option and hasattr(context.command, "commands"):
        return f"no option {option} here: options stand behind the command, {context.command_path} COMMAND {option} …"
    return error.format_message()


def _describe_unexpected(error: Exception) -> str:
    """Return the line that comes before the traceback of an error that is not the user's."""
    if is_out_of_memory(error):
        return f"memory ran out ({describe_error(error)}); take smaller batches or fewer workers, or a machine with more memory"
    file = traceback_file(error)
    where = f"; its traceback is below, and in {file}" if file else "; its traceback is below"
    if plugin := failed_file(error):
        return f"this is a bug in diffalign or, more likely, in the plug-in {plugin} ({describe_error(error)}){where}"
    return f"this is a bug in diffalign, please report it ({describe_error(error)}){where}"
