"""Passes over an exported graph: each changes it in place and returns how many changes it made."""

import ast
import hashlib
from collections.abc import Callable
from typing import Any

from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from ilf_trt.contract.operators import is_listed
from ilf_trt.errors import UnsupportedBackbone

SCOPES = "pkg.torch.onnx.name_scopes"


def name_linears(model: Any, name: Callable[[str], str]) -> int:
    """Call the matrix product of every Linear, and its weight, as the layer is called in the whole model.

    Needs the exporter's notes; `name` maps a module's path in the segment to its path in the model.
    """
    counts: dict[str, int] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or len(scopes) < 3:
            continue
        path = name(scopes[-2])
        counts[path] = counts.get(path, -1) + 1
        node.name = f"{path}_{counts[path]}" if counts[path] else path
        if weight.is_initializer() and not counts[path]:
            weight.name = f"{path}.weight"
    return len(counts)


def check_operators(model: Any) -> None:
    """Raise UnsupportedBackbone for an operator that no bundle may have; the runtime would refuse it."""
    for node in model.graph.all_nodes():
        if not is_listed(node.domain, node.op_type):
            raise UnsupportedBackbone(
                f"graph {model.graph.name} has operator {node.domain} {node.op_type}, which a bundle may not have; "
                "write that part of the model with other operations"
            )


def strip_metadata(model: Any) -> int:
    """Drop the exporter's notes (stack traces, local paths, scopes), which make equal graphs differ in bytes."""
    changes = 0
    holders = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        holders += [node, *node.outputs]
    for holder in holders:
        if holder.metadata_props:
            holder.metadata_props.clear()
            changes += 1
        if getattr(holder, "doc_string", None):
            holder.doc_string = None
            changes += 1
    return changes


def share_equal(model: Any) -> int:
    """Keep one of every set of equal weights, and one of every set of nodes that compute the same.

    The blocks of a converted DiT each carry a copy of one time and label embedder: 75 M weights of DiT-XL/2's 750 M.
    """
    nodes = sum(1 for _ in model.graph)
    changes = _share_weights(model.graph)
    CommonSubexpressionEliminationPass()(model)
    return changes + nodes - sum(1 for _ in model.graph)


def _share_weights(graph: Any) -> int:
    """By digest: the library's own pass refuses tensors that lie transposed in memory."""
    kept: dict[tuple[Any, ...], Any] = {}
    changes = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        first = kept.setdefault(key, value)
        if first is not value and not value.is_graph_output():
            replace_all_uses_with(value, first)
            del graph.initializers[name]
            changes += 1
    return changes
