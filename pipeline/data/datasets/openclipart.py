"""Open Clip Art: public-domain drawings with user-written titles, descriptions and keywords; classes are frequent keywords.

These are the rules, in the order in which they are applied. A class is called a concept here.
1. Drawings are the regular .svg files. Symbolic links are other names of the same drawing and are left out. Also left out, and
   counted: the series of generated stars (`drop_series`), and drawings that declare XML entities, are broken or too large,
   cannot be rendered, or show one flat colour (a stored gradient).
2. A keyword is put in lower case. Hyphens are removed; underscores and runs of blanks become one blank; outer punctuation is
   removed. Commas and semicolons separate keywords. Addresses of Perl variables (HASH(0x…)) and keywords without a letter are
   dropped.
3. A plural becomes its singular if the singular is a keyword of the collection, too: -ies becomes -y; else -es is removed; else
   -s is removed (but not from -ss). At least three letters must remain.
4. `collection_words` and `author_names` are removed. Concepts are the `max_concepts` most frequent remaining keywords with at
   least `min_images` drawings; among equally frequent ones the alphabet decides. Concepts are numbered in alphabetical order. A
   drawing without a concept is left out.
5. The texts are the title, the description, and every keyword that is not a concept. The following is removed from them, so
   that the text does not repeat the answer: e-mail and web addresses, numbers, the words of all concepts, and
   `collection_words`; singular or plural, as two words ("ice cream") or as one ("icecream"). A text that is then empty, or
   repeats another, is dropped.
6. Near-duplicates form a group: drawings whose file names differ only in a counter at the end (a number, maybe with a letter),
   in any folder, and drawings that look exactly alike at 64 x 64 pixels. Both relations count together, and they are
   transitive. A group is named after its first drawing; the SHA-256 of "<split_seed> <name>" decides its split.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.parsers import expat

from pipeline.data import fetch, splits
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.media import MAX_SVG_BYTES, open_image
from pipeline.data.spec import manifest_meta, required_counts
from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import ProgressBar
from pipeline.types import Sample

TEXT_LIMIT = 10_000  # characters of one title, description or keyword
RENDER_SIZE = 64  # pixels, at which drawings are compared
_PERL = re.compile(r"hash\(0x[0-9a-f]+\)?|\b0x[0-9a-f]{6,}\b", re.IGNORECASE)
_ADDRESS = re.compile(r"\S+@\S+|\b(?:https?://|www\.)\S+", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_COUNTER = re.compile(r"[\W_]*\d+[a-z]?[\W_]*$|[\W_]+$")
_SMALL_WORDS = frozenset({"and", "of", "the"})  # as part of a concept's name they do not reveal it
_PLURALS = (("ies", "y"), ("es", ""), ("s", ""))


class Drawing(NamedTuple):
    """What an author wrote about a drawing."""

    path: str  # relative to the folder of drawings
    title: str
    description: str
    keywords: tuple[str, ...]  # as written


class OpenClipart(Dataset):
    """The drawings of the Debian package."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the Debian package that was unpacked in `root`.

        Args:
            spec: the contents of openclipart.yaml.
            root: the folder that `diffalign fetch openclipart` made.

        Raises:
            UserError: the folder is missing, or the counts are not the expected ones.
        """
        if root is None or not (root / spec["layout"]["images"]).is_dir():
            raise UserError(f"the drawings ({spec['layout']['images']}) are missing; run: diffalign fetch openclipart")
        folder = root / spec["layout"]["images"]
        drawings, left_out = _read_all(folder)
        kept = [drawing for drawing in drawings if not set(spec["select"]["drop_series"]) & set(drawing.keywords)]
        pixel_hashes, problems = _render_hashes(folder, kept)
        drawn = [drawing for drawing in kept if drawing.path in pixel_hashes]
        classes, samples = _samples(spec, drawn, pixel_hashes)
        meta = manifest_meta(
            spec,
            sources=_sources(spec, root),
            left_out={**left_out, "series": len(drawings) - len(kept), **problems, "no_concept": len(drawn) - len(samples)},
            counts={
                "drawings": len(drawings) + len(left_out["unreadable"]),
                "groups": len({sample.group for sample in samples}),
                "without_text": sum(not sample.texts for sample in samples),
            },
        )
        manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, folder)
        check_manifest(manifest, required_counts(spec))
        return manifest


def _samples(
    spec: Mapping[str, Any], drawings: list[Drawing], pixel_hashes: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    """Return the concepts, and the samples of the drawings that have one, by rules 2 to 6."""
    select = spec["select"]
    keywords = _keywords(drawings, {*select["collection_words"], *select["author_names"]})
    classes = _concepts(keywords, select)
    labels = {path: tuple(i for i, name in enumerate(classes) if name in words) for path, words in keywords.items()}
    labelled = [drawing for drawing in drawings if labels[drawing.path]]
    banned = _banned_words(classes, select["collection_words"])
    groups = _groups({drawing.path: pixel_hashes[drawing.path] for drawing in labelled})
    samples = tuple(
        Sample(
            id=_id(drawing.path),
            split=splits.by_hash(f"{spec['split_seed']} {groups[drawing.path]}", spec["splits"]),
            media=Path(drawing.path),
            texts=_texts(drawing, keywords[drawing.path], banned),
            labels=labels[drawing.path],
            group=groups[drawing.path],
        )
        for drawing in labelled
    )
    return classes, samples


def _sources(spec: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Return the SHA-256 of the archive, if `fetch` unpacked it."""
    return (
        {spec["archive"]["package"]: fetch.read_archive_record(root)["sha256"]}
        if (root / fetch.ARCHIVE_RECORD).is_file()
        else {}
    )


def _read_all(folder: Path) -> tuple[list[Drawing], dict[str, Any]]:
    """Return the drawings in the order of their paths, and what is left out.

    The latter is the number of links ("links"), and the reason for each file that cannot be read ("unreadable").
    """
    drawings: list[Drawing] = []
    unreadable: dict[str, str] = {}
    links = 0
    found = (Path(base, name) for base, _, names in os.walk(folder) for name in names if name.lower().endswith(".svg"))
    for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink():
            links += 1
            continue
        try:
            drawings.append(read_drawing(path, relative))
        except UserError as error:
            unreadable[relative] = str(error)
    return drawings, {"links": links, "unreadable": unreadable}


def read_drawing(path: Path, relative: str) -> Drawing:
    """Read the RDF description in an SVG file.

    Args:
        path: the file.
        relative: its path relative to the folder of drawings.

    Raises:
        UserError: it is not a regular file, is too large, declares an entity, is broken XML, or holds a text that is too long.
    """
    if not path.is_file():
        raise UserError("not a regular file")  # reading a pipe may never end
    with path.open("rb") as file:
        data = file.read(MAX_SVG_BYTES + 1)
    if len(data) > MAX_SVG_BYTES:
        raise UserError(f"the drawing is larger than {MAX_SVG_BYTES} bytes")
    reader = _DescriptionReader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text.append
    parser.EntityDeclHandler = _refuse_entity
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that does not exist
        raise UserError(f"broken XML: {error}") from error
    return Drawing(relative, reader.title, reader.description, tuple(reader.keywords))


def _refuse_entity(name: str, *_: Any) -> None:
    raise UserError(f"it declares the entity {name[:40]!r}; entities are not resolved")


class _DescriptionReader:
    """Collect Work/title, Work/description and the items of Work/subject while expat walks through a file."""

    def __init__(self) -> None:
        self.title = self.description = ""
        self.keywords: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []

    def start(self, name: str, _: Mapping[str, str]) -> None:
        self._open.append(name.rpartition(" ")[2])
        self.text.clear()

    def end(self, _: str) -> None:
        parent, name = (["", *self._open])[-2:]
        is_keyword = name == "li" and "subject" in self._open
        if is_keyword or (parent == "Work" and name in ("title", "description")):
            text = " ".join("".join(self.text).split())
            if len(text) > TEXT_LIMIT:
                raise UserError(f"its {name} is longer than {TEXT_LIMIT} characters")
            if is_keyword:
                self.keywords.append(text)
            elif name == "title":
                self.title = self.title or text
            else:
                self.description = self.description or text
        self._open.pop()
        self.text.clear()


def _render_hashes(folder: Path, drawings: list[Drawing]) -> tuple[dict[str, str], dict[str, int]]:
    """Render every drawing.

    Returns:
        The SHA-256 of the pixels by path, for drawings that show more than one colour; and the numbers of the drawings that
        cannot be rendered ("undrawable") or show a single colour ("flat").
    """

    def pixel_hash(drawing: Drawing) -> str:
        try:
            image = open_image(folder / drawing.path, RENDER_SIZE)
        except UserError:
            return "undrawable"
        is_flat = image.getcolors(1) is not None  # None: more than one colour
        return "flat" if is_flat else hashlib.sha256(image.tobytes()).hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = list(ProgressBar(threads.map(pixel_hash, drawings), label="draw", total=len(drawings), unit="drawing"))
    problems = {problem: found.count(problem) for problem in ("undrawable", "flat")}
    return {drawing.path: each for drawing, each in zip(drawings, found, strict=True) if each not in problems}, problems


def _keywords(drawings: list[Drawing], ignored: Collection[str]) -> dict[str, list[str]]:
    """Return the keywords of every path by rules 2 to 4, in the author's order, each once."""
    written = {drawing.path: [word for text in drawing.keywords for word in split_keywords(text)] for drawing in drawings}
    vocabulary = {word for words in written.values() for word in words}
    singular = {word: next((s for s in possible_singulars(word) if s in vocabulary), word) for word in vocabulary}
    merged = {path: dict.fromkeys(singular[word] for word in words) for path, words in written.items()}
    return {path: [word for word in words if word not in ignored] for path, words in merged.items()}


def split_keywords(text: str) -> list[str]:
    """Return the keywords in what an author wrote as one keyword, by rule 2."""
    parts = re.split(r"[,;]", _PERL.sub(" ", text).lower().replace("-", ""))
    words = (re.sub(r"[\s_]+", " ", part).strip(" .:!?\"'()[]") for part in parts)
    return [word for word in words if any(letter.isalpha() for letter in word)]


def possible_singulars(word: str) -> Iterable[str]:
    """Yield the words that `word` may be the plural of, by rule 3, the most likely one first."""
    for ending, replacement in _PLURALS:
        stem = word.removesuffix(ending) + replacement
        if word.endswith(ending) and not word.endswith("ss") and len(stem) >= 3:
            yield stem


def _concepts(keywords: Mapping[str, list[str]], select: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the concepts, by rule 4."""
    counts = Counter(word for words in keywords.values() for word in words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(sorted(word for word in ranked[: select["max_concepts"]] if counts[word] >= select["min_images"]))


def _banned_words(classes: Iterable[str], collection_words: Iterable[str]) -> frozenset[str]:
    """Return the words that no text may hold: those of every concept, also written as one word, and the collection words."""
    words = {word for name in classes for word in name.split()} - _SMALL_WORDS
    single = {word for word in collection_words if " " not in word}
    return frozenset(words | single | {name.replace(" ", "") for name in classes})


def _texts(drawing: Drawing, keywords: list[str], banned: Collection[str]) -> tuple[str, ...]:
    """Return title, description and keywords, by rule 5."""
    texts: dict[str, str] = {}
    for text in (drawing.title, drawing.description, *keywords):
        words = remove_banned_words(text, banned)
        texts.setdefault(words.lower(), words)
    return tuple(text for text in texts.values() if text)


def remove_banned_words(text: str, banned: Collection[str]) -> str:
    """Return the words of a text that are not banned, separated by single blanks."""

    def is_banned(word: str) -> bool:
        return any(form in banned for form in (word, *possible_singulars(word)))

    words = _WORD.findall(_CAMEL.sub(" ", _ADDRESS.sub(" ", _PERL.sub(" ", text))))
    lower = [word.lower() for word in words]
    removed = {i for i, word in enumerate(lower) if is_banned(word)}
    removed |= {j for i in range(len(lower) - 1) if is_banned(lower[i] + lower[i + 1]) for j in (i, i + 1)}
    return " ".join(word for i, word in enumerate(words) if i not in removed)


def _groups(pixel_hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the name of the group of every path, by rule 6.

    Args:
        pixel_hashes: SHA-256 of the rendered pixels, by path.
    """
    leader: dict[str, str] = {}  # a union-find forest: node -> another node of its group; the root points to itself

    def find(node: str) -> str:
        while (above := leader.setdefault(node, node)) != node:
            leader[node] = node = leader.setdefault(above, above)
        return node

    for path, pixel_hash in pixel_hashes.items():
        look = f"look {pixel_hash}"
        keys = [look, f"series {series_name(path)}"] if series_name(path) else [look]
        for key in keys:
            leader[find(key)] = find(f"path {path}")
    first: dict[str, str] = {}
    return {path: first.setdefault(find(f"path {path}"), _id(path)) for path in sorted(pixel_hashes)}


def series_name(path: str) -> str:
    """Return the file's name without folder, suffix and counters, or "" if nothing is left."""
    name = PurePosixPath(path).stem.lower()
    while (shorter := _COUNTER.sub("", name)) != name:
        name = shorter
    return name


def _id(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
