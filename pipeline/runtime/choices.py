"""The error for a name that is none of the choices, with the choice that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pipeline.runtime.errors import UserError

MIN_SIMILARITY = 0.6  # of two names, from 0 to 1, so that one is suggested for the other


def unknown_choice(
    given: str, fault: str, choices: Iterable[str], more: Iterable[str] = (), hint: str = "", also: Iterable[str] = ()
) -> UserError:
    """Return the error for a name that is none of the choices: "FAULT; choose one of: a, b; did you mean 'a'?".

    Args:
        given: The name that was given.
        fault: What is wrong with it, for example "unknown method 'sedaa'".
        choices: The names that there are.
        more: Words that are listed after the choices and never suggested.
        hint: What else can be done; it is put in brackets.
        also: Names that are suggested and not listed.
    """
    names = [str(choice) for choice in choices]
    meant = {name.lower(): name for name in [*names, *also]}
    close = get_close_matches(str(given).lower(), list(meant), n=1, cutoff=MIN_SIMILARITY)
    suggestion = f"; did you mean {meant[close[0]]!r}?" if close else ""
    return UserError(f"{fault}; choose one of: {', '.join([*names, *more])}{f' ({hint})' if hint else ''}{suggestion}")
