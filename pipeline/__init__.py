"""Train image classifiers on cached features, with the help of texts that exist only for training images.

The pipeline has three stages. Stage 1 (`extract`) runs encoders over the official files of a dataset and stores the features in
a verified cache. Stage 2 (`train-head`) trains light heads on the cached features in seconds; some methods align the image
features with the text features by diffusion. Stage 3 (`finetune`) trains the encoders together with a head, and stage 1 can
extract the features of the tuned encoders again.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cache.arrays import Features
    from pipeline.cache.reader import Cache
    from pipeline.data.dataset import Dataset
    from pipeline.data.manifest import Manifest
    from pipeline.encoders._encoder import Encoder
    from pipeline.nn.method import Method
    from pipeline.runtime.errors import UserError
    from pipeline.studies.exported import ExportedClassifier, load_export
    from pipeline.studies.runs import Run, Runs, load_run
    from pipeline.workspace import Workspace

__all__ = [
    "Cache",
    "Dataset",
    "Encoder",
    "ExportedClassifier",
    "Features",
    "Manifest",
    "Method",
    "Run",
    "Runs",
    "UserError",
    "Workspace",
    "load_export",
    "load_run",
]

# The public API. Everything else is internal. A name is imported at its first use, so that `import pipeline` is instant.
_MODULES = {
    "Cache": "pipeline.cache.reader",
    "Dataset": "pipeline.data.dataset",
    "Encoder": "pipeline.encoders._encoder",
    "ExportedClassifier": "pipeline.studies.exported",
    "Features": "pipeline.cache.arrays",
    "Manifest": "pipeline.data.manifest",
    "Method": "pipeline.nn.method",
    "Run": "pipeline.studies.runs",
    "Runs": "pipeline.studies.runs",
    "UserError": "pipeline.runtime.errors",
    "Workspace": "pipeline.workspace",
    "load_export": "pipeline.studies.exported",
    "load_run": "pipeline.studies.runs",
}


def __getattr__(name: str) -> Any:
    """Import a name of the public API at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}; its public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
