"""An ONNX graph of a bundle: held against its ports, its operators and its own file of weights before it is loaded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ilf_trt.contract.bundle import Bundle, weights_file
from ilf_trt.contract.operators import is_listed
from ilf_trt.contract.ports import GRAPHS, ITEM_BYTES, Graph
from ilf_trt.errors import BundleError, PortMismatch, shown

EXTERNAL = 1
ELEMENT_TYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16", 17: "float8e4m3fn"}  # TensorProto
STORED_BYTES = {**ITEM_BYTES, "int64": 8, "float8e4m3fn": 1}
# The part of onnx.proto that is looked at, by message and field: number, kind, repeated. The rest stays unread.
SCHEMA: Mapping[str, Mapping[str, tuple[int, str, bool]]] = {
    "Model": {"graph": (7, "Graph", False), "functions": (25, "Anything", True)},
    "Graph": {
        "node": (1, "Node", True),
        "initializer": (5, "Tensor", True),
        "input": (11, "Value", True),
        "output": (12, "Value", True),
        "sparse_initializer": (15, "Anything", True),
    },
    "Node": {"op_type": (4, "string", False), "attribute": (5, "Attribute", True), "domain": (7, "string", False)},
    "Attribute": {
        "t": (5, "Tensor", False),
        "g": (6, "Anything", False),
        "tensors": (10, "Anything", True),
        "graphs": (11, "Anything", True),
        "sparse_tensor": (22, "Anything", False),
        "sparse_tensors": (23, "Anything", True),
    },
    "Tensor": {
        "dims": (1, "int64", True),
        "data_type": (2, "int32", False),
        "name": (8, "string", False),
        "external_data": (13, "Entry", True),
        "data_location": (14, "int32", False),
    },
    "Entry": {"key": (1, "string", False), "value": (2, "string", False)},
    "Value": {"name": (1, "string", False), "type": (2, "Type", False)},
    "Type": {"tensor_type": (1, "TensorType", False)},
    "TensorType": {"elem_type": (1, "int32", False), "shape": (2, "Shape", False)},
    "Shape": {"dim": (1, "Dim", True)},
    "Dim": {"dim_value": (1, "int64", False), "dim_param": (2, "string", False)},
    "Anything": {},
}


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """The bytes of a graph, and those of the one file that its weights may come from, named `weights_name`."""

    path: Path
    model: bytes
    weights_name: str
    weights: mmap | bytes

    @classmethod
    def of_bundle(cls, bundle: Bundle, graph: Graph) -> "OnnxFile":
        """A graph of a bundle, checked; raises BundleError, PortMismatch."""
        held = bundle.graph(graph.name)
        file = cls(held.path, held.read(), weights_file(held.path).name, bundle.weights(graph.name))
        batch, rows = bundle.manifest.batch, 2 if bundle.manifest.spec.guidance else 1
        file.check(graph, {"B": batch.max, "R": rows * batch.max} if batch.fixed and graph.name in GRAPHS else {})
        return file

    @classmethod
    def of_path(cls, path: Path) -> "OnnxFile":
        """A graph of this machine's own making, with its weights beside it; raises OSError."""
        weights = weights_file(path)
        return cls(path, path.read_bytes(), weights.name, weights.read_bytes() if weights.is_file() else b"")

    def session(self, module: Any, options: Any, providers: list[Any]) -> Any:
        """An InferenceSession of the onnxruntime `module`; what it needs of the weights it copies."""
        if len(self.weights):
            content = np.frombuffer(self.weights, np.uint8)
            options.add_external_initializers_from_files_in_memory([self.weights_name], [content], [len(content)])
        return module.InferenceSession(self.model, options, providers=providers)

    def check(self, graph: Graph, sizes: Mapping[str, int]) -> None:
        """Raise BundleError for operators or weights from elsewhere, PortMismatch for other ports than `graph`'s.

        `sizes` gives the symbols that the file has as numbers.
        """
        found = self._parsed().graph
        self._check_operators(found.node)
        for tensor in self._tensors(found):
            self._check_tensor(tensor)
        self._check_ports(graph, {"input": found.input, "output": found.output}, sizes)

    def _parsed(self) -> Any:
        from google.protobuf.message import DecodeError

        try:
            model = _message("Model").FromString(self.model)
        except DecodeError as error:
            raise BundleError(f"{self.path} is no ONNX file; build the bundle again") from error
        if len(model.functions) or len(model.graph.sparse_initializer):
            raise self._refused("functions or sparse weights")
        return model

    def _check_operators(self, nodes: Iterable[Any]) -> None:
        for node in nodes:
            if not is_listed(node.domain, node.op_type):
                raise self._refused(f"operator {shown(f'{node.domain} {node.op_type}'.strip(), 60)}")
            for attribute in node.attribute:
                given = {field.name for field, _ in attribute.ListFields()}
                if given & {"g", "graphs", "tensors", "sparse_tensor", "sparse_tensors"}:
                    raise self._refused(f"a graph or tensors inside of {node.op_type}")

    def _tensors(self, graph: Any) -> Iterator[Any]:
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t

    def _check_tensor(self, tensor: Any) -> None:
        """A tensor lies in the graph, or in the graph's own file of weights and nowhere else."""
        if tensor.data_location != EXTERNAL and not tensor.external_data:
            return
        facts = {entry.key: entry.value for entry in tensor.external_data}
        name, wanted = shown(tensor.name, 60), STORED_BYTES.get(ELEMENT_TYPES.get(tensor.data_type, ""), 0)
        for side in tensor.dims:
            wanted *= side if 0 <= side < 1 << 40 else 0
        try:
            offset, length = (int(facts.get(key, "0")[:20]) for key in ("offset", "length"))
        except ValueError:
            offset, length = -1, 0
        if facts.get("location") != self.weights_name:
            raise self._refused(f"{name} in {shown(facts.get('location', 'no file'), 60)}, not in {self.weights_name}")
        if not (offset >= 0 and 0 < length == wanted and offset + length <= len(self.weights)):
            raise self._refused(f"{name} outside of {self.weights_name}")

    def _check_ports(self, graph: Graph, sides: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        ports = {"input": graph.inputs, "output": graph.outputs}
        for side, values in sides.items():
            got = {value.name: _border(value) for value in values}
            for port in ports[side]:
                dims = tuple(sizes.get(dim, "") if isinstance(dim, str) else dim for dim in port.shape)
                if got.pop(port.name, None) != (port.dtype, dims):
                    raise self._mismatch(graph, side, port.name, f"{port.dtype} {port.shape}")
            for name in got:
                raise self._mismatch(graph, side, name, "no such port")

    def _mismatch(self, graph: Graph, side: str, name: str, expected: str) -> PortMismatch:
        return PortMismatch(
            f"{graph.name}: {side} {shown(name, 60)!r} of {self.path.name} is not what the manifest says: {expected}; "
            "build the bundle again"
        )

    def _refused(self, what: str) -> BundleError:
        return BundleError(f"{self.path} has {what}, which ilf-trt does not write; do not use this bundle")


def _border(value: Any) -> tuple[str, tuple[int | str, ...]]:
    """dtype and shape of a graph's input or output; a symbol is an empty string."""
    tensor = value.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else "" for dim in tensor.shape.dim)
    return ELEMENT_TYPES.get(tensor.elem_type, "another type"), tuple(dims)


@cache
def _message(name: str) -> Any:
    """The protobuf class of a message of SCHEMA."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="ilf_trt/onnx_border.proto", package="ilf_trt", syntax="proto2")
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for field, (number, kind, repeated) in fields.items():
            one = described.field.add(name=field, number=number)
            one.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in SCHEMA:
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".ilf_trt.{kind}"
            else:
                one.type = {"string": kinds.TYPE_STRING, "int32": kinds.TYPE_INT32, "int64": kinds.TYPE_INT64}[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ilf_trt.{name}"))
