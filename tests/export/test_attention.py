"""Attentions in exported graphs beside the graph before: the scale in a weight, zeros in heads, pairs of FP8."""

from collections.abc import Callable
from copy import copy
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnxscript import ir

from ilf_trt import attach
from ilf_trt.contract.manifest import AttentionAmax
from ilf_trt.contract.ports import Graph
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.export.attention import _factor, attentions, fold_attention_scales, name_attentions, pad_heads
from ilf_trt.export.graph import trace_segment
from ilf_trt.export.passes import name_linears
from ilf_trt.export.quantization import quantize_attentions
from ilf_trt.export.segments import segments_of, spec_of
from tests.conftest import TEXT_TOKENS, small_dit, small_pixart

Array = NDArray[Any]

LAYERS, LOOP = 2, (1, 1)
BATCHES = {"fixed": BatchRange(1, 1, 1), "dynamic": BatchRange(1, 2, 3)}
# The same sums over operands that were scaled before instead of after a product: a few units of float32's last place.
FLOAT32_ROUNDING = 2e-5
# Weights in float16 keep 11 bits.
FLOAT16_ROUNDING = 2e-3
# Three bits after the point in each of four operands, and their sums.
E4M3_ROUNDING = 1e-1
SMALL = {"num_layers": LAYERS}
# A head of 8 in a DiT, one of 18 in a PixArt: neither is a multiple of 16.
MODELS: dict[str, Callable[[], Any]] = {
    "dit": lambda: small_dit(**SMALL, num_attention_heads=8, attention_head_dim=8),
    "pixart": lambda: small_pixart(sized=False, **SMALL),
    "hoisted": lambda: small_pixart(sized=False, **SMALL),
}
PADDED = {"dit": 16, "pixart": 32}
OF_BLOCK = {"dit": ["attn1"], "pixart": ["attn1", "attn2"], "hoisted": ["attn1", "attn2"]}
Traced = tuple[Graph, onnx.ModelProto]


def traced(kind: str, name: str, batch: str, precision: Precision = Precision.FP32) -> Traced:
    """A graph as the exporter writes it, with names."""
    model = attach(MODELS[kind](), LOOP).to(getattr(torch, precision.dtype))
    spec = spec_of(
        model,
        guidance=True,
        text_tokens=TEXT_TOKENS,
        train_timesteps=1000,
        precision=precision,
        hoist_text=kind == "hoisted",
    )
    segment = segments_of(model, spec, precision)[name]
    program = trace_segment(segment, BATCHES[batch])
    name_linears(program.model, segment.name_in_model)
    name_attentions(program.model)
    return segment.graph, ir.to_proto(program.model)


@pytest.fixture(scope="module")
def cache() -> dict[tuple[Any, ...], Traced]:
    return {}


@pytest.fixture
def trace(cache: dict[tuple[Any, ...], Traced]) -> Callable[..., Traced]:
    def get(*case: Any) -> Traced:
        if case not in cache:
            cache[case] = traced(*case)
        return cache[case]

    return get


def model_of(proto: onnx.ModelProto) -> Any:
    return ir.from_proto(copy(proto))


def outputs(model: Any, graph: Graph) -> list[Array]:
    """Of every input random, for three rows of a batch or as many as are fixed."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    feeds = {}
    for port, given in zip(graph.inputs, session.get_inputs(), strict=True):
        shape = [dim if isinstance(dim, int) else 4 for dim in given.shape]
        feeds[port.name] = rng.standard_normal(shape, np.float32).astype(port.dtype)
    found: list[Array] = session.run(None, feeds)
    return found


def difference(got: list[Array], wanted: list[Array]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True))


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


CASES = [
    (kind, graph, batch)
    for kind in MODELS
    for graph, batch in (("loop_body", "dynamic"), ("loop_body", "fixed"), ("loop_feedback", "dynamic"))
]


# --- the scale


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_folded_graph_equals_the_graph_before_and_multiplies_no_query_or_key(
    case: tuple[str, str, str], trace: Callable[..., Traced]
) -> None:
    graph, proto = trace(*case)
    before, folded = model_of(proto), model_of(proto)
    count = len(OF_BLOCK[case[0]])
    assert fold_attention_scales(folded) == count
    assert operators(before).count("Mul") - operators(folded).count("Mul") == 2 * count
    assert difference(outputs(folded, graph), outputs(before, graph)) <= FLOAT32_ROUNDING
    assert fold_attention_scales(folded) == 0


def test_a_graph_in_float16_is_folded_within_float16(trace: Callable[..., Traced]) -> None:
    graph, proto = trace("pixart", "loop_body", "fixed", Precision.FP16)
    folded = model_of(proto)
    assert fold_attention_scales(folded) == 2
    assert difference(outputs(folded, graph), outputs(model_of(proto), graph)) <= FLOAT16_ROUNDING


def test_weight_and_bias_of_the_query_alone_change_and_by_one_over_the_root_of_the_head(
    trace: Callable[..., Traced],
) -> None:
    _, proto = trace("pixart", "loop_body", "fixed")
    before, folded = model_of(proto), model_of(proto)
    fold_attention_scales(folded)
    old, new = ({n: v.const_value.numpy() for n, v in m.graph.initializers.items()} for m in (before, folded))
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert {name.split(".", 2)[2].removesuffix(".weight").removesuffix(".bias") for name in changed} == {
        "attn1.to_q",
        "attn2.to_q",
    }
    for name in changed:
        np.testing.assert_allclose(new[name], old[name] / np.sqrt(18), rtol=1e-6)


def test_cond_has_no_attention_and_stays_as_it_is(trace: Callable[..., Traced]) -> None:
    _, proto = trace("hoisted", "cond", "fixed")
    model = model_of(proto)
    before = ir.to_proto(model).SerializeToString()
    assert fold_attention_scales(model) == 0
    assert quantize_attentions(model, {"transformer_blocks.1.attn2": AttentionAmax(1.0, 1.0, 1.0)}) == 0
    assert ir.to_proto(model).SerializeToString() == before


TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[2,6] x, float[2,6] key) => (float[2,6] y, float[2,6] z)
<float[1] root = {0.5}, int64[2] flat = {2, 6}>
{
    ["a.to_q"] product = MatMul (x, w)
    query = Reshape (product, flat)
    small_query = Mul (query, root)
    turned = Transpose <perm=[1, 0]> (key)
    small_key = Mul (turned, root)
    [one] scores = MatMul (small_query, small_key)
    [two] weights = Softmax <axis=-1> (scores)
    [three] y = MatMul (weights, key)
    z = LAST
}
"""


def by_hand(last: str) -> Any:
    proto = onnx.parser.parse_model(TEXT.replace("LAST", last))
    weight = np.random.default_rng(0).standard_normal((6, 6), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run_by_hand(model: Any) -> list[Array]:
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((2, 6), np.float32) for name in ("x", "key")}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("seen", ["product", "query", "small_query"])
def test_a_query_that_another_node_sees_keeps_its_scale(seen: str) -> None:
    model = by_hand(f"Relu ({seen})")
    before = run_by_hand(model)
    assert fold_attention_scales(model) == 0
    assert difference(run_by_hand(model), before) == 0


def test_a_weight_that_another_product_uses_is_copied_before_it_is_scaled() -> None:
    model = by_hand("MatMul (x, w)")
    before = run_by_hand(model)
    assert fold_attention_scales(model) == 1
    assert difference(run_by_hand(model), before) <= FLOAT32_ROUNDING
    assert operators(model).count("Mul") == 0


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("size", [18, 64, 72, 80, 128])
def test_the_folded_scale_is_that_of_the_attention_whatever_its_roots_were_rounded_to(size: int, dtype: Any) -> None:
    root = float(np.sqrt(dtype(size**-0.5).astype(np.float32)).astype(dtype))
    assert _factor([root, root], (2, 4, 256, size)) == size**-0.5
    assert _factor([root, root], None) == root * root
    assert _factor([0.3, 0.5], (2, 4, 256, size)) == 0.15


def test_an_attention_that_keeps_its_scale_is_not_quantised() -> None:
    model = by_hand("Relu (query)")
    name_attentions(model)
    assert quantize_attentions(model, {"a": AttentionAmax(1.0, 1.0, 1.0)}) == 0


# --- zeros in the heads


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in PADDED], ids="-".join)
def test_padded_heads_change_no_result_and_add_no_node(
    case: tuple[str, str, str], trace: Callable[..., Traced]
) -> None:
    graph, proto = trace(*case)
    folded, padded = model_of(proto), model_of(proto)
    for model in (folded, padded):
        fold_attention_scales(model)
    names = [attention.name for attention in attentions(padded.graph)]
    assert pad_heads(padded, names) == len(OF_BLOCK[case[0]])
    assert difference(outputs(padded, graph), outputs(folded, graph)) <= FLOAT32_ROUNDING
    assert operators(padded) == operators(folded)
    for attention in attentions(padded.graph):
        assert attention.scores.inputs[0].shape[-1] == PADDED[case[0]]
        assert attention.mixed.inputs[1].shape[-1] == PADDED[case[0]]
    assert pad_heads(padded, names) == 0


def test_only_named_attentions_are_padded(trace: Callable[..., Traced]) -> None:
    _, proto = trace("pixart", "loop_body", "fixed")
    model = model_of(proto)
    fold_attention_scales(model)
    assert pad_heads(model, ["transformer_blocks.1.attn1"]) == 1
    sizes = [attention.scores.inputs[0].shape[-1] for attention in attentions(model.graph)]
    assert sizes == [32, 18]


def test_keys_that_come_in_through_a_port_are_not_padded(trace: Callable[..., Traced]) -> None:
    _, proto = trace("hoisted", "loop_body", "fixed")
    model = model_of(proto)
    fold_attention_scales(model)
    assert pad_heads(model, ["transformer_blocks.1.attn2"]) == 0


# --- FP8


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_fp8_attention_has_a_pair_on_every_operand_and_is_within_its_rounding(
    case: tuple[str, str, str], trace: Callable[..., Traced]
) -> None:
    graph, proto = trace(*case)
    folded, eight = model_of(proto), model_of(proto)
    for model in (folded, eight):
        fold_attention_scales(model)
    named = {attention.name: AttentionAmax(4.0, 8.0, 8.0) for attention in attentions(eight.graph)}
    assert [name.rpartition(".")[2] for name in named] == OF_BLOCK[case[0]]
    assert quantize_attentions(eight, named) == len(named)
    made = [node.name for node in eight.graph if node.op_type == "QuantizeLinear"]
    assert sorted(made) == sorted(f"{name}.{operand}_quantize" for name in named for operand in "qkpv")
    for attention in attentions(folded.graph):
        for part in (attention.scores, attention.mixed):
            quantised = next(node for node in eight.graph if node.name == part.name)
            assert [value.producer().op_type for value in quantised.inputs] == ["DequantizeLinear"] * 2
    assert 0 < difference(outputs(eight, graph), outputs(folded, graph)) <= E4M3_ROUNDING


def test_an_attention_that_is_not_named_stays_in_its_precision(trace: Callable[..., Traced]) -> None:
    _, proto = trace("pixart", "loop_body", "fixed")
    model = model_of(proto)
    fold_attention_scales(model)
    assert quantize_attentions(model, {"transformer_blocks.1.attn1": AttentionAmax(1.0, 1.0, 1.0)}) == 1
    assert not [node for node in model.graph if node.name.startswith("transformer_blocks.1.attn2.q")]
    before = model_of(proto)
    assert quantize_attentions(before, {}) == 0
    assert ir.to_proto(before).SerializeToString() == ir.to_proto(model_of(proto)).SerializeToString()
