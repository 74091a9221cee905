"""`Dataset`: the base class of all data sets. A plug-in of the kind "datasets" is one file with one subclass of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest


class Dataset(ABC):
    """Builds the manifest of a dataset from its official files. It has no state; what can be set stands in NAME.yaml.

    NAME.yaml is in the folder `data_manifests`, or beside the file of a plug-in that comes from outside.
    """

    reads_object_stores = False  # whether `root` may be an address, such as s3://bucket/prefix

    @abstractmethod
    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest.

        Args:
            spec: the contents of NAME.yaml, with the user's settings.
            root: the folder of the official files; None for a dataset that comes with a package.

        Raises:
            UserError: a file is missing or faulty (the message names file and line), or the counts are not the expected ones.
        """
