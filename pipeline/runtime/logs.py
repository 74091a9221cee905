"""Log messages and progress bars, both on standard error."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SPARSE_SECONDS = 10.0  # between two lines of progress, if standard error is not a terminal


_ACTIVE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def inert(text: str) -> str:
    """Return a text of others as a terminal may show it: what could move the cursor, or turn the direction, is spelled out."""
    return _ACTIVE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Handler(logging.Handler):
    """Print messages as plain lines, with the level before warnings and errors, and without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = f"{level}{record.getMessage()}"
        if sys.stderr.isatty():
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def set_up_logging(level: int = logging.INFO) -> None:
    """Print the messages of this package from a level upwards; progress bars are shown if the level is INFO or lower.

    Another call changes the level.
    """
    logger = logging.getLogger("pipeline")
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())


class ProgressBar(tqdm):
    """A progress bar with a label.

    On a terminal it is drawn in place. Elsewhere a line is printed every ten seconds and at the end. It is not shown if the
    logging level is above INFO.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, *, label: str, show: bool = True, **options: Any) -> None:
        self._is_sparse = not sys.stderr.isatty()
        self._next_line_at = time.monotonic() + SPARSE_SECONDS
        if self._is_sparse:
            options |= {"mininterval": SPARSE_SECONDS, "maxinterval": SPARSE_SECONDS, "ncols": 100}
        is_quiet = logging.getLogger("pipeline").level > logging.INFO
        super().__init__(iterable, desc=label, disable=not show or is_quiet, file=sys.stderr, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar; where lines are printed, only if the last one is old enough."""
        if self._is_sparse:
            if time.monotonic() < self._next_line_at:
                return False
            self._next_line_at = time.monotonic() + SPARSE_SECONDS
        return super().display(msg, pos)

    def moveto(self, n: int) -> None:
        """Move the cursor to another bar's line, which exists only on a terminal."""
        if not self._is_sparse:
            super().moveto(n)

    def close(self) -> None:
        """Show the final state, unless the bar is one that disappears, and end."""
        if self._is_sparse and not self.disable:
            if self.leave is not False and time.time() >= self.start_t + (self.delay or 0):
                self._next_line_at = 0.0
                self.display()
            self.fp = io.StringIO()  # tqdm would print a line break, but each line has one already
            self.sp = _print_nothing
        super().close()

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Return the function that prints the state of the bar: in place on a terminal, elsewhere on a new line."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return print_line


def _print_nothing(text: str) -> None:
    pass
