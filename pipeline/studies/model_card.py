"""The model card of an exported run: README.md as the Hugging Face hub reads it. Names of others cannot become markup in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.evaluation.classify import Classifier
from pipeline.evaluation.evaluate import read_metrics
from pipeline.evaluation.statistics import mean_interval
from pipeline.report.comparison import clusters_of
from pipeline.report.markdown import escape_markdown
from pipeline.report.results import read_groups
from pipeline.runtime.errors import UserError
from pipeline.runtime.version import DISTRIBUTION, program_version
from pipeline.types import SPLITS

MAX_NAMED_CLASSES = 20  # that the card names
NO_LICENCE = "not known here; see where the weights of the encoder come from"


def model_card(classifier: Classifier, facts: dict[str, Any], files: list[str], home: Path) -> str:
    """Return the text of README.md.

    Args:
        classifier: the run.
        facts: of config.json, the part "diffalign".
        files: names of the graphs: model.pt2, model.onnx.
        home: where the manifest may be, which knows the groups of samples.
    """
    spec, run = classifier.spec, classifier.run
    kind = "video-classification" if facts["media_type"] == "video" else "image-classification"
    head = {
        "library_name": DISTRIBUTION,
        "pipeline_tag": kind,
        "tags": [DISTRIBUTION, facts["method"]],
        "datasets": [spec.dataset],
    }
    names = ", ".join(map(escape_markdown, spec.class_names[:MAX_NAMED_CLASSES]))
    more = f" and {len(spec.class_names) - MAX_NAMED_CLASSES} more" if len(spec.class_names) > MAX_NAMED_CLASSES else ""
    noise = f"float32 [B,{facts['noise_size']}], standard normal" if facts["noise_size"] else "none: this head draws no numbers"
    backend = "" if "model.onnx" in files else ', backend="torch"'
    lines = [
        f"# {escape_markdown(facts['method'])} on {escape_markdown(spec.dataset)}",
        "",
        f"A classifier of {facts['media_type']}s in {len(spec.class_names)} classes: {names}{more}.",
        "It was trained with the help of texts, and reads none.",
        "",
        *_table(
            ("", ""),
            [
                ("data set", spec.dataset),
                ("licence of the data", spec.licence or "not known"),
                ("licence of the encoder's weights", facts["weights_licence"]),
                ("encoder", ", ".join([spec.encoder, *(f"{k}={v}" for k, v in facts["encoder_settings"].items())])),
                ("head", f"{facts['method']}, seed {run.seed}, run {run.path.parent.name}"),
                ("labels", "several per sample" if spec.is_multi_label else "one per sample"),
                ("probabilities", classifier.calibration.describe()),
                ("program", f"{DISTRIBUTION} {program_version()}"),
            ],
        ),
        "",
        "## Metrics",
        "",
        *_metrics(classifier, home),
        "",
        "## Use",
        "",
        f"```python\nimport pipeline as da  # the package of {DISTRIBUTION}\n\n"
        f'model = da.load_export("."{backend})\nprint(model.predict(["picture.jpg"], top=3))\n```',
        "",
        f"{DISTRIBUTION} is installed from its source, with `pip install .` in that folder: a package index has none, and a "
        "package of that name there would be somebody else's.",
        "",
        number_format(facts["compute_dtype"], files),
        "",
        '`load_export` runs `model.onnx`, and with `backend="torch"` `model.pt2`. To load that can run code: '
        "do so only with folders that you trust.",
        "",
        f"Graphs: {', '.join(f'`{each}`' for each in files)}. "
        f"Input `pixel_values`: {facts['pixels']}, prepared as `preprocessor_config.json` says. "
        f"Input `noise`: {noise}. Output: logits float32 [B,{len(spec.class_names)}] of the classes in `labels.json`. "
        "`model.safetensors` has the weights of the graphs, `config.json` the names of the noise's streams.",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines) + "\n"


def number_format(compute_dtype: str, files: list[str]) -> str:
    """Return a line that says in which number format each graph computes the encoder, and what that means for the classes."""
    if compute_dtype == "float32":
        return "The encoder computes in float32, as for the run."
    program = f"The encoder in `model.pt2` multiplies in bfloat16, as for the run (`compute_dtype={compute_dtype}`)."
    onnx = (
        " In `model.onnx` it rounds to bfloat16 in the same places, but adds up in another order: of two classes that are "
        "nearly equally probable, it may give the other."
    )
    return program + onnx * ("model.onnx" in files)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    shown = [head, ("---",) * len(head), *(tuple(map(escape_markdown, row)) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in shown]


def _metrics(classifier: Classifier, home: Path) -> list[str]:
    """Return a table of the run's own evaluations, with intervals over samples, or groups of these, for means over samples."""
    try:
        groups, drawn = read_groups(home, classifier.spec.dataset), "samples"
    except UserError:  # a run may be exported without its home
        groups, drawn = {}, "samples taken as independent"
    drawn = "groups of samples" if groups else drawn
    rows = list(_metric_rows(classifier, groups))
    if not rows:
        return ["The run has not been evaluated."]
    note = f"In percent. Intervals are of 95 % over {drawn}, for one seed. Settings were chosen on val."
    return [*_table(("split", "samples", "metric", "value", "interval"), rows), "", note]


def _metric_rows(classifier: Classifier, groups: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    records = read_metrics(classifier.run)
    for split in SPLITS:
        path = classifier.run.path / f"predictions-{split}.npz"
        if split not in records:
            continue
        arrays = dict(np.load(path)) if path.is_file() else {}
        clusters = clusters_of(arrays["ids"].tolist(), groups) if groups and arrays else None
        for name, value in records[split]["metrics"].items():
            estimate = mean_interval(arrays[name], clusters) if name in arrays else None
            interval = f"{estimate.low:.2f} to {estimate.high:.2f}" if estimate else ""
            yield split, str(records[split]["n"]), name, f"{value:.2f}", interval
