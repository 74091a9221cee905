"""Find plug-ins: data sets, encoders and methods.

A plug-in is one file with one subclass of the base class of its kind, `pipeline.Dataset`, `pipeline.Encoder` or
`pipeline.Method`. Its name is the file's name without ".py". It stands in the folder of its kind, or outside of this
repository: then it is loaded by `load_file`, or found as an entry point of an installed distribution, in one of the groups
diffalign.methods, diffalign.encoders and diffalign.datasets. There is no registry to edit.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.runtime.plugin_rules import BASES, check_dataset, check_encoder
from pipeline.runtime.plugin_rules import check_method as check_method  # part of this module's interface

if TYPE_CHECKING:
    from pipeline.data.dataset import Dataset
    from pipeline.encoders._encoder import Encoder
    from pipeline.nn.method import Method

PACKAGES = {"datasets": "pipeline.data.datasets", "encoders": "pipeline.encoders", "methods": "pipeline.methods"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a plug-in comes from."""

    module: str  # the name to import it by
    text: str  # for messages


@dataclass(frozen=True, slots=True)
class _LoadedFile:
    """A file that `load_file` has run."""

    kind: str
    path: Path
    sha256: str  # of what was run


_loaded: dict[str, _LoadedFile] = {}  # by the name of its module
_run_files: set[str] = set()  # paths of all files that were run, also of those that failed
_loading = RLock()  # threads of a worker load one file once


def names(kind: str) -> list[str]:
    """Return the sorted names of the plug-ins of a kind.

    Files whose names begin with "_" are helpers and are left out. No plug-in of this package is imported.

    Raises:
        UserError: two plug-ins have one name.
    """
    return sorted(_places(kind))


def check_name(kind: str, name: str) -> None:
    """Check that there is a plug-in of this name, without importing it.

    Raises:
        UserError: there is none; the message lists the choices.
    """
    choices = names(kind)
    if name not in choices:
        raise unknown_choice(name, f"unknown {kind[:-1]} {name!r}", choices, hint="a file of yours is given by --plugin FILE")


@overload
def get(kind: Literal["methods"], name: str) -> type[Method]: ...
@overload
def get(kind: Literal["encoders"], name: str) -> type[Encoder]: ...
@overload
def get(kind: Literal["datasets"], name: str) -> type[Dataset]: ...
@overload
def get(kind: str, name: str) -> Any: ...
def get(kind: str, name: str) -> Any:
    """Import a plug-in and return its class.

    Raises:
        UserError: there is no such plug-in (the message lists the choices), the file defines none, or it breaks a rule.
    """
    check_name(kind, name)
    return _plugin_class(importlib.import_module(_places(kind)[name].module), (kind,))[1]


def load_file(path: Path) -> str:
    """Run a Python file that defines a plug-in, so that `names` and `get` know it; return its kind.

    The file defines one subclass of `pipeline.Method`, `pipeline.Encoder` or `pipeline.Dataset`; beside the file of a data set
    stands NAME.yaml. Loading a file again does nothing, unless its content has changed.

    Raises:
        UserError: there is no such file, it cannot be run, it defines no plug-in, it breaks a rule, or its name is taken.
    """
    path = Path(os.path.abspath(path))  # not `resolve`: a link has a name of its own
    module_name = f"diffalign_plugin_{path.stem}"
    if path.suffix != ".py" or not path.stem.isidentifier() or not path.is_file():
        raise UserError(f"{path} is no plug-in: give a Python file whose name is a word, such as own_method.py")
    with _loading:
        before = _loaded.get(module_name)
        if before and before.path != path:
            raise UserError(f"two plug-ins are named {path.stem!r}: {before.path} and {path}; rename one of the files")
        digest = file_sha256(path)
        if before and before.sha256 == digest:
            return before.kind
        forget_file(path)
        kind = _run(path, module_name)
        _loaded[module_name] = _LoadedFile(kind, path, digest)
        try:
            _places(kind)  # refuses a name that is taken
        except UserError:
            forget_file(path)
            raise
        return kind


def loaded_files() -> tuple[Path, ...]:
    """Return the files that `load_file` has loaded, in order; a worker process loads them too."""
    return tuple(loaded.path for loaded in _loaded.values())


def forget_file(path: Path) -> None:
    """Undo `load_file`, for tests and notebooks: afterwards the file is loaded anew."""
    module_name = f"diffalign_plugin_{path.stem}"
    if _loaded.pop(module_name, None):
        del sys.modules[module_name]


def external_sha256(kind: str, name: str) -> str:
    """Return the SHA-256 of the file of a plug-in from outside of this package, as it was run; "" for one of this package."""
    if not is_external(kind, name):
        return ""
    loaded = _loaded.get(_places(kind)[name].module)
    return loaded.sha256 if loaded else file_sha256(source_file(kind, name))


def failed_file(error: BaseException) -> str:
    """Return "FILE, line N" of the innermost code of a `load_file` that an exception has passed; "" when there is none."""
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _run_files]
    return f"{found[-1].filename}, line {found[-1].lineno}" if found else ""


def first_line(kind: str, name: str) -> str:
    """Return the first line of a plug-in's docstring without importing the plug-in."""
    return documentation(kind, name).partition("\n")[0]


def documentation(kind: str, name: str) -> str:
    """Return the docstring of a plug-in's file without importing the plug-in."""
    return ast.get_docstring(ast.parse(source(kind, name))) or ""


def literal(kind: str, name: str, attribute: str) -> Any:
    """Return the plain value of an attribute of a plug-in's class without importing the plug-in; None if there is none."""
    for node in ast.walk(ast.parse(source(kind, name))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == attribute and node.value:
            with suppress(ValueError):  # it is computed
                return ast.literal_eval(node.value)
    return None


def source(kind: str, name: str) -> str:
    """Return the source code of a plug-in without importing it."""
    return source_file(kind, name).read_text(encoding="utf-8")


def source_file(kind: str, name: str) -> Path:
    """Return the file of a plug-in without importing the plug-in."""
    module_name = _places(kind)[name].module
    if module_name in _loaded:
        return _loaded[module_name].path
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        raise UserError(f"the {kind[:-1]} {name!r} has no file: {_places(kind)[name].text}")
    return Path(spec.origin)


def is_external(kind: str, name: str) -> bool:
    """Whether a plug-in comes from outside of this package."""
    place = _places(kind).get(name)
    return place is not None and not place.module.startswith(f"{PACKAGES[kind]}.")


def _places(kind: str) -> dict[str, _Place]:
    """Return all plug-ins of a kind by name.

    Raises:
        UserError: two have one name.
    """
    package = importlib.import_module(PACKAGES[kind])
    found = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    places = {name: _Place(f"{package.__name__}.{name}", f"{package.__name__}.{name}") for name in found}
    files = [(each.path.stem, _Place(module, str(each.path))) for module, each in _loaded.items() if each.kind == kind]
    for name, place in (*_entry_points(kind, tuple(sys.path)), *files):
        if name in places:
            raise UserError(f"two {kind} are named {name!r}: {places[name].text} and {place.text}; rename or remove one")
        places[name] = place
    return places


@cache
def _entry_points(kind: str, path: tuple[str, ...]) -> tuple[tuple[str, _Place], ...]:
    """Return the plug-ins of installed distributions; `path` is `sys.path`, where they are sought."""
    found = metadata.entry_points(group=f"diffalign.{kind}")
    return tuple(
        (point.name, _Place(point.module, f"{point.value} of {point.dist.name if point.dist else 'a distribution'}"))
        for point in found
    )


def _run(path: Path, module_name: str) -> str:
    """Import a file under a name and return the kind of plug-in that it defines."""
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _run_files.add(str(path))
    sys.modules[module_name] = module  # pickle finds classes by the name of their module
    try:
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError) as error:
            raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
        return _plugin_class(module, tuple(BASES))[0]
    except BaseException:
        del sys.modules[module_name]
        raise


def _plugin_class(module: ModuleType, kinds: Sequence[str]) -> tuple[str, type[Any]]:
    """Return the kind and the class of the plug-in that a module defines; one from outside of this package is checked.

    Args:
        module: the module.
        kinds: the kinds that it may be of.

    Raises:
        UserError: it defines no plug-in of these kinds, or several, or the plug-in breaks a rule.
    """
    classes = dict.fromkeys(value for value in vars(module).values() if inspect.isclass(value))  # each once, with two names too
    own = [each for each in classes if each.__module__ == module.__name__]
    found = [(kind, each) for kind in kinds for each in own if BASES[kind] in map(_full_name, each.__mro__)]
    if len(found) != 1:
        bases = " or ".join(f"pipeline.{BASES[kind][1]}" for kind in kinds)
        named = ", ".join(each.__name__ for _, each in found) or "none"
        raise UserError(f"{module.__file__} must define one subclass of {bases}; found: {named}")
    kind, plugin = found[0]
    if not module.__name__.startswith(f"{PACKAGES[kind]}."):
        _check_once(kind, plugin, Path(str(module.__file__)))
    return kind, plugin


def _full_name(each: type) -> tuple[str, str]:
    return each.__module__, each.__name__


@cache
def _check_once(kind: str, plugin: type[Any], path: Path) -> None:
    """Check a plug-in from outside, and that a data set has its settings beside its file."""
    {"methods": check_method, "encoders": check_encoder, "datasets": check_dataset}[kind](plugin)
    if kind == "datasets" and not path.with_suffix(".yaml").is_file():
        raise UserError(
            f"{path} needs {path.stem}.yaml beside it: where the official files are, their counts, and the settings"
        )
