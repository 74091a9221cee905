"""Changes of a command's parameters that all commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from pipeline.runtime.errors import UserError

_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def accept_dataset_both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that takes its `dataset` as an argument or as --dataset; without such a parameter, the same function.

    The new command raises ValueError if both are given and differ, or if the dataset has no default and neither is given.
    """
    signature = inspect.signature(function, eval_str=True)
    declared = signature.parameters.get("dataset")
    if declared is None:
        return function

    @wraps(function)
    def run(dataset: str | None = None, dataset_option: str | None = None, **arguments: Any) -> Any:
        given = [name for name in (dataset, dataset_option) if name is not None]
        if len(set(given)) > 1:
            raise UserError(f"the dataset is given twice: {given[0]} as argument, and {given[1]} by --dataset")
        if not given and declared.default is inspect.Parameter.empty:
            raise UserError("which dataset? Give its name as argument or by --dataset; `diffalign datasets` lists them")
        return function(dataset=given[0] if given else declared.default, **arguments)

    default = f" Default: {declared.default}." if declared.default else ""
    about = declared.annotation.__metadata__[0].help + (default if declared.default is not inspect.Parameter.empty else "")
    kinds = {
        "dataset": typer.Argument(metavar="DATASET", help=about, show_default=False),
        "dataset_option": typer.Option("--dataset", metavar="DATASET", help="The same as the argument DATASET."),
    }
    both = [
        inspect.Parameter(name, _KEYWORD_ONLY, default=None, annotation=Annotated[str | None, kind])
        for name, kind in kinds.items()
    ]
    parameters = [parameter.replace(kind=_KEYWORD_ONLY) for parameter in signature.parameters.values()]
    place = list(signature.parameters).index("dataset")
    changed = signature.replace(parameters=[*parameters[:place], *both, *parameters[place + 1 :]])
    setattr(run, "__signature__", changed)  # noqa: B010 - no attribute for pyright
    return run
