"""What a home remembers of how its datasets were prepared: each is prepared again by its name, and none is lost to another.

A recipe is the file `<home>/manifests/<dataset>.recipe.json`. It holds paths of this machine, and is no part of any identity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.data.manifest import Manifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.places import Place, absolute_text, parse_place


class Recipe(NamedTuple):
    """What `prepare` was given."""

    plugin: str
    root: Place | None  # a folder, or tar files in an object store
    image_root: Path | None
    settings: Mapping[str, str]

    def moved_to(self, root: Place) -> Recipe:
        """Return the recipe for files that now lie in `root`; media that lay below the old root are looked for there, too."""
        media = self.image_root
        if media and isinstance(self.root, Path) and media.is_relative_to(self.root):
            media = root / media.relative_to(self.root)
        return self._replace(root=root, image_root=media)


def recipe_path(home: Path, dataset: str) -> Path:
    """Return the file with the recipe of a dataset."""
    return home / "manifests" / f"{dataset}.recipe.json"


def read_recipe(home: Path, dataset: str) -> Recipe | None:
    """Return the recipe of a dataset; None if there is none, or it cannot be read."""
    try:
        facts = json.loads(recipe_path(home, dataset).read_text(encoding="utf-8"))
        root, image_root = (parse_place(facts[key]) if facts[key] else None for key in ("root", "image_root"))
        return Recipe(str(facts["plugin"]), root, image_root, {str(key): str(text) for key, text in facts["settings"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_recipe(home: Path, dataset: str, recipe: Recipe) -> None:
    """Write the recipe of a dataset, with absolute paths."""
    root, image_root = (str(path.absolute()) if path else None for path in (recipe.root, recipe.image_root))
    facts = {"plugin": recipe.plugin, "root": root, "image_root": image_root, "settings": dict(recipe.settings)}
    write_atomic(recipe_path(home, dataset), json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def check_not_another(home: Path, manifest: Manifest) -> None:
    """Check that a manifest would not replace one that was built from other files of the user's.

    The same files may have changed or moved: what counts is that the folder of media and one of the lists in it are the same,
    or that the contents are.

    Raises:
        UserError: names the other one, and the options.
    """
    path = home / "manifests" / f"{manifest.dataset}.meta.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        place = json.loads(path.with_name(f"{manifest.dataset}.location.json").read_text(encoding="utf-8"))["media_root"]
        plugin = old["meta"].get("plugin", old["dataset"])
        before, now = (sorted(meta.get("sources", {}).values()) for meta in (old["meta"], manifest.meta))
        old_lists, lists = ({entry["file"] for entry in meta.get("lists", ())} for meta in (old["meta"], manifest.meta))
        size = sum(old["counts"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or none that can be used
        return
    has_same_content = old.get("fingerprint") == manifest.fingerprint() or (before == now and before)
    is_in_same_place = place == absolute_text(manifest.media_root) and (old_lists == lists or old_lists & lists)
    if plugin != manifest.plugin or not (has_same_content or is_in_same_place):
        what = ", ".join(sorted(old_lists)) or "folders of classes"
        raise UserError(
            f"{home} holds another dataset named {manifest.dataset!r}: {size} samples of {plugin}, {what} in {place}; "
            "give this one a name of its own, --name NAME, or put it in the place of that one, --overwrite"
        )
