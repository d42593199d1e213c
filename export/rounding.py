"""Restates a bfloat16 graph in float32 that is rounded to bfloat16 at every step, for engines that have none."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ilf_trt.contract.bundle import GRAPH_FOLDER, TOKENIZER_FILE, graph_file, weights_file, write_manifest
from ilf_trt.contract.graphs import all_graphs
from ilf_trt.contract.manifest import Manifest
from ilf_trt.contract.spec import Precision

BF16, FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def write_rounded(bundle: Path, folder: Path, manifest: Manifest) -> Path:
    """A float32 bundle in `folder` that computes what the bfloat16 one in `bundle` does, with its reference."""
    (folder / GRAPH_FOLDER).mkdir(parents=True)
    for graph in manifest.graphs:
        model = ir.load(bundle / graph_file(graph.name))
        emulate_bfloat16(model)
        path = folder / graph_file(graph.name)
        ir.save(model, path, external_data=weights_file(path).name)
    for path in (*bundle.glob("*.npz"), *bundle.glob(TOKENIZER_FILE)):
        shutil.copyfile(path, folder / path.name)
    wide = Precision.FP32
    precision = wide if manifest.precision is Precision.BF16 else manifest.precision
    text = None if manifest.text is None else replace(manifest.text, precision=wide)
    decoder = None if manifest.decoder is None else replace(manifest.decoder, precision=wide)
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
        text=text,
        decoder=decoder,
    )
    write_manifest(folder, restated)
    return folder


def emulate_bfloat16(model: Any) -> int:
    """Turn every bfloat16 value into a float32 one that holds the same bfloat16 numbers; returns how many there were.

    What a node gave in bfloat16 is computed in float32 and then rounded, as a unit with float32 accumulators does.
    """
    graph, changes = model.graph, 0
    for value in graph.initializers.values():
        if value.dtype == BF16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = FP32
            changes += 1
    for value in graph.inputs:
        if value.dtype == BF16:
            value.dtype = FP32
            changes += 1
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == BF16:
                widened = ir.tensor(attribute.value.numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, widened)
        if node.op_type == "Cast" and node.attributes["to"].value == BF16:
            node.attributes["to"] = ir.AttrInt64("to", FP32.value)
        for output in node.outputs:
            if output.dtype == BF16:
                _round(graph, node, output)
                changes += 1
    return changes


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
