"""A graph of one addition, y = x + bias, for tests of what runs a graph."""

from pathlib import Path

import onnx
import onnx.parser

from ilf_trt.contract.ports import Graph, Port, Role

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[B,3] x, float[3] bias) => (float[B,3] y)
{
    y = Add (x, bias)
}
"""
SMALL = Graph(
    "small",
    (Port("x", ("B", 3), "float32", Role.TOKENS), Port("bias", (3,), "float32", Role.TOKENS)),
    (Port("y", ("B", 3), "float32", Role.TOKENS),),
)


def write_small(folder: Path) -> Path:
    """Write `small.onnx`."""
    path = folder / "small.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path
