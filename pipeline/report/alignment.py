"""Whether the heads that generate text features align to the text: figures on validation samples that training left behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.evaluation.statistics import describe_spread, format_seeds
from pipeline.report.blocks import Block, BulletList, Heading, Paragraph, Table
from pipeline.report.results import HeadRuns

COLUMNS = {
    "text_cos": "cosine to the text",
    "mean_text_cos": "cosine of the mean text",
    "text_mse": "MSE to the text",
    "mean_text_mse": "MSE of the mean text",
}


def alignment_blocks(heads: Iterable[HeadRuns]) -> list[Block]:
    """Return the section on alignment; empty if no head generates text features.

    A head aligns to the text when its squared error is below that of the mean text, the best single vector for all samples.
    """
    rows, sentences, num_seeds = [], [], []
    for head in heads:
        facts = [found for run in head.runs if (found := run.read_alignment())]
        if facts:
            num_seeds.append(len(facts))
            rows.append((head.label, *(format_seeds([each[name] for each in facts]) for name in COLUMNS)))
            sentences.append(_judge(head.label, [each["text_mse"] / each["mean_text_mse"] for each in facts]))
    if not rows:
        return []
    text = (
        "Diffusion heads generate a text feature from the image alone. Here it is compared with the real one on at most 2,000 "
        "validation samples, whose texts no prediction reads. If its error is not below that of the mean text, the head has "
        "learned no text, whatever its accuracy: then it is a network on image features."
    )
    caption = f"{describe_spread(num_seeds)}; MSE: squared error per dimension, in the head's standardised space."
    table = Table(("method", *COLUMNS.values()), tuple(rows), caption)
    return [Heading("Alignment to the text"), Paragraph(text), table, BulletList(tuple(sentences))]


def _judge(label: str, ratios: Sequence[float]) -> str:
    """Return in words what the errors mean; each is relative to that of the mean text."""
    ratio = float(np.mean(ratios))
    if not ratio < 1:
        return f"{label} does not align to the text: its error is {ratio:.2f} times that of the mean text."
    return f"{label} aligns to the text: it explains {100 * (1 - ratio):.0f} % of the variance of held-out texts."
