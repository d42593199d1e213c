"""Puts FP8 into a graph: E4M3 weights and activations around every chosen Linear, as standard ONNX Q/DQ."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

E4M3 = ml_dtypes.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


def quantize_linears(model: Any, amax: Mapping[str, float]) -> int:
    """Quantise the MatMul of each Linear named in `amax`; returns how many were.

    `amax` is the largest magnitude of a Linear's input, by the name of its MatMul. Scales are one a tensor, symmetric,
    in the graph's own float type, and the stored weight is what its rounded scale restores best. A weight feeds its
    MatMul through DequantizeLinear alone, which is what TensorRT fuses; Linears that share an input share its pair.
    """
    graph = model.graph
    zero = _constant(graph, "fp8_zero", np.zeros((), E4M3))
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
            restored[key] = _quantize_input(graph, node, activation, scale, zero)
        node.replace_input_with(0, restored[key])
        node.replace_input_with(1, _quantize_weight(graph, node, weight, zero))
        if not weight.uses():
            del graph.initializers[weight.name]
        count += 1
    if not count:
        del graph.initializers[zero.name]
    return count


def _scale(amax: float, dtype: ir.DataType) -> NDArray[Any]:
    return np.asarray(max(amax / E4M3_MAX, SMALLEST_SCALE), dtype.numpy())


def _quantize_input(graph: Any, node: Any, activation: Any, scale: float, zero: Any) -> Any:
    name = f"{node.name}.input"
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
