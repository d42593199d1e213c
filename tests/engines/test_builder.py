"""One engine out of one graph, by the real TensorRT-RTX in its own process; it needs no GPU to build."""

import re
from pathlib import Path

import pytest

from ilf_trt.engines.builder import BuildRequest
from ilf_trt.errors import EngineError
from tests.engines.conftest import PRODUCT, VARYING, ProgressRecord, build_graph, graph_request

HELD_MIB = 512  # a worker for a small graph needs half of it
ONNX_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}
FP8_PRODUCT = """
g (float16[64,64] x, float8e4m3fn[64,64] w) => (float16[64,64] y)
<float16 scale = {1}, float8e4m3fn zero = {0}> {
    q = QuantizeLinear(x, scale, zero)
    a = DequantizeLinear(q, scale, zero)
    b = DequantizeLinear(w, scale, zero)
    [product] y = MatMul(a, b)
}
"""
# The scale is given by its bits: 2^-7.
FP8_ATTENTION = """
g (float16[8,64,16] x, float16[8,16,64] y, float16[8,64,16] z) => (float16[8,64,16] mixed)
<float16 scale = {8192}, float8e4m3fn zero = {0}> {
    xq = QuantizeLinear(x, scale, zero)
    xd = DequantizeLinear(xq, scale, zero)
    yq = QuantizeLinear(y, scale, zero)
    yd = DequantizeLinear(yq, scale, zero)
    ["a.scores"] s = MatMul(xd, yd)
    ["a.softmax"] p = Softmax<axis = -1>(s)
    pq = QuantizeLinear(p, scale, zero)
    pd = DequantizeLinear(pq, scale, zero)
    zq = QuantizeLinear(z, scale, zero)
    zd = DequantizeLinear(zq, scale, zero)
    ["a.mixed"] mixed = MatMul(pd, zd)
}
"""


def product(kind: str = "float") -> str:
    return PRODUCT.format(kind=kind)


def refused(folder: Path, text: str, **changes: object) -> str:
    """The message of a build that fails, which is one line and leaves no engine."""
    with pytest.raises(EngineError) as caught:
        build_graph(folder, text, **changes)
    assert "\n" not in str(caught.value)
    assert not (folder / "graph.engine").exists()
    return str(caught.value)


# --- what a build makes


def test_the_report_is_of_the_engine_that_was_written(tmp_path: Path) -> None:
    report = build_graph(tmp_path, product(), profile=VARYING)
    assert report.engine_bytes == (tmp_path / "graph.engine").stat().st_size
    assert report.network_layers == {"MATRIX_MULTIPLY": 1}
    assert [(kernel.kind, kernel.layers) for kernel in report.kernels] == [("matmul", ("product",))]
    assert report.scratch_bytes > 0
    assert report.build_s > 0


@pytest.mark.parametrize(("kind", "precision"), ONNX_TYPES.items())
def test_a_product_runs_in_the_type_of_its_graph(kind: str, precision: str, tmp_path: Path) -> None:
    report = build_graph(tmp_path, product(kind), profile=VARYING, precision=precision)
    assert report.by_kind == {("matmul", precision): 1}
    assert report.outside == ()


def test_a_product_between_fp8_operands_runs_in_fp8(tmp_path: Path) -> None:
    report = build_graph(tmp_path, FP8_PRODUCT, precision="fp8", expected=("product",))
    assert report.by_kind["matmul", "fp8"] == 1
    assert report.outside == ()


@pytest.mark.parametrize("gpu", ["sm89", "sm120"])
def test_an_attention_between_fp8_operands_is_one_kernel_in_fp8(gpu: str, tmp_path: Path) -> None:
    products = ("a.scores", "a.mixed")
    report = build_graph(tmp_path, FP8_ATTENTION, precision="fp8", expected=products, gpus=(gpu,))
    (attention,) = (kernel for kernel in report.kernels if kernel.kind == "attention")
    assert attention.precision == "fp8"
    assert set(products) <= set(attention.layers)
    assert report.outside == ()


def test_fp32_does_not_mean_tf32(tmp_path: Path) -> None:
    build_graph(tmp_path, product(), profile=VARYING)
    assert re.findall(rb"\n  tf32=(\d)\n", (tmp_path / "graph.engine").read_bytes()) == [b"0"]


def test_an_engine_is_for_all_the_architectures_that_were_asked_for(tmp_path: Path) -> None:
    build_graph(tmp_path, product(), profile=VARYING, gpus=("sm86", "sm89", "sm120"))
    assert b"accelerators={sm86 sm89 sm120 }" in (tmp_path / "graph.engine").read_bytes()


def test_one_kernel_for_two_architectures_is_listed_once(tmp_path: Path) -> None:
    assert len(build_graph(tmp_path, product(), profile=VARYING, gpus=("sm89", "sm120")).kernels) == 1


def test_a_graph_of_fixed_shapes_needs_no_profile(tmp_path: Path) -> None:
    assert build_graph(tmp_path, product().replace("N", "4"), profile={}).by_kind == {("matmul", "fp32"): 1}


@pytest.mark.parametrize("level", [0, 5])
def test_every_builder_level_is_taken(level: int, tmp_path: Path) -> None:
    assert build_graph(tmp_path, product(), profile=VARYING, builder_level=level).kernels


def test_a_timing_cache_that_is_damaged_is_written_again(tmp_path: Path) -> None:
    cache = tmp_path / "timings.cache"
    build_graph(tmp_path, product(), profile=VARYING, timing_cache=str(cache))
    whole = cache.read_bytes()
    assert whole
    for damaged in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        cache.write_bytes(damaged)
        build_graph(tmp_path, product(), profile=VARYING, timing_cache=str(cache))
        assert cache.read_bytes() == whole


def test_progress_is_told_to_its_end(tmp_path: Path) -> None:
    progress = ProgressRecord()
    build_graph(tmp_path, product(), progress, profile=VARYING)
    assert all(0 <= done <= total for _, done, total, _ in progress.calls)
    last = {phase: (done, total) for phase, done, total, _ in progress.calls}
    assert all(done == total for done, total in last.values())
    assert len(last) > 1


def test_the_peak_of_memory_is_the_builders_own(tmp_path: Path) -> None:
    held = b"x" * (HELD_MIB << 20)
    report = build_graph(tmp_path, product(), profile=VARYING)
    assert 0 < report.builder_peak_mib < HELD_MIB
    del held


# --- what a build refuses


@pytest.mark.parametrize("operator", ["Det", "made.up.Blur"])
def test_a_node_that_is_refused_is_named_with_its_operator(operator: str, tmp_path: Path) -> None:
    message = refused(tmp_path, f"g (float[2,4,4] x) => (float[2] y) {{ [odd_one] y = {operator}(x) }}")
    assert message.startswith("graph: tensorrt-rtx refuses a node: ")
    assert "odd_one" in message
    assert f"operator: {operator.rpartition('.')[2]}" in message


def test_operands_of_two_types_are_refused_by_the_name_of_the_node(tmp_path: Path) -> None:
    text = "g (float[4,4] x, float16[4,4] w) => (float[4,4] y) { [mixed] y = MatMul(x, w) }"
    assert "mixed" in refused(tmp_path, text)


def test_a_graph_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert "Failed to parse" in refused(tmp_path, product(), onnx=str(tmp_path / "junk.onnx"))


def test_fp8_for_a_gpu_without_it_is_refused_by_the_gpus_name(tmp_path: Path) -> None:
    assert "sm80" in refused(tmp_path, FP8_PRODUCT, gpus=("sm80",))


def test_a_workspace_that_is_too_small_is_called_so(tmp_path: Path) -> None:
    message = refused(tmp_path, product("float16"), profile=VARYING, workspace_bytes=1)
    assert "could not build the engine" in message
    assert "workspace" in message


def test_a_shape_of_an_input_that_the_graph_has_not_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, product(), profile={**VARYING, "other": VARYING["x"]})
    assert "other" in message


def test_a_request_comes_back_from_json_unchanged(tmp_path: Path) -> None:
    request = graph_request(tmp_path, product(), profile=VARYING, expected=("a", "b"), gpus=("sm89", "sm120"))
    assert BuildRequest.from_json(request.as_json()) == request
