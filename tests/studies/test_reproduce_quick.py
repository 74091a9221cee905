"""A trial of every table and figure of the papers on real pictures and texts, as `diffalign reproduce --quick` makes it."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pandas as pd
import pytest

from pipeline.data.artefacts import artefact_names, read_artefact
from pipeline.studies.reproduce import QUICK_SUFFIX, quick_options, reproduce
from pipeline.studies.reproduce_plan import ReproduceOptions
from pipeline.workspace import Workspace

logger = logging.getLogger("pipeline")
ENCODER = {"side": "64", "compute_dtype": "float32"}  # small pictures, so that an epoch of the encoder takes seconds
STAND_IN = "resnet50"  # no weights of the papers' backbones are at hand: this one is replaced by the encoder that is


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_artefact_on_openmoji(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.prepare("openmoji")
    image = workspace.extract("openmoji", "efficientnet_lite", settings=ENCODER)["efficientnet_lite"].path.name
    workspace.extract("openmoji", "transformers_text")
    for name in artefact_names():
        artefact, started = read_artefact(name), time.monotonic()
        places = {STAND_IN: image} if any(row.backbone == STAND_IN for row in artefact.rows) else {}
        options = ReproduceOptions(seeds=(0,), image=image, backbones=places, workers=0)
        result = reproduce(tmp_path, "openmoji", artefact, quick_options(options), QUICK_SUFFIX)
        logger.info("%s took %.0f s", name, time.monotonic() - started)
        assert not result.failed, name
        assert result.files, name
        assert all(path.stat().st_size > 0 for path in result.files), name
        if artefact.kind == "table":
            assert [path.name for path in result.files] == [
                f"{name}{QUICK_SUFFIX}{suffix}" for suffix in (".md", ".tex", ".csv")
            ]
            numbers = pd.read_csv(result.files[2]).set_index(artefact.heads[-1])
            assert numbers.index.tolist() == [row.title for row in artefact.rows]
            missing = numbers[numbers["seeds"] == 0]["reason"]
            assert all(re.match("there is no (method )?[a-z0-9_]+( at hand|$)", reason) for reason in missing), (
                missing.to_dict()
            )
            assert numbers["acc1"].max() > 15  # percent of 67 classes; chance is below 6
        else:
            assert {path.suffix for path in result.files} >= {".svg", ".pdf"}
