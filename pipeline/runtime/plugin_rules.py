"""The rules of plug-ins that can be checked from a class alone; the docstring of each base class has them all."""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import aliases_of, configure, describe_settings, field_types, parse_value

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
BATCH_KEYS = ("image", "text", "paired", "label", "key")
READ_BACK = ("item", "tolist", "numpy", "cpu")  # methods of a tensor that copy its numbers to the processor
IN_A_STEP = ("loss", "predict", "feature", "forward")  # functions that run in steps and predictions
SETTING_TYPES = (bool, int, float, str)


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
    defined = (encoder.prepare, encoder.prepare_pictures, encoder.prepare_image)
    if {each.__module__ for each in defined} == {BASES["encoders"][0]}:  # those of the base class
        yield "every function is there", "it must define prepare_image, or prepare if it does not read images"


def _missing_functions(plugin: type) -> Iterator[tuple[str, str]]:
    lacking = sorted(getattr(plugin, "__abstractmethods__", ()))
    if lacking:
        yield "every function is there", f"it must define {', '.join(lacking)}"


def _config_faults(plugin: type) -> Iterator[tuple[str, str]]:
    config = getattr(plugin, "Config", None)
    if not isinstance(config, type) or not is_dataclass(config) or not getattr(config, "__dataclass_params__").frozen:  # noqa: B009
        yield "settings are a frozen dataclass", "its class attribute Config must be one"
        return
    yield from _setting_faults(config)


def _method_faults(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Yield the broken rules, each with what is wrong."""
    yield from _config_faults(method)
    needs = getattr(method, "needs", None)
    if not isinstance(needs, tuple) or "image" not in needs or not set(needs) <= set(BATCH_KEYS):
        yield "image is needed", f"its class attribute needs must be a tuple of {', '.join(BATCH_KEYS)}, with 'image' in it"
        return
    if "text" in needs and "paired" not in needs:
        yield "text is weighted by paired", "needs has 'text' without 'paired': some samples have no text, and must not count"
    yield from _name_faults(method, method.Config)
    yield from _signature_faults(method)
    yield from _step_faults(method)


def _setting_faults(config: type[Any]) -> Iterator[tuple[str, str]]:
    """Look at the fields of a Config, and at its defaults."""
    without = [field.name for field in fields(config) if field.default is MISSING and field.default_factory is MISSING]
    if without:
        yield "every setting has a default", f"{', '.join(without)} of Config has none"
        return
    try:
        described = describe_settings(config)
    except (NameError, TypeError) as error:  # an annotation that cannot be read
        yield "settings are typed", f"a type of Config cannot be read: {error}"
        return
    wrong = [each.name for each in described if not each.choices and each.type not in SETTING_TYPES]
    if wrong:
        yield "settings are typed", f"{', '.join(wrong)} of Config must be bool, int, float, str or a Literal"
        return
    try:
        configure(config, {})
    except UserError as error:
        yield "every setting has a default", f"the defaults of Config are refused: {error}"


def _name_faults(method: type[Method], config: type[Any]) -> Iterator[tuple[str, str]]:
    """Look at the class attributes that name settings."""
    named = {*method.symbols.values(), *method.grid, *method.paper, *method.without_text, *method.prediction}
    named |= {*chain(*aliases_of(config).values())}
    unknown = sorted(name for name in named if name not in field_types(config))
    if unknown:
        yield "letters, grid and prediction name settings", f"Config has no {', '.join(unknown)}"
        return
    for name, values in method.grid.items():
        if not isinstance(values, tuple) or not values:
            yield "letters, grid and prediction name settings", f"grid must give a tuple of values for {name}, not {values!r}"
            return
        try:
            _ = [parse_value(name, value, field_types(config)[name]) for value in values]
        except UserError as error:
            yield "letters, grid and prediction name settings", f"a value of grid is refused: {error}"


def _signature_faults(method: type[Method]) -> Iterator[tuple[str, str]]:
    trains = any(not phase.candidates for phase in method.phases)
    for name in ("loss", "predict", "feature") if trains else ("choose", "predict", "feature"):
        if getattr(method, name).__module__ == BASES["methods"][0]:
            yield "a method trains and predicts", f"it defines no {name}"
    for name, extra in (("predict", False), ("feature", True)):
        parameters = list(inspect.signature(getattr(method, name)).parameters.values())
        found = [parameter.name for parameter in parameters]
        rest = parameters[3:]
        if found[:3] != ["self", "image", "rng"] or (rest and not extra) or any(p.default is p.empty for p in rest):
            yield "prediction reads images alone", f"{name} takes ({', '.join(found)}); it must take (self, image, rng)"
    found = list(inspect.signature(method.loss).parameters)
    if found != ["self", "batch", "phase"]:
        yield "a loss takes batch and phase", f"loss takes ({', '.join(found)})"


def _step_faults(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Look for numbers that are read back, and for attributes that are assigned, in the functions that run in a step."""
    for function in _step_functions(method):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _reads_back(node.func.attr, node):
                yield "no number is read back", f"{function.name} calls .{node.func.attr}(), line {node.lineno} of it"
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                yield "no number is read back", f"{function.name} assigns self.{node.attr}; write into a buffer instead"


def _reads_back(name: str, call: ast.Call) -> bool:
    """Whether a call of a method of this name copies a tensor to the processor."""
    return (name in READ_BACK and not call.args) or (name == "to" and any(ast.unparse(each) == "'cpu'" for each in call.args))


def _step_functions(method: type[Method]) -> list[ast.FunctionDef]:
    """Return the functions of a class that run in steps and predictions: these, and the own ones that they use."""
    own = {function.name: function for function in _functions(method)}
    reached, pending = set[str](), [name for name in IN_A_STEP if name in own]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            used = {node.attr for node in ast.walk(own[name]) if isinstance(node, ast.Attribute)}
            pending += [each for each in own if each in used]
    return [function for name, function in own.items() if name in reached]


def plain_numbers(method: type[Method]) -> list[str]:
    """Return the float settings, but those of prediction, that `__init__` assigns to attributes as they are."""
    numbers = {name for name, kind in field_types(method.Config).items() if kind is float} - set(method.prediction)
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
    """Return the setting that an expression such as `config.tau` or `float(config.ema.tau)` reads, or ""."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("float", "int") and len(value.args) == 1:
        value = value.args[0]
    root, _, name = ast.unparse(value).partition(".")
    return name if root == "config" else ""


def _functions(method: type[Method]) -> list[ast.FunctionDef]:
    """Return the functions in the source code of a class and of classes of its author that it inherits from.

    A class that has no source, as in a console, has none.
    """
    found: dict[str, ast.FunctionDef] = {}
    for each in method.__mro__:
        if each.__module__.partition(".")[0] in ("builtins", "torch") or each.__module__ == BASES["methods"][0]:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError):
            continue
        (node,) = tree.body
        assert isinstance(node, ast.ClassDef)
        found = {function.name: function for function in node.body if isinstance(function, ast.FunctionDef)} | found
    return list(found.values())
