"""How near the text that a head generates from images is to the real one, on validation samples.

Predictions never read these texts: they are compared when a run ends, and the figures are kept beside its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.cache.table import FeatureTable
from pipeline.evaluation.evaluate import PREDICTION_BATCH_SIZE
from pipeline.nn.method import Method
from pipeline.runtime.device import Precision, reproducible
from pipeline.runtime.rng import KeyedRNG


@torch.no_grad()
def measure_alignment(method: Method, pairs: FeatureTable, seed: int, precision: Precision = "float32") -> dict[str, float]:
    """Return how near generated texts are to the real ones; empty if the head generates none, or the texts do not differ.

    Args:
        method: the trained head.
        pairs: samples with the columns "image", "text", "paired" and "key".
        seed: the seed of the run.
        precision: of the head's prediction.

    Returns:
        "text_cos" and "text_mse": the mean cosine similarity, and the squared error as a mean over samples and dimensions; and
        "mean_text_cos" and "mean_text_mse", the same of the mean of these texts, the best that one vector for all can do. A
        head whose text_mse is not below mean_text_mse does not align to the text.
    """
    method.train(False)
    rows = torch.nonzero(pairs.columns["paired"] > 0).flatten()
    if not len(rows):
        return {}
    generated, real = [], []
    for part in rows.split(PREDICTION_BATCH_SIZE):
        image, text, keys = (pairs.columns[name][part] for name in ("image", "text", "key"))
        with reproducible(image.device, precision):
            target = method.text_target(text)
            if target is None:
                return {}
            real.append(target.double())
            generated.append(method.generated_text(image, KeyedRNG.seeded(seed, keys).at("predict")).double())
    x_s, x_r = torch.cat(real), torch.cat(generated)
    mean = x_s.mean(dim=0, keepdim=True)
    if not bool((x_s != mean).any()):  # one text for all: nothing to align to
        return {}
    return {
        "text_cos": float(F.cosine_similarity(x_r, x_s).mean()),
        "text_mse": float(F.mse_loss(x_r, x_s)),
        "mean_text_cos": float(F.cosine_similarity(mean, x_s).mean()),
        "mean_text_mse": float(F.mse_loss(mean.expand_as(x_s), x_s)),
    }
