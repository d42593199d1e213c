"""Puts FP8 into a graph: E4M3 around every chosen Linear and attention, as standard ONNX Q/DQ."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ilf_trt.contract.manifest import AttentionAmax

from .attention import attentions, is_folded

E4M3 = ml_dtypes.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
LARGEST_WEIGHT = 1.0
"""Of an attention: a Softmax gives at most 1, and a fused kernel's unnormalised weights reach just that."""


def quantize_linears(model: Any, amax: Mapping[str, float]) -> int:
    """Quantise the MatMul of each Linear named in `amax`; returns how many were.

    `amax` is the largest magnitude of a Linear's input, by the name of its MatMul. Scales are one a tensor, symmetric,
    in the graph's own float type, and the stored weight is what its rounded scale restores best. A weight feeds its
    MatMul through DequantizeLinear alone, which is what TensorRT fuses; Linears that share an input share its pair.
    """
    graph = model.graph
    zero = _zero(graph)
    restored: dict[tuple[int, float], Any] = {}
    count = 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.name not in amax:
            continue
        activation, weight = node.inputs
        if weight.const_value is None:
            continue
        scale = float(_scale(amax[node.name], activation.dtype))
        key = (id(activation), scale)
        if key not in restored:
            restored[key] = _quantize(graph, node, f"{node.name}.input", activation, scale, zero)
        node.replace_input_with(0, restored[key])
        node.replace_input_with(1, _quantize_weight(graph, node, weight, zero))
        if not weight.uses():
            del graph.initializers[weight.name]
        count += 1
    _drop_unused(graph, zero)
    return count


def quantize_attentions(model: Any, amax: Mapping[str, AttentionAmax]) -> int:
    """Quantise both operands of both products of each attention named in `amax`; returns how many were.

    That is what TensorRT fuses into one kernel. An attention whose scale is still a product of the graph stays as it
    is: that product would lie between the pair and the attention.
    """
    graph = model.graph
    zero = _zero(graph)
    count = 0
    for attention in attentions(graph):
        ranges = amax.get(attention.name)
        if ranges is None or not is_folded(attention) or attention.scores.name != f"{attention.name}.scores":
            continue
        for node, index, operand, largest in (
            (attention.scores, 0, "q", ranges.query),
            (attention.scores, 1, "k", ranges.key),
            (attention.mixed, 0, "p", LARGEST_WEIGHT),
            (attention.mixed, 1, "v", ranges.value),
        ):
            value = node.inputs[index]
            scale = float(_scale(largest, value.dtype))
            restored = _quantize(graph, node, f"{attention.name}.{operand}", value, scale, zero)
            node.replace_input_with(index, restored)
        count += 1
    _drop_unused(graph, zero)
    return count


def _zero(graph: Any) -> Any:
    """The zero point of every pair."""
    found = graph.initializers.get("fp8_zero")
    return _constant(graph, "fp8_zero", np.zeros((), E4M3)) if found is None else found


def _drop_unused(graph: Any, value: Any) -> None:
    if not value.uses():
        del graph.initializers[value.name]


def _scale(amax: float, dtype: ir.DataType) -> NDArray[Any]:
    return np.asarray(max(amax / E4M3_MAX, SMALLEST_SCALE), dtype.numpy())


def _quantize(graph: Any, node: Any, name: str, activation: Any, scale: float, zero: Any) -> Any:
    """A pair named after `name` before `node`; gives the restored activation."""
    stored = _constant(graph, f"{name}_scale", np.asarray(scale, activation.dtype.numpy()))
    pair = [ir.node("QuantizeLinear", [activation, stored, zero], name=f"{name}_quantize")]
    pair.append(ir.node("DequantizeLinear", [pair[0].outputs[0], stored, zero], name=f"{name}_dequantize"))
    for made, dtype in zip(pair, (ir.DataType.FLOAT8E4M3FN, activation.dtype), strict=True):
        made.outputs[0].name = made.name
        made.outputs[0].dtype = dtype
        made.outputs[0].shape = activation.shape
    graph.insert_before(node, pair)
    return pair[1].outputs[0]


def _quantize_weight(graph: Any, node: Any, weight: Any, zero: Any) -> Any:
    values = weight.const_value.numpy()
    scale = _scale(float(np.abs(values.astype(np.float32)).max()), weight.dtype)
    rounded = np.clip(values.astype(np.float32) / np.float32(scale), -E4M3_MAX, E4M3_MAX).astype(E4M3)
    name = f"{node.name}.weight"
    stored = _constant(graph, f"{name}_fp8", rounded)
    restore = ir.node(
        "DequantizeLinear", [stored, _constant(graph, f"{name}_scale", scale), zero], name=f"{name}_dequantize"
    )
    restore.outputs[0].name = restore.name
    restore.outputs[0].dtype = weight.dtype
    restore.outputs[0].shape = weight.shape
    graph.insert_before(node, restore)
    return restore.outputs[0]


def _constant(graph: Any, name: str, array: NDArray[Any]) -> Any:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.initializers[name] = value
    return value
