"""A traced run as ONNX, in the number format that it was traced in."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.errors import describe_error
from pipeline.studies.export_graph import OPTIONAL_PACKAGES, ClassifierGraph

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of logits in float32, between both graphs


def write_onnx(program: Any, graph: ClassifierGraph, examples: tuple[Tensor, ...], path: Path) -> float | None:
    """Write the program as ONNX where its operators allow, and return how far its logits are from those of the graph."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        logger.warning("no %s: the packages are missing; %s", path.name, OPTIONAL_PACKAGES)
        return None
    onnxruntime: Any = importlib.import_module("onnxruntime")
    try:
        with warnings.catch_warnings(action="ignore"):
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                output_names=["logits"],
                verbose=False,
                optimize=False,
                custom_translation_table=_exact_operators(),
            )
            is_rounded = _round_between_operators(made.model)
            made.optimize()
            made.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        found: Any = session.run(None, dict(zip(names, (each.numpy() for each in examples), strict=True)))[0]
    except Exception as error:  # the exporter and the runtime raise errors of many kinds, and each means the same
        path.unlink(missing_ok=True)
        logger.warning("no %s: the graph has operators that ONNX lacks (%s)", path.name, describe_error(error)[:200])
        return None
    with torch.no_grad():
        differs = float(np.abs(found - graph(*examples).numpy()).max())
    if not (differs <= TOLERANCE or (is_rounded and np.isfinite(differs))):
        logger.warning("%s: logits differ by %.2g from those of the graph", path.name, differs)
    return differs


def _exact_operators() -> dict[Any, Any]:
    """Return the operators that are written otherwise than torch writes them, whose numbers would be another's: log sigmoid is
    log(sigmoid(x)) there, which is -inf below -88.
    """
    op: Any = importlib.import_module("onnxscript").opset18

    def log_sigmoid(x: Any) -> Any:
        return op.Neg(op.Softplus(op.Neg(x)))

    return {torch.ops.aten.log_sigmoid.default: log_sigmoid}


def _round_between_operators(model: Any) -> bool:
    """Let every operator on bfloat16 compute in float32, which all runtimes can, and round what it returns to bfloat16.

    That is what a processor does that multiplies bfloat16, but for the order in which it adds up.

    Returns:
        Whether there is such an operator.
    """
    ir, optimizer = importlib.import_module("onnx_ir"), importlib.import_module("onnxscript.optimizer")
    optimizer.inline(model)
    optimizer.fold_constants(model)  # it finds the types; to merge operators before the casts are there would lose roundings
    low, full = ir.DataType.BFLOAT16, ir.DataType.FLOAT

    def cast(value: Any, to: Any) -> Any:
        node: Any = ir.node("Cast", [value], attributes={"to": int(to)})
        node.outputs[0].dtype, node.outputs[0].shape = to, value.shape
        return node

    is_low = False
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Cast":
            continue
        for number, value in enumerate(node.inputs):
            if value is not None and value.dtype == low:
                widened = cast(value, full)
                node.graph.insert_before(node, widened)
                node.replace_input_with(number, widened.outputs[0])
        for value in node.outputs:
            if value.dtype == low and node.op_type != "Constant":
                is_low, value.dtype = True, full
                rounded = cast(value, low)
                node.graph.insert_after(node, rounded)
                ir.convenience.replace_all_uses_with(value, rounded.outputs[0])
                rounded.replace_input_with(0, value)
    return is_low
