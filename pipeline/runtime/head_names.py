"""Heads of a home by the words that people use for them: a name or tag of their own, the folder's name, or "latest".

A head is what the seeds of one configuration share: the folder `<home>/runs/<dataset>/<method>-<fingerprint12>/`. Its tags are
words that a user gave it; they are no part of its identity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock_file, write_atomic
from pipeline.runtime.runs import HEAD_FOLDER, SEED_FOLDER, RunFolder

MAX_LISTED = 20  # heads that an error lists
LATEST = "latest"  # the head that finished last
_TAG = re.compile(r"[^\W_][\w.+-]{0,63}")


@dataclass(frozen=True, slots=True)
class HeadFolder:
    """The folder that all seeds of one configuration share."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name, "<method>-<fingerprint12>"."""
        return self.path.name

    @property
    def full_name(self) -> str:
        """What identifies the head in a home, "<dataset>/<name>"."""
        return f"{self.dataset}/{self.name}"

    @property
    def dataset(self) -> str:
        """The dataset that the head was trained on."""
        return self.path.parent.name

    @property
    def runs(self) -> list[RunFolder]:
        """The runs of all seeds, finished or not, by seed."""
        folders = [path.parent for path in self.path.glob("seed*/config.json") if SEED_FOLDER.fullmatch(path.parent.name)]
        return sorted(map(RunFolder.at, folders), key=lambda run: run.seed)

    @property
    def finished(self) -> float:
        """When the last seed finished training, in seconds since 1970; 0.0 if none has."""
        return max((path.stat().st_mtime for path in self.path.glob("seed*/done")), default=0.0)

    @property
    def tags(self) -> tuple[str, ...]:
        """The words that a user gave the head, in alphabetical order.

        Raises:
            UserError: the file that holds them is damaged.
        """
        path = self.path / "tags.json"
        if not path.is_file():
            return ()
        try:
            tags = [tag for tag in json.loads(path.read_text()) if isinstance(tag, str)]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged; delete it: it holds nothing but the tags of this head") from error
        return tuple(sorted(set(tags)))

    def change_tags(self, add: Iterable[str] = (), remove: Iterable[str] = ()) -> tuple[str, ...]:
        """Add and remove tags, and return those that the head has now.

        Raises:
            UserError: a word cannot be a tag, or the head does not have a tag that is to be removed.
        """
        add, remove = list(map(check_tag, add)), list(remove)
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_file(self.path / ".tags.lock", f"another process changes the tags of {self.path}", wait=True):
            tags = set(self.tags)
            for tag in remove:
                if tag not in tags:
                    raise unknown_choice(tag, f"{self.name} has no tag {tag!r}", sorted(tags))
            tags = tags.difference(remove).union(add)
            write_atomic(self.path / "tags.json", json.dumps(sorted(tags)))
        return tuple(sorted(tags))


def check_tag(tag: str) -> str:
    """Return a word that can be a tag.

    Raises:
        UserError: it is reserved, or has signs other than letters, digits and . _ + -
    """
    if tag == LATEST or SEED_FOLDER.fullmatch(tag) or HEAD_FOLDER.fullmatch(tag):
        raise UserError(f"{tag!r} has a meaning of its own; take another word")
    if not _TAG.fullmatch(tag):
        raise UserError(
            f"{tag!r} cannot be a name or tag: take up to 64 letters, digits and . _ + -, beginning with a letter or digit"
        )
    return tag


def list_heads(home: Path, dataset: str = "") -> list[HeadFolder]:
    """Return the heads of a home, or those of one dataset, by dataset and name. Copies in folders of other names are none."""
    pattern = f"{_escape(dataset) or '*'}/*-*"
    heads = [HeadFolder(path) for path in (home / "runs").glob(pattern) if HEAD_FOLDER.fullmatch(path.name)]
    heads = [head for head in heads if head.runs]
    return sorted(heads, key=lambda head: (head.dataset, head.name))


def find_head(
    home: Path, word: str, dataset: str = "", describe: Callable[[HeadFolder], str] = lambda head: head.full_name
) -> HeadFolder:
    """Return the head that a word means: "latest", a tag, the name of a head's folder, or the beginning of such a name.

    Args:
        home: the folder of all artifacts.
        word: the word; "DATASET/WORD" names the dataset, too.
        dataset: look at the heads of this dataset alone; "": of all.
        describe: what the error lists of each head.

    Raises:
        UserError: no head fits, or several do; the message lists the choices.
    """
    dataset_named, _, rest = word.rpartition("/")
    if dataset_named and not _TAG.fullmatch(dataset_named):
        raise UserError(
            f"{word} is not a run: give the folder of a run or a head, or one of those that `diffalign runs ls` shows"
        )
    heads = list_heads(home, dataset or dataset_named)
    fits: list[HeadFolder] = []
    if rest == LATEST:
        done = [head for head in heads if head.finished]
        fits = [max(done, key=lambda head: head.finished)] if done else []
    elif rest:
        fits = (
            [head for head in heads if head.name == rest]
            or [head for head in heads if rest in head.tags]
            or [head for head in heads if head.name.startswith(rest)]
        )
    if len(fits) == 1:
        return fits[0]
    where = f"{home} has" + (f" no head of {dataset or dataset_named}" if dataset or dataset_named else " no head")
    if not heads:
        raise UserError(
            f"{word} is not a run, and {where}: train one with: diffalign train-head, or say with --home where it is"
        )
    if not fits:
        tags = sorted({tag for head in heads for tag in head.tags})
        more = ["…"] if len(heads) > MAX_LISTED else []
        named = [*map(describe, heads[:MAX_LISTED])]
        raise unknown_choice(
            rest, f"{where} that is called {rest!r}", named, [*more, *tags, LATEST], "`diffalign runs ls` shows all", tags
        )
    raise UserError(f"several heads are called {word!r}; choose one of: {', '.join(map(describe, fits))}")


def find_head_runs(home: Path, word: str, dataset: str = "") -> list[RunFolder]:
    """Return the runs that a word or a path means: those of all seeds of a head, or with "…/seed<k>" at the end, that one.

    Args:
        home: the folder of all artifacts.
        word: the folder of a run or of a head; or what `find_head` takes.
        dataset: see `find_head`.

    Raises:
        UserError: nothing fits, or several heads do.
    """
    path = Path(word)
    if (path / "config.json").is_file():
        return [RunFolder.at(path)]
    if path.is_dir():
        return HeadFolder(path).runs or [RunFolder.at(path)]
    word, _, seed = word.rpartition("/") if SEED_FOLDER.fullmatch(path.name) else (word, "", "")
    head = find_head(home, word, dataset)
    runs = [run for run in head.runs if seed in ("", run.path.name)]
    if not runs:
        raise UserError(f"{head.path} has no {seed}; it has: {', '.join(run.path.name for run in head.runs)}")
    return runs


def is_whole_name(word: str, run: RunFolder) -> bool:
    """Say whether a word that means a run is a path, a folder's whole name, a tag or "latest", not the beginning of a name."""
    path, head = Path(word), HeadFolder(run.path.parent)
    named = path.parent.name if SEED_FOLDER.fullmatch(path.name) else path.name
    return path.is_dir() or named in (head.name, LATEST, *head.tags)


def find_run(home: Path, word: str) -> RunFolder:
    """Return the one run that a word or a path means, see `find_head_runs`.

    Raises:
        UserError: nothing fits, or it means a head with several seeds.
    """
    runs = find_head_runs(home, word)
    if len(runs) > 1:
        raise UserError(f"{word} has several seeds; choose one of: {', '.join(f'{word}/seed{run.seed}' for run in runs)}")
    return runs[0]


def check_name_is_free(home: Path, name: str, head: HeadFolder) -> None:
    """Check that a head may be given a name: a tag that no other head has.

    Raises:
        UserError: it cannot be a tag, or another head has it.
    """
    check_tag(name)
    for other in list_heads(home):
        if name in other.tags and other.path != head.path:
            raise UserError(
                f"{other.full_name} has the name {name!r} already; take another one, or free it with: "
                f"diffalign runs tag {other.full_name} {name} --remove"
            )


def _escape(name: str) -> str:
    """Return a name as a pattern that fits this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
