"""The passes over exported graphs, each on a graph of a few lines."""

from typing import Any

import onnx
import pytest
from onnxscript import ir

from ilf_trt.export.passes import SCOPES, name_linears, share_equal, strip_metadata

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[N] x, bool flag) => (float[N] y)
<float[1] weight = {2.0}>
{
    twice = Mul (x, weight)
    y = If (flag) <
        then_branch = positive () => (float[N] p) { p = Relu (twice) },
        else_branch = negative () => (float[N] n) { n = Neg (twice) }
    >
}
"""
NOTE = {"pkg.torch.onnx.stack_trace": 'File "/home/someone/model.py", line 7'}


def small() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def nodes(model: ir.Model) -> dict[str, Any]:
    return {node.op_type: node for node in model.graph.all_nodes()}


def holders(model: ir.Model) -> dict[str, Any]:
    """One of each kind of thing that the exporter writes notes on."""
    found = nodes(model)
    return {
        "model": model,
        "graph": model.graph,
        "input": model.graph.inputs[0],
        "initializer": model.graph.initializers["weight"],
        "node": found["Mul"],
        "value": found["Mul"].outputs[0],
        "node of a branch": found["Neg"],
        "value of a branch": found["Relu"].outputs[0],
        "output": model.graph.outputs[0],
    }


KINDS = tuple(holders(small()))


def test_strip_metadata_of_a_graph_without_notes_changes_nothing() -> None:
    model = small()
    before = ir.to_proto(model).SerializeToString()
    assert strip_metadata(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("kind", KINDS)
def test_strip_metadata_drops_the_note_on_one_holder(kind: str) -> None:
    model = small()
    holders(model)[kind].metadata_props.update(NOTE)
    assert b"/home/someone" in ir.to_proto(model).SerializeToString()
    assert strip_metadata(model) == 1
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(small()).SerializeToString()


@pytest.mark.parametrize("kind", KINDS)
def test_strip_metadata_drops_the_doc_string_of_one_holder(kind: str) -> None:
    model = small()
    holders(model)[kind].doc_string = "from /home/someone/model.py"
    assert strip_metadata(model) == 1
    assert b"/home/someone" not in ir.to_proto(model).SerializeToString()


def test_strip_metadata_counts_every_change_once() -> None:
    model = small()
    for holder in holders(model).values():
        holder.metadata_props.update(NOTE)
        holder.doc_string = "a note"
    assert strip_metadata(model) == 2 * len(KINDS)
    assert strip_metadata(model) == 0


def test_strip_metadata_keeps_names_shapes_and_weights() -> None:
    model = small()
    for holder in holders(model).values():
        holder.metadata_props.update(NOTE)
    strip_metadata(model)
    assert [value.name for value in model.graph.inputs] == ["x", "flag"]
    assert [node.op_type for node in model.graph.all_nodes()] == ["Mul", "If", "Relu", "Neg"]
    assert model.graph.initializers["weight"].const_value.numpy().tolist() == [2.0]


TWINS = """
<ir_version: 10, opset_import: ["" : 20]>
twins (float[2] x) => (float[2] y)
<float[2] first = {2.0, 3.0}, float[2] second = {2.0, 3.0}, float[2] third = {2.0, 4.0}>
{
    a = Mul (x, first)
    b = Mul (x, second)
    c = Mul (x, third)
    d = Add (a, b)
    y = Add (c, d)
}
"""


def test_share_equal_keeps_one_of_two_equal_weights_and_their_product_once() -> None:
    model = ir.from_onnx_text(TWINS)
    assert share_equal(model) == 2
    assert sorted(model.graph.initializers) == ["first", "third"]
    assert [node.op_type for node in model.graph] == ["Mul", "Mul", "Add", "Add"]


def test_share_equal_of_a_graph_without_twins_changes_nothing() -> None:
    model = small()
    before = ir.to_proto(model).SerializeToString()
    assert share_equal(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


LINEARS = """
<ir_version: 10, opset_import: ["" : 20]>
linears (float[2,2] x) => (float[2,2] y)
<float[2,2] w0 = {1.0, 0.0, 0.0, 1.0}, float[2,2] w1 = {1.0, 2.0, 3.0, 4.0}, float[2] b = {1.0, 2.0}>
{
    [n0] h = MatMul (x, w0)
    [n1] scores = MatMul (h, x)
    [n2] g = Gemm (scores, w1, b)
    [n3] y = Mul (g, b)
}
"""
TO_Q, TO_OUT = "blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0"


def linears(**paths: str) -> ir.Model:
    """Each named node as the exporter marks what a module made: the segment, its modules, the operator."""
    model = ir.from_onnx_text(LINEARS)
    for node in model.graph:
        if node.name in paths:
            node.metadata_props[SCOPES] = str(["", "blocks.0", paths[node.name], "linear"])
    return model


def in_model(path: str) -> str:
    return path.replace("blocks.0", "transformer_blocks.8")


def names(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph]


def test_name_linears_calls_products_and_weights_as_their_layers_in_the_model() -> None:
    model = linears(n0=TO_Q, n2=TO_OUT)
    assert name_linears(model, in_model) == 2
    assert names(model) == [in_model(TO_Q), "n1", in_model(TO_OUT), "n3"]
    assert sorted(model.graph.initializers) == ["b", f"{in_model(TO_OUT)}.weight", f"{in_model(TO_Q)}.weight"]


def test_name_linears_keeps_the_graph_as_it_computes() -> None:
    model = linears(n0=TO_Q, n2=TO_OUT)
    name_linears(model, in_model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    products = nodes(model)
    assert products["MatMul"].outputs[0].name == "scores"
    assert products["Gemm"].inputs[1].const_value.numpy().tolist() == [[1, 2], [3, 4]]


def test_name_linears_leaves_products_of_computed_tensors_and_other_nodes() -> None:
    model = linears(n1=TO_Q, n3=TO_OUT)
    before = ir.to_proto(model).SerializeToString()
    assert name_linears(model, in_model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_name_linears_leaves_products_that_no_module_made() -> None:
    model = linears()
    next(iter(model.graph)).metadata_props[SCOPES] = str(["", "scaled_dot_product_attention"])
    assert name_linears(model, in_model) == 0
    assert names(model) == ["n0", "n1", "n2", "n3"]


def test_name_linears_counts_a_layer_that_runs_twice_once_and_names_its_runs_apart() -> None:
    model = linears(n0=TO_Q, n2=TO_Q)
    assert name_linears(model, in_model) == 1
    assert names(model) == [in_model(TO_Q), "n1", f"{in_model(TO_Q)}_1", "n3"]
    assert sorted(model.graph.initializers) == ["b", f"{in_model(TO_Q)}.weight", "w1"]
