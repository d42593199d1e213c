"""bfloat16 restated in float32: beside torch on a graph of a few lines, then a whole build."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxscript import ir
from torch import Tensor

from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.rounding import emulate_bfloat16, write_rounded
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.verify import verify
from tests.conftest import small_dit, write_checkpoint

Array = NDArray[Any]

# An input, weights, a constant inside (by its bits), casts out of bfloat16 and back, an output that another node reads.
TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
small (bfloat16[N,16] x, float[8] shift) => (bfloat16[N,8] gated, float[N,8] wide, bfloat16[N,4] y)
{
    h = MatMul (x, first)
    half = Constant <value = bfloat16 {16026}> ()
    s = Sigmoid (h)
    t = Mul (s, half)
    gated = Mul (h, t)
    f = Cast <to = 1> (gated)
    wide = Add (f, shift)
    n = Cast <to = 16> (wide)
    y = MatMul (n, second)
}
"""
THIRD = 0.30078125  # of the bits 16026
# x, two weights, the constant, and five results: h, s, t, gated, n, y.
BFLOAT16_VALUES = 1 + 2 + 1 + 6
ROWS = 5
# 8 bits of a number: from one to the next it is 2^-7 at most, relative to it.
BFLOAT16_ULP = 2.0**-7
# Where two sums in another order fall on two sides of a step, they are one apart; a product later, two.
ULPS = 2


def arrays() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"x": (ROWS, 16), "shift": (8,), "first": (16, 8), "second": (8, 4)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def narrow(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def small(text: str = TEXT) -> Any:
    proto = onnx.parser.parse_model(text)
    for name in ("first", "second"):
        if f"{name})" in text:
            weight = arrays()[name].astype(np.float32 if "bfloat16" not in text else ml_dtypes.bfloat16)
            proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def in_torch(dtype: torch.dtype) -> dict[str, Array]:
    x, shift, first, second = (torch.from_numpy(arrays()[name]) for name in ("x", "shift", "first", "second"))
    h = x.to(dtype) @ first.to(dtype)
    gated = h * (h.sigmoid() * torch.tensor(THIRD, dtype=dtype))
    wide = gated.float() + shift
    made: dict[str, Tensor] = {"gated": gated, "wide": wide, "y": wide.to(dtype) @ second.to(dtype)}
    return {name: tensor.float().numpy() for name, tensor in made.items()}


def run(model: Any, **inputs: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: dict[str, Array] = dict(
        zip((o.name for o in session.get_outputs()), session.run(None, inputs), strict=True)
    )
    return outputs


def emulated() -> dict[str, Array]:
    model = small()
    emulate_bfloat16(model)
    return run(model, x=narrow(arrays()["x"]), shift=arrays()["shift"])


@pytest.mark.parametrize("name", ["gated", "wide", "y"])
def test_an_emulated_graph_gives_what_torch_gives_in_bfloat16(name: str) -> None:
    got, wanted = emulated()[name], in_torch(torch.bfloat16)[name]
    assert np.abs(got - wanted).max() <= ULPS * BFLOAT16_ULP * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["gated", "y"])
def test_an_emulated_graph_is_not_the_float32_one(name: str) -> None:
    got, bfloat16, float32 = emulated()[name], in_torch(torch.bfloat16)[name], in_torch(torch.float32)[name]
    assert np.abs(got - bfloat16).max() < np.abs(got - float32).max()


@pytest.mark.parametrize("name", ["gated", "y"])
def test_emulated_values_are_bfloat16_numbers(name: str) -> None:
    got = emulated()[name]
    np.testing.assert_array_equal(got, narrow(got))


def test_a_float32_value_keeps_all_its_digits() -> None:
    got = emulated()["wide"]
    assert (got != narrow(got)).any()


def test_every_bfloat16_value_is_counted_once() -> None:
    assert emulate_bfloat16(small()) == BFLOAT16_VALUES


def test_bfloat16_is_left_only_between_two_casts_and_no_one_else_reads_what_they_round() -> None:
    model = small()
    emulate_bfloat16(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    assert {value.dtype for value in values} == {ir.DataType.FLOAT}
    left = [output for node in graph for output in node.outputs if output.dtype == ir.DataType.BFLOAT16]
    assert left
    for value in left:
        narrowing = value.producer()
        assert narrowing.op_type == "Cast"
        assert [user.op_type for user in value.consumers()] == ["Cast"]
        assert [user.name for user in narrowing.inputs[0].consumers()] == [narrowing.name]


def test_an_emulated_graph_keeps_the_names_of_its_border() -> None:
    model = small()
    emulate_bfloat16(model)
    assert [value.name for value in model.graph.inputs] == ["x", "shift"]
    assert [value.name for value in model.graph.outputs] == ["gated", "wide", "y"]


def test_a_graph_without_bfloat16_is_left_byte_for_byte() -> None:
    model = small(TEXT.replace("bfloat16", "float").replace("to = 16", "to = 1"))
    before = ir.to_proto(model).SerializeToString()
    assert emulate_bfloat16(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


# --- a whole build

# What bfloat16 rounding makes of four sums of 64 products: 1e-3 to 1e-2, measured 8e-3.
VISIBLE = 1e-3
NARROW = BuildOptions(precision=Precision.BF16, batch=BatchRange(1, 2, 3), steps=3, feedback="outer:1")


@pytest.fixture(scope="module")
def narrow_build(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """BF16 of a DiT with constants of the feedback block; verified as every build is, its cache beside it."""
    folder = tmp_path_factory.mktemp("narrow")
    checkpoint = write_checkpoint(folder / "checkpoint", small_dit(num_layers=2), (0, 0))
    return build(str(checkpoint), folder / "narrow.ilf", replace(NARROW, cache=folder / "cache"))


@pytest.fixture(scope="module")
def rounded(narrow_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("rounded") / "rounded.ilf"
    return Bundle.open(write_rounded(narrow_build.bundle.path, folder, narrow_build.bundle.manifest))


def test_a_bf16_build_is_verified_within_its_limit(narrow_build: BuildResult) -> None:
    worst = max(row.relative for row in narrow_build.differences)
    assert VISIBLE < worst <= Precision.BF16.parity_limit


def test_a_bf16_build_is_verified_on_graphs_out_of_the_cache_too(narrow_build: BuildResult, tmp_path: Path) -> None:
    folder = narrow_build.bundle.path.parent
    again = build(str(folder / "checkpoint"), tmp_path / "again.ilf", replace(NARROW, cache=folder / "cache"))
    assert narrow_build.reused == ()
    assert again.reused == tuple(f"graph {name}" for name in GRAPHS)
    assert again.differences == narrow_build.differences
    assert Bundle.open(tmp_path / "again.ilf").manifest.files == narrow_build.bundle.manifest.files


def test_a_bf16_build_holds_bfloat16_weights_and_says_so_at_its_borders(narrow_build: BuildResult) -> None:
    bundle = narrow_build.bundle
    dtypes = {port.name: port.dtype for graph in bundle.manifest.graphs for port in graph.outputs}
    assert [dtypes[name] for name in ("hidden", "features", "feedback")] == ["bfloat16"] * 3
    for graph in bundle.manifest.graphs:
        model = onnx.load(bundle.graph(graph.name).path)
        elements = {port.name: port.type.tensor_type.elem_type for port in (*model.graph.input, *model.graph.output)}
        assert {name for name, kind in elements.items() if kind == onnx.TensorProto.BFLOAT16} == {
            port.name for port in (*graph.inputs, *graph.outputs) if port.dtype == "bfloat16"
        }
        assert onnx.TensorProto.BFLOAT16 in {weight.data_type for weight in model.graph.initializer}, graph.name


def test_constants_of_a_bf16_build_are_in_float32(narrow_build: BuildResult) -> None:
    constants = narrow_build.bundle.constants()
    assert constants
    assert {str(array.dtype) for array in constants.values()} == {"float32"}


def test_a_rounded_bundle_is_in_float32_from_end_to_end(rounded: Bundle) -> None:
    manifest = rounded.manifest
    assert manifest.precision is Precision.FP32
    ports = [port for graph in manifest.graphs for port in (*graph.inputs, *graph.outputs)]
    assert "bfloat16" not in {port.dtype for port in ports}


def test_a_rounded_bundle_is_what_the_build_verified(rounded: Bundle, narrow_build: BuildResult) -> None:
    differences, _ = verify(rounded.path)
    assert differences == narrow_build.differences


def test_a_rounded_bundle_gives_tokens_that_are_bfloat16_numbers(rounded: Bundle) -> None:
    rng = np.random.default_rng(3)
    with Pipeline.load(rounded.path, threads=1) as pipeline:
        border = next(graph for graph in pipeline.manifest.graphs if graph.name == "loop_body")
        inputs = {port.name: narrow(rng.standard_normal(port.resolve({"R": 2}), np.float32)) for port in border.inputs}
        features = pipeline.run("loop_body", inputs)["features"]
    assert features.any()
    np.testing.assert_array_equal(features, narrow(features))


def test_a_bf16_bundle_is_refused_on_a_cpu_with_a_way_out(narrow_build: BuildResult) -> None:
    path: Path = narrow_build.bundle.path
    with pytest.raises(
        InvalidRequest, match=r"is in bf16, which ONNX Runtime does not run on a CPU; .*--precision fp16"
    ):
        Pipeline.load(path)
