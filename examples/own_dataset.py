"""A folder with a list of pictures, classes and captions. An example of a data set of your own.

(A table that `diffalign prepare table` reads needs no code; this is for layouts that it does not read.) Copy this file and
own_dataset.yaml, which stands beside it, change them, and give the file to any command. Its name is the name of the data set:

    diffalign prepare own_dataset --plugin own_dataset.py --root my_birds

    my_birds/list.txt                 train | robin/1.png | robin | a small bird with a red breast
    my_birds/pictures/robin/1.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import line_error
from pipeline.data.spec import manifest_meta, official_root, required_counts
from pipeline.runtime.files import file_sha256
from pipeline.types import SPLITS, Sample


class ListedPictures(Dataset):
    """One line per picture: split, file, class and caption, between bars."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the list.

        Args:
            spec: the contents of own_dataset.yaml, with what the user has changed (--set list=other.txt).
            root: the folder that the user names, --root.

        Raises:
            UserError: there is no such folder, or a line is faulty.
        """
        layout, root = spec["layout"], official_root(spec, root)
        path = root / layout["list"]
        rows: list[list[str]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = [part.strip() for part in line.split("|")]
            if len(row) != 4 or row[0] not in SPLITS:
                raise line_error(path, number, "expected: train, val or test | file | class | caption")
            rows.append(row)
        class_names = tuple(sorted({name for _, _, name, _ in rows}))
        samples = tuple(
            Sample(
                id=file,  # the same wherever the folder lies
                split=split,
                media=Path(file),  # below the media root
                texts=(caption,) if caption else (),
                labels=(class_names.index(name),),
                group="",  # samples of one group must be in one split: the photos of one bird
            )
            for split, file, name, caption in rows
        )
        # What the manifest says of its origin: no times, no paths of this machine.
        meta = manifest_meta(spec, sources={layout["list"]: file_sha256(path)})
        manifest = Manifest(spec["name"], spec["label_kind"], class_names, samples, meta, root / layout["pictures"])
        check_manifest(manifest, required_counts(spec))
        return manifest
