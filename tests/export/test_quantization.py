"""FP8 in a graph: the pattern around a Linear on graphs of a few lines, then whole builds of small models."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxscript import ir

from ilf_trt import load_ilf, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.errors import InvalidRequest
from ilf_trt.export.calibration import calibration_of_bundle
from ilf_trt.export.quantization import E4M3_MAX, SMALLEST_SCALE, quantize_linears
from tests.conftest import TEXT_TOKENS, small_dit, small_pixart, train_again, write_checkpoint

Array = NDArray[Any]

# to_q and to_k share an input, to_out has its own, and `skip` is a product that no one asks to quantise.
TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
attention (DTYPE[N,16] x) => (DTYPE[N,8] mixed, DTYPE[N,8] skipped)
{
    [to_q] query = MatMul (x, q)
    [to_k] key = MatMul (x, k)
    product = Mul (query, key)
    [to_out] mixed = MatMul (product, o)
    [skip] skipped = MatMul (x, s)
}
"""
AMAX = {"to_q": 4.0, "to_k": 4.0, "to_out": 60.0}
ROWS = 5
# E4M3 keeps 3 bits after the point: half a step of 2^-3.
E4M3_ROUNDING = 2.0**-4
# Its smallest normal number is 2^-6, its step below that 2^-9: of a tensor scaled to 448, half a step at most.
E4M3_FLOOR = 2.0**-10 / E4M3_MAX
# Sums of 16 products in another order: a few units of the last place, of float32 or float16.
SUM_ROUNDING = {"float": 1e-5, "float16": 5e-3}
NUMPY = {"float": np.float32, "float16": np.float16}
DTYPES = tuple(NUMPY)


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": (16, 8), "k": (16, 8), "o": (8, 8), "s": (16, 8)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def x() -> Array:
    """Inputs whose largest magnitude is the amax of `to_q`."""
    values = np.random.default_rng(1).standard_normal((ROWS, 16), np.float32)
    return values * np.float32(AMAX["to_q"] / np.abs(values).max())


def graph_of(text: str, dtype: str, **arrays: Array) -> Any:
    proto = onnx.parser.parse_model(text.replace("DTYPE", dtype))
    proto.graph.initializer.extend(numpy_helper.from_array(a.astype(NUMPY[dtype]), name) for name, a in arrays.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def attention(dtype: str = "float", **changes: Array) -> Any:
    return graph_of(TEXT, dtype, **{**weights(), **changes})


def run(model: Any, **inputs: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, inputs)
    return outputs


def nodes(model: Any) -> dict[str, Any]:
    return {node.name: node for node in model.graph}


def scales(model: Any) -> dict[str, float]:
    return {
        name: float(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name.endswith("_scale")
    }


def restored(values: Array, amax: float, dtype: str) -> Array:
    """What E4M3 keeps of `values`, by ml_dtypes alone."""
    scale = np.float32(np.asarray(amax / E4M3_MAX, NUMPY[dtype]))
    stored = np.clip(values.astype(np.float32) / scale, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return stored.astype(np.float32) * scale


# --- the pattern


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_named_product_is_quantised_and_the_graph_is_valid(dtype: str) -> None:
    model = attention(dtype)
    assert quantize_linears(model, AMAX) == 3
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert all(np.isfinite(output).all() for output in run(model, x=x().astype(NUMPY[dtype])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_product_is_of_what_e4m3_keeps_of_inputs_and_weights(dtype: str) -> None:
    model = attention(dtype)
    quantize_linears(model, {"skip": AMAX["to_q"]})
    given, weight = x().astype(NUMPY[dtype]), weights()["s"].astype(NUMPY[dtype])
    _, got = run(model, x=given)
    wanted = restored(given, AMAX["to_q"], dtype) @ restored(weight, float(np.abs(weight).max()), dtype)
    assert np.abs(got - wanted).max() <= SUM_ROUNDING[dtype] * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_product_differs_from_the_exact_one_by_the_rounding_of_e4m3(dtype: str) -> None:
    model = attention(dtype)
    quantize_linears(model, {"skip": AMAX["to_q"]})
    given, weight = x().astype(NUMPY[dtype]), weights()["s"].astype(NUMPY[dtype])
    _, got = run(model, x=given)
    a, b = np.abs(given.astype(np.float32)), np.abs(weight.astype(np.float32))
    floor_a, floor_b = E4M3_FLOOR * a.max(), E4M3_FLOOR * b.max()
    error_a, error_b = E4M3_ROUNDING * a + floor_a, E4M3_ROUNDING * b + floor_b
    allowed = error_a @ b + a @ error_b + error_a @ error_b + SUM_ROUNDING[dtype] * (a @ b)
    exact = given.astype(np.float32) @ weight.astype(np.float32)
    assert (np.abs(got - exact) <= allowed).all()
    assert np.abs(got - exact).max() > SUM_ROUNDING[dtype] * np.abs(exact).max()


def test_a_weight_reaches_its_product_through_dequantize_alone() -> None:
    model = attention()
    quantize_linears(model, AMAX)
    for name in AMAX:
        restore = nodes(model)[name].inputs[1].producer()
        assert restore.op_type == "DequantizeLinear"
        stored, scale, zero = restore.inputs
        assert all(value.is_initializer() for value in (stored, scale, zero))
        assert (stored.dtype, zero.dtype) == (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN)


def test_the_float_weight_is_gone_and_one_byte_a_value_stands_for_it() -> None:
    model = attention()
    quantize_linears(model, AMAX)
    assert {"q", "k", "o"} & model.graph.initializers.keys() == set()
    stored = {n: v.const_value.nbytes for n, v in model.graph.initializers.items() if n.endswith(".weight_fp8")}
    assert stored == {"to_q.weight_fp8": 128, "to_k.weight_fp8": 128, "to_out.weight_fp8": 64}


def test_a_weight_that_another_node_uses_stays_beside_its_copy() -> None:
    text = TEXT.replace("(x, s)", "(x, q)")
    model = graph_of(text, "float", **{name: array for name, array in weights().items() if name != "s"})
    assert quantize_linears(model, AMAX) == 3
    assert nodes(model)["skip"].inputs[1] is model.graph.initializers["q"]


def test_linears_that_share_an_input_share_one_pair() -> None:
    model = attention()
    quantize_linears(model, AMAX)
    made = nodes(model)
    assert made["to_q"].inputs[0] is made["to_k"].inputs[0]
    assert made["to_q"].inputs[0] is not made["to_out"].inputs[0]
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 2


def test_linears_of_one_input_with_different_scales_have_a_pair_each() -> None:
    model = attention()
    assert quantize_linears(model, {**AMAX, "to_k": 8.0}) == 3
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 3
    assert scales(model)["to_k.input_scale"] == 2 * scales(model)["to_q.input_scale"]


def test_a_name_that_is_not_in_amax_is_left_as_it_is() -> None:
    model = attention()
    assert quantize_linears(model, {"to_out": 60.0, "elsewhere": 1.0}) == 1
    made = nodes(model)
    assert [made[name].inputs[0].name for name in ("to_q", "to_k", "skip")] == ["x"] * 3
    assert [made[name].inputs[1].name for name in ("to_q", "to_k", "skip")] == ["q", "k", "s"]


@pytest.mark.parametrize(
    "amax", [{}, {"elsewhere": 1.0}, {"product": 1.0}], ids=["none", "another graph", "no product"]
)
def test_a_graph_without_a_named_product_is_left_byte_for_byte(amax: dict[str, float]) -> None:
    model = attention()
    before = ir.to_proto(model).SerializeToString()
    assert quantize_linears(model, amax) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_a_product_of_two_computed_tensors_is_left_as_it_is() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    scores (float[N,16] x, float[16,N] y) => (float[N,N] z) { [to_q] z = MatMul (x, y) }
    """
    model = graph_of(text, "float")
    assert quantize_linears(model, {"to_q": 1.0}) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_the_largest_magnitudes_over_448_in_the_graphs_own_dtype(dtype: str) -> None:
    model = attention(dtype)
    quantize_linears(model, AMAX)
    largest = {name: np.abs(array.astype(NUMPY[dtype])).max() for name, array in weights().items()}
    wanted = {"to_q.input": 4.0, "to_out.input": 60.0}
    wanted |= {"to_q.weight": largest["q"], "to_k.weight": largest["k"], "to_out.weight": largest["o"]}
    kept = {name: float(NUMPY[dtype](float(value) / E4M3_MAX)) for name, value in wanted.items()}
    assert scales(model) == {f"{name}_scale": value for name, value in kept.items()}
    found = {v.dtype.numpy() for n, v in model.graph.initializers.items() if n.endswith("_scale")}
    assert found == {np.dtype(NUMPY[dtype])}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [0.0, 1e-30, 1e-7])
def test_a_tiny_magnitude_does_not_give_a_scale_of_zero(amax: float, dtype: str) -> None:
    model = attention(dtype, q=np.full((16, 8), amax))
    quantize_linears(model, {"to_q": amax, "to_k": 4.0})
    assert all(scale > 0 for scale in scales(model).values())
    for given in (np.zeros((ROWS, 16)), np.full((ROWS, 16), amax), x()):
        assert all(np.isfinite(output).all() for output in run(model, x=given.astype(NUMPY[dtype])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_input_past_the_calibrated_magnitude_saturates_at_it(sign: int, dtype: str) -> None:
    model = attention(dtype, s=np.eye(16, 8))
    quantize_linears(model, {"skip": 2.0})
    given = np.zeros((1, 16), NUMPY[dtype])
    given[0, :4] = np.array([1, 2, 3, 1000]) * sign
    _, got = run(model, x=given)
    scale = scales(model)
    largest = E4M3_MAX * scale["skip.input_scale"] * E4M3_MAX * scale["skip.weight_scale"]
    assert largest == pytest.approx(2.0, rel=SUM_ROUNDING[dtype])
    np.testing.assert_allclose(got[0, 1:4], sign * largest, rtol=SUM_ROUNDING[dtype])
    assert abs(got[0, 0]) == pytest.approx(1.0, rel=E4M3_ROUNDING + SUM_ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_weights_of_any_magnitude_are_numbers_and_as_near_as_e4m3_allows(dtype: str) -> None:
    shape = weights()["q"]
    for magnitude in np.geomspace(1e-3, 6e2, 57):
        weight = (shape * magnitude / np.abs(shape).max()).astype(NUMPY[dtype]).astype(np.float32)
        model = attention(dtype, q=weight)
        quantize_linears(model, {"to_q": 4.0})
        stored = model.graph.initializers["to_q.weight_fp8"].const_value.numpy().astype(np.float32)
        got = stored * np.float32(scales(model)["to_q.weight_scale"])
        floor = E4M3_FLOOR * np.abs(weight).max()
        assert (np.abs(got - weight) <= E4M3_ROUNDING * np.abs(weight) + floor * (1 + E4M3_ROUNDING)).all(), magnitude


def test_weights_whose_scale_is_rounded_down_saturate_at_it() -> None:
    # a scale of 1.4 times float16's smallest number is stored as that number: the largest weight is at 640 of 448
    weight = np.full((16, 8), 1.4 * SMALLEST_SCALE * E4M3_MAX)
    model = attention("float16", q=weight)
    quantize_linears(model, {"to_q": 4.0})
    assert scales(model)["to_q.weight_scale"] == SMALLEST_SCALE
    assert (model.graph.initializers["to_q.weight_fp8"].const_value.numpy().astype(np.float32) == E4M3_MAX).all()


# --- whole builds

BLOCKS = 3
LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT_LINEARS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
PIXART_BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")
EXCLUDED = ("transformer_blocks.0.*", "*.to_out.0")


@pytest.fixture(scope="module")
def dit_eight(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """FP8 with the first block and every output projection left out; a fixed batch is exported in half the time."""
    folder = tmp_path_factory.mktemp("eight")
    checkpoint = write_checkpoint(folder / "checkpoint", small_dit(num_layers=BLOCKS), (1, 1))
    options = BuildOptions(
        precision=Precision.FP8,
        batch=BatchRange(2, 2, 2),
        steps=4,
        feedback="outer:1",
        calibrator=Calibrator.OWN,
        fp8_exclude=EXCLUDED,
    )
    return build(str(checkpoint), folder / "eight.ilf", options)


@pytest.fixture(scope="module")
def dit_attention(dit_eight: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The same with attention in FP8."""
    options = BuildOptions(
        precision=Precision.FP8,
        batch=BatchRange(2, 2, 2),
        steps=4,
        feedback="outer:1",
        calibrator=Calibrator.OWN,
        fp8_exclude=EXCLUDED,
        fp8_attention=True,
    )
    output = tmp_path_factory.mktemp("eight_attention") / "eight.ilf"
    return build(str(dit_eight.bundle.path.parent / "checkpoint"), output, options)


@pytest.fixture(scope="module")
def pixart_eight(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> BuildResult:
    """FP8 of everything that can be, a dynamic batch, calibrated on a file of text."""
    folder = tmp_path_factory.mktemp("eight_text")
    checkpoint = write_checkpoint(folder / "checkpoint", small_pixart(sized=True, num_layers=2), (0, 0))
    options = BuildOptions(
        precision=Precision.FP8,
        batch=BatchRange(1, 2, 3),
        steps=3,
        feedback="outer:1",
        text_tokens=TEXT_TOKENS,
        calibrator=Calibrator.OWN,
        calibration=text_file,
    )
    return build(str(checkpoint), folder / "eight.ilf", options)


@pytest.fixture(params=["dit_eight", "dit_attention", "pixart_eight"])
def eight(request: pytest.FixtureRequest) -> BuildResult:
    built: BuildResult = request.getfixturevalue(request.param)
    return built


def onnx_graphs(bundle: Bundle) -> Iterator[tuple[str, onnx.GraphProto]]:
    for graph in bundle.manifest.graphs:
        yield graph.name, onnx.load(bundle.graph(graph.name).path).graph


def quantized_products(graph: onnx.GraphProto, *, of_weights: bool = False) -> set[str]:
    """Names of the products whose two inputs both come out of DequantizeLinear; `of_weights` leaves attention out."""
    made = {output: node.op_type for node in graph.node for output in node.output}
    return {
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm")
        and [made.get(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
        and not (of_weights and node.name.endswith((".scores", ".mixed")))
    }


def test_an_fp8_build_is_within_its_limit_and_coarser_than_fp16(eight: BuildResult) -> None:
    worst = max(row.relative for row in eight.differences)
    assert E4M3_ROUNDING**2 < worst <= Precision.FP8.parity_limit


def test_the_manifest_of_a_dit_names_every_linear_that_was_not_excluded(dit_eight: BuildResult) -> None:
    facts = dit_eight.bundle.manifest.fp8
    places = ("transformer_blocks.1", "transformer_blocks.2", "feedback")
    assert facts is not None
    assert (facts.calibrator, facts.pictures) == ("own", 10)
    assert set(facts.amax) == {f"{p}.{name}" for p in places for name in LINEARS if not name.endswith("to_out.0")}


def test_the_manifest_of_a_pixart_names_every_linear_of_its_blocks(pixart_eight: BuildResult) -> None:
    facts = pixart_eight.bundle.manifest.fp8
    places = ("transformer_blocks.0", "transformer_blocks.1", "feedback")
    assert facts is not None
    assert facts.pictures == 3
    assert set(facts.amax) == {f"{place}.{name}" for place in places for name in (*LINEARS, *TEXT_LINEARS)}


def test_just_the_linears_and_attentions_of_the_manifest_run_in_fp8(eight: BuildResult) -> None:
    facts = eight.bundle.manifest.fp8
    found = [name for _, graph in onnx_graphs(eight.bundle) for name in sorted(quantized_products(graph))]
    assert facts is not None
    assert sorted(found) == sorted(facts.products)


def test_by_default_attention_over_64_tokens_is_in_fp8_with_padded_heads_and_over_16_is_not(
    dit_eight: BuildResult, pixart_eight: BuildResult, dit_attention: BuildResult
) -> None:
    few, many, asked = (built.bundle.manifest.fp8 for built in (dit_eight, pixart_eight, dit_attention))
    assert few is not None
    assert many is not None
    assert asked is not None
    assert few.attentions == {}
    assert set(many.attentions) == {
        f"{place}.{name}" for place in (*PIXART_BLOCKS, "feedback") for name in ("attn1", "attn2")
    }
    assert set(asked.attentions) == {"transformer_blocks.1.attn1", "transformer_blocks.2.attn1", "feedback.attn1"}
    weights = {t.name: tuple(t.dims) for _, g in onnx_graphs(pixart_eight.bundle) for t in g.initializer}
    assert weights["transformer_blocks.0.attn1.to_q.weight_fp8"] == (72, 4 * 32)
    assert weights["transformer_blocks.0.attn2.to_out.0.weight_fp8"] == (4 * 32, 72)


def test_the_scales_of_attentions_stay_with_the_bundle_that_they_are_taken_from(
    dit_attention: BuildResult, dit_eight: BuildResult, tmp_path: Path
) -> None:
    model = load_ilf(dit_eight.bundle.path.parent / "checkpoint")
    spec = dit_attention.bundle.manifest.spec
    kept = calibration_of_bundle(dit_attention.bundle.path, model, spec, EXCLUDED, attention=True)
    assert kept == dit_attention.bundle.manifest.fp8
    without = calibration_of_bundle(dit_attention.bundle.path, model, spec, EXCLUDED, attention=False)
    assert without == replace(kept, attentions={})
    with pytest.raises(InvalidRequest, match="has no scales of attentions; pass --no-fp8-attention"):
        calibration_of_bundle(dit_eight.bundle.path, model, spec, EXCLUDED, attention=True)
    more = (*EXCLUDED, "*.2.attn1")
    with pytest.raises(InvalidRequest, match=r"has transformer_blocks\.2\.attn1 in FP8; calibrate again"):
        calibration_of_bundle(dit_attention.bundle.path, model, spec, more, attention=True)


def test_every_other_product_keeps_a_weight_of_two_bytes(eight: BuildResult) -> None:
    for name, graph in onnx_graphs(eight.bundle):
        dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
        eights = {tensor for tensor, dtype in dtypes.items() if dtype == onnx.TensorProto.FLOAT8E4M3FN}
        wanted = {f"{linear}.weight_fp8" for linear in quantized_products(graph, of_weights=True)}
        assert eights - {"fp8_zero"} == wanted, name


def test_embedders_norms_and_the_head_stay_out_of_fp8(eight: BuildResult) -> None:
    graphs = dict(onnx_graphs(eight.bundle))
    used = {name: {node.op_type for node in graph.node} for name, graph in graphs.items()}
    assert "QuantizeLinear" not in used["cond"]
    for graph in graphs.values():
        made = {output: node.op_type for node in graph.node for output in node.output}
        for node in graph.node:
            if node.op_type in ("LayerNormalization", "Conv", "Softmax"):
                assert "DequantizeLinear" not in [made.get(name) for name in node.input], node.name


def test_fp8_graphs_are_valid(eight: BuildResult) -> None:
    for graph in eight.bundle.manifest.graphs:
        onnx.checker.check_model(eight.bundle.graph(graph.name).path, full_check=True)


def test_a_feedback_block_trained_again_on_the_scales_of_the_old_bundle_changes_one_graph(
    dit_eight: BuildResult, tmp_path: Path
) -> None:
    model = load_ilf(dit_eight.bundle.path.parent / "checkpoint")
    train_again(model)
    save_ilf(model, tmp_path / "again")
    options = BuildOptions(
        precision=Precision.FP8,
        batch=BatchRange(2, 2, 2),
        steps=4,
        feedback="outer:1",
        calibration=dit_eight.bundle.path,
        fp8_exclude=EXCLUDED,
    )
    again = build(str(tmp_path / "again"), tmp_path / "again.ilf", options).bundle
    assert again.manifest.fp8 == dit_eight.bundle.manifest.fp8
    old, new = dit_eight.bundle.manifest.files, again.manifest.files
    changed = {Path(name).name.split(".")[0] for name in new if name.startswith("graphs/") and new[name] != old[name]}
    assert changed == {"loop_feedback"}


def test_the_scales_of_a_bundle_with_other_linears_are_refused(dit_eight: BuildResult, tmp_path: Path) -> None:
    options = BuildOptions(precision=Precision.FP8, calibration=dit_eight.bundle.path, verify=False)
    with pytest.raises(InvalidRequest, match="is for other Linears"):
        build(str(dit_eight.bundle.path.parent / "checkpoint"), tmp_path / "x.ilf", options)


def test_a_bundle_that_is_not_fp8_has_no_scales(dit_eight: BuildResult, dit_bundle: Path, tmp_path: Path) -> None:
    options = BuildOptions(precision=Precision.FP8, calibration=dit_bundle, verify=False)
    with pytest.raises(InvalidRequest, match="is no FP8 bundle"):
        build(str(dit_eight.bundle.path.parent / "checkpoint"), tmp_path / "x.ilf", options)


def test_tokens_between_fp8_graphs_are_in_float16(dit_eight: BuildResult) -> None:
    dtypes = {port.name: port.dtype for graph in dit_eight.bundle.manifest.graphs for port in graph.outputs}
    assert [dtypes[name] for name in ("hidden", "features", "feedback")] == ["float16"] * 3
