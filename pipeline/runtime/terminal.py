"""Text of others on a terminal."""

from __future__ import annotations

import unicodedata

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories: control, format, surrogates, separators of lines
_JOINERS = "\u200c\u200d\ufe0f"  # ordinary text needs these: Persian, Indic scripts, emoji


def printable(text: str) -> str:
    r"""Return text that can neither move the cursor, nor colour or reorder what stands around it: such signs become \x1b.

    Args:
        text: a class name, a path or another text from data.
    """
    return "".join(
        char
        if unicodedata.category(char) not in _INVISIBLE or char in _JOINERS
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
