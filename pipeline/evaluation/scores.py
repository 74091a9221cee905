"""Scores that may be compared across samples: the log of the confidence that a method has in a class.

A method's logits rank the classes of one sample. Logits of a softmax are known only up to a constant of their own for each
sample, and the fusions "sum" and "hm" of MARNet give log-scores that do not add up to one. Average precision, calibration and
the confidences of a report therefore read these scores. It does not import torch, so that reports can use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_CALIBRATION_BINS = 15  # of the expected calibration error and of reliability plots, all of one width


def log_scores(logits: NDArray[Any], label: NDArray[Any], label_loss: str) -> NDArray[np.float64]:
    """Return the log of each class's confidence, float64 [N,C]: log_softmax of the logits, or log of their sigmoid.

    Args:
        logits: what a method predicts [N,C].
        label: classes [N], or indicators [N,C] for multi-label data.
        label_loss: the method's loss for multi-label data; after "bce" each class has a sigmoid of its own.
    """
    z = np.asarray(logits, dtype=np.float64)  # in float32, close logits would become equal scores
    if label.ndim == 2 and label_loss == "bce":
        return -np.logaddexp(0.0, -z)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))
