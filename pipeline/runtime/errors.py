"""Which exceptions a user can mend, and what is kept of those that are bugs."""

from __future__ import annotations

from pathlib import Path

MEMORY_SIGNS = (  # in the message of a RuntimeError of torch: of the CPU (two wordings), of CUDA, of cuBLAS and cuDNN
    "allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)
_TRACEBACK_NOTE = "this traceback is in "


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong, where, and the remedy.

    The command line prints the message as one line and exits with 2. Every other exception is a bug: it keeps its traceback,
    and the command exits with 1.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the device or of the machine. That is no bug."""
    is_known = isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return is_known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS))


def is_bug(error: BaseException) -> bool:
    """Whether an exception is our mistake: no `UserError`, no error of the system (`OSError`), no lack of memory, no Ctrl-C."""
    return isinstance(error, Exception) and not isinstance(error, (UserError, OSError)) and not is_out_of_memory(error)


def describe_error(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message, for example "IndexError: list index out of range"."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def note_traceback_file(error: BaseException, path: Path) -> None:
    """Note on an exception that its traceback has been written to a file; the note is part of the traceback that is shown."""
    error.add_note(f"{_TRACEBACK_NOTE}{path}")


def traceback_file(error: BaseException) -> str:
    """Return the path that `note_traceback_file` noted last; "" when there is none."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_TRACEBACK_NOTE)]
    return notes[-1].removeprefix(_TRACEBACK_NOTE) if notes else ""
