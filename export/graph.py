"""Turns one segment into one ONNX file whose inputs and outputs bear the contract's names."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import Dim

from ilf_trt.contract.manifest import AttentionAmax
from ilf_trt.contract.ports import PICTURES, ROWS, Graph, Port
from ilf_trt.contract.spec import BatchRange, ModelSpec
from ilf_trt.errors import PortMismatch, UnsupportedBackbone, shown
from ilf_trt.model.foreign import quieted

from .attention import fold_attention_scales, name_attentions, pad_heads
from .passes import check_operators, name_linears, share_equal, strip_metadata
from .quantization import quantize_attentions, quantize_linears
from .segments import Segment

OPSET = 20
NAME_CHARS = 80
EXPORTERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
MAX_TIMES = 1024
TRACED_PICTURES = 2
TRACED_TIMES = 3


def export_segment(
    segment: Segment,
    batch: BatchRange,
    path: Path,
    *,
    amax: Mapping[str, float] | None = None,
    attentions: Mapping[str, AttentionAmax] | None = None,
    pad: bool = False,
) -> int:
    """Write `path` and its weights beside it as `path`.data; returns the number of Linears that became FP8.

    `amax` names the Linears that shall, with the largest magnitude of their inputs; `attentions` names the attentions,
    whose heads `pad` fills up with zeros as far as TensorRT wants. Raises UnsupportedBackbone for an attention that
    cannot be found in the graph as a query's Linear, two products and a Softmax.
    """
    graph = segment.graph
    program = trace_segment(segment, batch)
    model = program.model
    name_linears(model, segment.name_in_model)
    name_attentions(model)
    fold_attention_scales(model)
    if pad:
        pad_heads(model, attentions or ())
    strip_metadata(model)
    share_equal(model)
    quantize_attentions(model, attentions or {})
    there = {node.name for node in model.graph}
    missing = [name for name in attentions or {} if f"{name}.q_quantize" not in there]
    if missing:
        raise UnsupportedBackbone(
            f"graph {graph.name}: attention {shown(missing[0], NAME_CHARS)} is none in the graph, so it cannot run in "
            "FP8; pass --no-fp8-attention, or --fp8-exclude with its name"
        )
    quantized = quantize_linears(model, amax or {})
    _check_border(model.graph, graph, batch)
    check_operators(model)
    model.graph.name = graph.name
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)
    return quantized


def trace_segment(segment: Segment, batch: BatchRange) -> Any:
    """The exporter's program of a segment; its `model` still has the exporter's notes.

    Opset 20 decomposes attention, which every engine accepts under a mask (opset 23's Attention does not run under a
    broadcast mask on ONNX Runtime's CPU provider).
    """
    graph = segment.graph
    sizes = _traced_sizes(segment.spec, batch)
    inputs = tuple(_example(port, sizes) for port in graph.inputs)
    with quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            segment,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            dynamic_shapes=_dynamic_shapes(segment.spec, graph, batch),
            verbose=False,
        )
    return program


def _check_border(exported: Any, graph: Graph, batch: BatchRange) -> None:
    """The exporter may fix a dimension that was asked to vary, and says nothing."""
    for value, port in zip((*exported.inputs, *exported.outputs), (*graph.inputs, *graph.outputs), strict=True):
        fixed = (PICTURES, ROWS) if batch.fixed else ()
        varying = [axis for axis, dim in enumerate(port.shape) if isinstance(dim, str) and dim not in fixed]
        if [axis for axis, dim in enumerate(value.shape) if not isinstance(dim, int)] != varying:
            raise PortMismatch(
                f"{graph.name}: {port.name} was exported as {value.shape}, the contract says {port.shape}"
            )


def _traced_sizes(spec: ModelSpec, batch: BatchRange) -> dict[str, int]:
    """Sizes to trace with, no two symbols of the batch alike, or the exporter takes them for one."""
    pictures = batch.max if batch.fixed else TRACED_PICTURES
    return {PICTURES: pictures, ROWS: 2 * pictures, "T": TRACED_TIMES, **spec.sides(spec.latent[1:])}


def _example(port: Port, sizes: dict[str, int]) -> Tensor:
    shape, dtype = port.resolve(sizes), cast(torch.dtype, getattr(torch, port.dtype))
    return torch.zeros(shape, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)


def _dynamic_shapes(spec: ModelSpec, graph: Graph, batch: BatchRange) -> tuple[tuple[dict[int, Any], ...]]:
    symbols: dict[str, Any] = {"T": Dim("T", min=1, max=MAX_TIMES)}
    if not batch.fixed:
        most = max(batch.max, TRACED_PICTURES)
        symbols |= {PICTURES: Dim(PICTURES, min=1, max=most), ROWS: Dim(ROWS, min=1, max=2 * most)}
    for axis, (cells, patches) in enumerate((("H", "h"), ("W", "w"))):
        sides = [size[axis] // spec.patch for size in spec.sizes]
        if min(sides) != max(sides):
            symbols[patches] = Dim(patches, min=min(sides), max=max(sides))
            symbols[cells] = spec.patch * symbols[patches]
    return (
        tuple({axis: symbols[dim] for axis, dim in enumerate(port.shape) if dim in symbols} for port in graph.inputs),
    )


def quiet() -> AbstractContextManager[None]:
    """Silence the exporter's log and warnings. Its errors still raise."""
    return quieted(EXPORTERS, logging.ERROR)
