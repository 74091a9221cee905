"""The rules of plug-ins that can be checked from a class alone; the docstring of each base class has them all."""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.dataset import Dataset
    from pipeline.encoders._encoder import Encoder
    from pipeline.nn.method import Method

logger = logging.getLogger(__name__)

BASES = {  # kind -> module and name of its base class: a name, because looking for plug-ins must not import torch
    "methods": ("pipeline.nn.method", "Method"),
    "encoders": ("pipeline.encoders._encoder", "Encoder"),
    "datasets": ("pipeline.data.dataset", "Dataset"),
}
BATCH_KEYS = ("image", "text", "paired", "label")
READ_BACK = ("item", "tolist", "numpy", "cpu")  # methods of a tensor that copy its numbers to the processor
NOT_IN_A_STEP = ("__init__", "begin", "small")  # functions of a method that run outside of steps and predictions


def check_method(method: type[Method]) -> None:
    """Check the rules of methods that need no head; the contract tests check the others.

    A number that is kept as an attribute is only warned about: such heads train, but each by itself.

    Raises:
        UserError: the class breaks a rule, which the message names.
    """
    _refuse("method", method, _method_faults(method))
    for field in plain_numbers(method):
        logger.warning(
            "method %s breaks the rule 'numbers are tensors': %r is kept as an attribute, so heads that differ in it cannot be "
            "trained as one model; use layers.register_hyperparameters",
            method.__name__,
            field,
        )


def check_encoder(encoder: type[Encoder]) -> None:
    """Check the rules of encoders that need no weights; the contract tests check the others.

    Raises:
        UserError: the class breaks a rule, which the message names.
    """
    _refuse("encoder", encoder, _encoder_faults(encoder))


def check_dataset(dataset: type[Dataset]) -> None:
    """Check that a dataset can be built.

    Raises:
        UserError: the class breaks a rule, which the message names.
    """
    _refuse("dataset", dataset, _missing_functions(dataset))


def _refuse(kind: str, plugin: type, faults: Iterator[tuple[str, str]]) -> None:
    """Raise `UserError` for the first broken rule, if there is one."""
    for rule, fault in faults:
        raise UserError(f"{kind} {plugin.__name__} breaks the rule {rule!r}: {fault}")


def _encoder_faults(encoder: type[Encoder]) -> Iterator[tuple[str, str]]:
    """Yield the broken rules, each with what is wrong."""
    yield from _config_faults(encoder)
    yield from _missing_functions(encoder)
    if {encoder.prepare.__module__, encoder.prepare_image.__module__} == {BASES["encoders"][0]}:  # those of the base class
        yield "every function is there", "it must define prepare_image, or prepare if it does not read images"


def _missing_functions(plugin: type) -> Iterator[tuple[str, str]]:
    lacking = sorted(getattr(plugin, "__abstractmethods__", ()))
    if lacking:
        yield "every function is there", f"it must define {', '.join(lacking)}"


def _config_faults(plugin: type) -> Iterator[tuple[str, str]]:
    config = getattr(plugin, "Config", None)
    if not isinstance(config, type) or not is_dataclass(config) or not config.__hash__:
        yield "settings are a frozen dataclass", "its class attribute Config must be one"
        return
    without = [field.name for field in fields(config) if _has_no_default(field)]
    if without:
        yield "every setting has a default", f"{', '.join(without)} of Config has none"


def _method_faults(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Yield the broken rules, each with what is wrong."""
    yield from _config_faults(method)
    needs = getattr(method, "needs", None)
    if not isinstance(needs, tuple) or "image" not in needs or not set(needs) <= set(BATCH_KEYS):
        yield "image is needed", f"its class attribute needs must be a tuple of {', '.join(BATCH_KEYS)}, with 'image' in it"
        return
    if "text" in needs and "paired" not in needs:
        yield "text is weighted by paired", "needs has 'text' without 'paired': some samples have no text, and must not count"
    known = {field.name for field in fields(method.Config)}
    named = {*method.symbols.values(), *method.grid, *method.prediction}
    if not {name.partition(".")[0] for name in named} <= known:
        yield "letters, grid and prediction name settings", f"Config has no {', '.join(sorted(named - known))}"
    yield from _signature_faults(method)
    yield from _step_faults(method)


def _has_no_default(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is MISSING and field.default_factory is MISSING


def _signature_faults(method: type[Method]) -> Iterator[tuple[str, str]]:
    for name, extra in (("predict", False), ("feature", True)):
        parameters = list(inspect.signature(getattr(method, name)).parameters.values())
        found = [parameter.name for parameter in parameters]
        rest = parameters[3:]
        if found[:3] != ["self", "image", "rng"] or (rest and not extra) or any(p.default is p.empty for p in rest):
            yield "prediction reads images alone", f"{name} takes ({', '.join(found)}); it must take (self, image, rng)"
    found = list(inspect.signature(method.loss).parameters)
    if found != ["self", "batch", "rng", "phase"]:
        yield "a loss takes batch, rng and phase", f"loss takes ({', '.join(found)})"


def _step_faults(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Look for numbers that are read back, and for attributes that are assigned, in the functions that run in a step."""
    for function in _functions(method):
        if function.name in NOT_IN_A_STEP:
            continue
        for node in ast.walk(function):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr in READ_BACK and not node.args:  # pyright: ignore
                yield "no number is read back", f"{function.name} calls .{node.func.attr}(), line {node.lineno} of it"  # pyright: ignore
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield "no number is read back", f"{function.name} assigns self.{target.attr}; write into a buffer instead"


def plain_numbers(method: type[Method]) -> list[str]:
    """Return the float settings, but those of prediction, that `__init__` assigns to attributes as they are."""
    hints = get_type_hints(method.Config)
    numbers = {name for name, hint in hints.items() if hint is float} - set(method.prediction)
    found: list[str] = []
    for function in _functions(method):
        for node in ast.walk(function) if function.name == "__init__" else ():
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                is_own = any(ast.unparse(target).lstrip("(").startswith("self.") for target in targets)
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                found += [_config_field(value) for value in values if is_own and _config_field(value) in numbers]
    return found


def _config_field(value: ast.expr) -> str:
    """Return the field that an expression such as `config.tau` or `float(config.tau)` reads, or ""."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("float", "int") and len(value.args) == 1:
        value = value.args[0]
    is_field = isinstance(value, ast.Attribute) and ast.unparse(value.value) == "config"
    return value.attr if is_field else ""  # pyright: ignore


def _functions(method: type[Method]) -> list[ast.FunctionDef]:
    """Return the functions in the source code of a class; none if it has no source, as in a console."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError):
        return []
    (node,) = tree.body
    assert isinstance(node, ast.ClassDef)
    return [each for each in node.body if isinstance(each, ast.FunctionDef)]
