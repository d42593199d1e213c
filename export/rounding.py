"""Restates a bfloat16 graph in float32 that is rounded to bfloat16 at every step, for engines that have none."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ilf_trt.contract.bundle import (
    GRAPH_FOLDER,
    REFERENCE_FILE,
    TOKENIZER_FILE,
    graph_file,
    weights_file,
    write_manifest,
)
from ilf_trt.contract.graphs import all_graphs
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.reference_cases import TEXT_EMBEDDED
from ilf_trt.contract.spec import Precision

BF16, FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def write_rounded(bundle: Path, folder: Path, manifest: Manifest) -> Path:
    """A float32 bundle in `folder` that computes what the bfloat16 one in `bundle` does, with its reference.

    Parts that are not in bfloat16 stay as they are. A text encoder that the reference has nothing of is left out: it is
    too large for this machine.
    """
    wide = Precision.FP32
    precision = wide if manifest.precision is Precision.BF16 else manifest.precision
    text, decoder = manifest.text, manifest.decoder
    if text is not None and text.precision is Precision.BF16:
        text = replace(text, precision=wide) if _has_text_reference(bundle) else None
    if decoder is not None and decoder.precision is Precision.BF16:
        decoder = replace(decoder, precision=wide)
    spec = manifest.spec
    if precision is not manifest.precision:
        spec = replace(
            spec,
            context=tuple(replace(port, dtype=wide.dtype) for port in spec.context),
            per_block=tuple(replace(port, dtype=wide.dtype) for port in spec.per_block),
        )
    restated = replace(
        manifest,
        spec=spec,
        precision=precision,
        graphs=all_graphs(spec, precision, text, decoder),
        clean_captions=manifest.clean_captions and text is not None,
        text=text,
        decoder=decoder,
    )
    (folder / GRAPH_FOLDER).mkdir(parents=True)
    for graph in restated.graphs:
        model = ir.load(bundle / graph_file(graph.name))
        emulate_bfloat16(model)
        path = folder / graph_file(graph.name)
        ir.save(model, path, external_data=weights_file(path).name)
    for path in (*bundle.glob("*.npz"), *(bundle.glob(TOKENIZER_FILE) if text is not None else ())):
        shutil.copyfile(path, folder / path.name)
    write_manifest(folder, restated)
    return folder


def emulate_bfloat16(model: Any) -> int:
    """Turn every bfloat16 value into a float32 one that holds the same bfloat16 numbers; returns how many there were.

    What a node gave in bfloat16 is computed in float32 and then rounded, as a unit with float32 accumulators does.
    """
    graph, changes = model.graph, 0
    for value in graph.initializers.values():
        if value.dtype == BF16:
            # one at a time when they are written: a text encoder has gigabytes of them
            value.const_value = ir.LazyTensor(
                partial(_widened, value.const_value), FP32, value.const_value.shape, name=value.name
            )
            value.dtype = FP32
            changes += 1
    for value in graph.inputs:
        if value.dtype == BF16:
            value.dtype = FP32
            changes += 1
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == BF16:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
        if node.op_type == "Cast" and node.attributes["to"].value == BF16:
            node.attributes["to"] = ir.AttrInt64("to", FP32.value)
        for output in node.outputs:
            if output.dtype == BF16:
                _round(graph, node, output)
                changes += 1
    return changes


def _has_text_reference(bundle: Path) -> bool:
    reference = bundle / REFERENCE_FILE
    if not reference.is_file():
        return True
    with np.load(reference, allow_pickle=False) as arrays:
        return TEXT_EMBEDDED in arrays.files


def _widened(tensor: Any) -> Any:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _round(graph: Any, node: Any, output: Any) -> None:
    users = list(output.uses())
    narrow = ir.node("Cast", [output], {"to": BF16.value}, name=f"{output.name}_narrow")
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": FP32.value}, name=f"{output.name}_wide")
    for made, dtype in ((narrow, BF16), (wide, FP32)):
        made.outputs[0].name, made.outputs[0].dtype, made.outputs[0].shape = made.name, dtype, output.shape
    output.dtype = FP32
    graph.insert_after(node, [narrow, wide])
    for user, index in users:
        user.replace_input_with(index, wide.outputs[0])
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = wide.outputs[0]
            output.name, wide.outputs[0].name = f"{output.name}_unrounded", output.name
