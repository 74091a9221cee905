"""Join by sample id: where ids stand in a list of ids, in sixteen bytes an id and without a Python object for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.columns import BATCH_ROWS, Strings
from pipeline.data.keys import hash_keys


class IdIndex:
    """The sorted hashes of ids. Of an id that comes twice, the last one is found."""

    def __init__(self, ids: Strings) -> None:
        """Index these ids."""
        self._ids = ids
        hashes = hash_keys(ids)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __reduce__(self) -> Any:
        return IdIndex, (self._ids,)  # another process hashes a text otherwise

    def find(self, wanted: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each wanted id; -1: it is not among the ids."""
        starts = range(0, len(wanted), BATCH_ROWS)
        parts = [self._find(list(wanted[start : start + BATCH_ROWS])) for start in starts]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _find(self, wanted: list[str]) -> NDArray[np.int64]:
        if not len(self._order):
            return np.full(len(wanted), -1)
        places = np.searchsorted(self._hashes, np.fromiter(map(hash, wanted), np.int64, len(wanted)), side="right") - 1
        found = self._order[np.maximum(places, 0)]
        is_other = np.fromiter(map(str.__ne__, wanted, self._ids.take(found)), np.bool_, len(wanted))
        for number in np.flatnonzero(is_other).tolist():
            found[number] = self._search(wanted[number], range(int(places[number]), -1, -1))
        return found

    def _search(self, wanted: str, places: Iterable[int]) -> int:
        """Return the position of an id among those whose hash is the same; -1: there is none."""
        for place in places:
            if self._hashes[place] != hash(wanted):
                return -1
            if self._ids[int(self._order[place])] == wanted:
                return int(self._order[place])
        return -1
