"""Find numbers of a feature vector that are the label itself, such as a label column that was saved beside the features."""

from __future__ import annotations

import numpy as np


class LabelNumbers:
    """Looks at all features of a single-label dataset, block by block.

    A number is the label when it is whole in all rows, has one value in each class, and other values in other classes. Numbers
    that an encoder computes are not whole, and differ within a class.
    """

    def __init__(self, labels: np.ndarray) -> None:
        """Begin with no features.

        Args:
            labels: class of each row, int64 [N].
        """
        self.labels = labels
        self.value_of_class: dict[int, np.ndarray] = {}  # class -> the first row of it, flat
        self.is_possible = np.ones(1, dtype=bool)  # [width] from the first rows on
        self.num_rows = 0

    def add(self, rows: np.ndarray, start: int) -> None:
        """Look at rows of features, [rows, *shape], that begin with row `start`; rows that are not finite are left out."""
        flat = rows.reshape(len(rows), -1)
        usable = np.flatnonzero(np.isfinite(flat).all(axis=1))
        self.is_possible = self.is_possible & (flat[usable] == np.floor(flat[usable])).all(axis=0)
        self.num_rows += len(usable)
        if not self.is_possible.any():
            return
        for row in usable.tolist():
            first = self.value_of_class.setdefault(int(self.labels[start + row]), flat[row])
            self.is_possible = self.is_possible & (flat[row] == first)

    def found(self) -> list[int]:
        """Return the positions of the numbers that are the label, counted from 0."""
        values = np.array(list(self.value_of_class.values()))
        if not 2 <= len(values) < self.num_rows:
            return []
        return [int(i) for i in np.flatnonzero(self.is_possible) if len(np.unique(values[:, i])) == len(values)]
