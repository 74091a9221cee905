"""Ranges of settings, and the error for a value outside."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from pipeline.runtime.errors import UserError


class SettingError(UserError):
    """A value that a setting cannot have; `configure` says it again with the name that the user typed."""

    name = ""  # of the setting
    fault = ""  # "must be in 1..8, not 9"


def setting_error(name: str, fault: str, text: str) -> SettingError:
    """Return the error with its message, `text`, and its facts."""
    error = SettingError(text)  # facts are attributes, not arguments, so that other processes can send the error back
    error.name, error.fault = name, fault
    return error


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: finite, from `low` to `high`; an end belongs to the range unless it is open."""

    low: float
    high: float = math.inf
    _: KW_ONLY
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) < math.inf

    def __str__(self) -> str:
        """Return the range as tables show it: "1..65536", ">= 0", "> 0, <= 1"."""
        if not (self.open_low or self.open_high or self.high == math.inf):
            return f"{self.low}..{self.high}"
        lower = f"{'>' if self.open_low else '>='} {self.low}"
        return lower if self.high == math.inf else f"{lower}, {'<' if self.open_high else '<='} {self.high}"

    def in_words(self) -> str:
        """Return the range as messages say it, after "must be": "in 1..65536", "positive", "above 0 and at most 1"."""
        if not (self.open_low or self.open_high or self.high == math.inf):
            return f"in {self.low}..{self.high}"
        if self == POSITIVE:
            return "positive"
        lower = f"{'above' if self.open_low else 'at least'} {self.low}"
        return lower if self.high == math.inf else f"{lower} and {'below' if self.open_high else 'at most'} {self.high}"

    def check(self, label: str, value: float) -> None:
        """Check that a value is in the range.

        Args:
            label: how the message calls the setting.
            value: its value.

        Raises:
            SettingError: it is outside.
        """
        if value not in self:
            fault = f"must be {self.in_words()}, not {value}"
            raise setting_error(label, fault, f"{label} {fault}")


POSITIVE = Range(0, open_low=True)
