"""What a report counts, what it flags, and how it is shown."""

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from ilf_trt.contract.document import DocumentError, as_type
from ilf_trt.engines.listing import Kernel
from ilf_trt.engines.report import EngineReport, layer_table, report_table

KERNELS = (
    Kernel("q+k", "matmul", "fp8", ("blocks.0.to_q", "blocks.0.to_k")),
    Kernel("_gemm_mha_v2", "attention", "fp16", ("node_Softmax_1", "node_MatMul_2")),
    Kernel("out", "matmul", "fp16", ("blocks.0.to_out",)),
    Kernel("patches", "convolution", "fp16", ("node_conv",)),
    Kernel("__myl_Add", "other", "fp16+fp32", ()),
    Kernel("__myl_Add", "other", "fp16+fp32", ()),
)
REPORT = EngineReport(
    graph="pre",
    precision="fp8",
    build_s=1.25,
    builder_peak_mib=230.5,
    engine_bytes=3 << 20,
    scratch_bytes=1 << 19,
    network_layers={"MATRIX_MULTIPLY": 4, "CAST": 2},
    expected=("blocks.0.to_q", "blocks.0.to_k"),
    kernels=KERNELS,
)


def shown(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def outside(report: EngineReport) -> list[str]:
    return [kernel.name for kernel in report.outside]


def with_kernel(name: str, **changes: Any) -> EngineReport:
    return replace(REPORT, kernels=tuple(replace(k, **changes) if k.name == name else k for k in KERNELS))


def test_a_report_comes_back_from_json_unchanged() -> None:
    assert as_type(json.loads(json.dumps(REPORT.as_json())), EngineReport) == REPORT


@pytest.mark.parametrize("name", EngineReport.__slots__)
def test_a_report_that_lacks_a_field_is_refused(name: str) -> None:
    less = {key: value for key, value in REPORT.as_json().items() if key != name}
    with pytest.raises(DocumentError, match=name):
        as_type(less, EngineReport)


def test_kernels_are_counted_by_kind_and_precision_most_first() -> None:
    assert next(iter(REPORT.by_kind)) == ("other", "fp16+fp32")
    assert REPORT.by_kind == {
        ("other", "fp16+fp32"): 2,
        ("matmul", "fp8"): 1,
        ("attention", "fp16"): 1,
        ("matmul", "fp16"): 1,
        ("convolution", "fp16"): 1,
    }


def test_a_precision_that_is_not_known_is_counted_as_such() -> None:
    assert with_kernel("out", precision="").by_kind["matmul", "?"] == 1


def test_fused_attentions_are_counted() -> None:
    assert REPORT.fused_attentions == 1
    assert replace(REPORT, kernels=()).fused_attentions == 0


def test_in_fp8_attention_and_what_was_left_out_belong_in_fp16() -> None:
    assert outside(REPORT) == []


def test_an_expected_linear_that_is_not_fp8_is_flagged() -> None:
    assert outside(with_kernel("q+k", precision="fp16")) == ["q+k"]
    assert outside(with_kernel("q+k", precision="fp16+fp8")) == ["q+k"]


def test_an_attention_that_was_asked_for_in_fp8_is_flagged_unless_it_runs_in_fp8() -> None:
    attention = Kernel("mha", "attention", "fp16", ("blocks.0.mixed", "blocks.0.softmax", "blocks.0.scores"))
    asked = replace(REPORT, kernels=(attention,), expected=("blocks.0.scores", "blocks.0.mixed"))
    assert outside(asked) == ["mha"]
    assert outside(replace(asked, kernels=(replace(attention, precision="fp8"),))) == []
    assert outside(replace(asked, kernels=(replace(attention, precision="fp8"),), expected=())) == ["mha"]


def test_the_two_products_of_an_fp8_attention_apart_are_flagged() -> None:
    products = tuple(Kernel(part, "matmul", "fp8", (f"blocks.0.{part}",)) for part in ("scores", "mixed"))
    asked = replace(REPORT, kernels=products, expected=("blocks.0.scores", "blocks.0.mixed", "blocks.0.to_q"))
    assert outside(asked) == ["scores", "mixed"]
    linear = Kernel("to_q", "matmul", "fp8", ("blocks.0.to_q",))
    assert outside(replace(asked, kernels=(linear,))) == []


def test_a_linear_that_is_fp8_and_was_left_out_is_flagged() -> None:
    assert outside(with_kernel("out", precision="fp8")) == ["out"]


def test_an_attention_in_float32_is_flagged() -> None:
    assert outside(with_kernel("_gemm_mha_v2", precision="fp32")) == ["_gemm_mha_v2"]


def test_a_precision_that_is_not_known_is_flagged() -> None:
    assert outside(with_kernel("out", precision="")) == ["out"]


@pytest.mark.parametrize("kind", ["convolution", "other"])
def test_only_products_and_attentions_are_flagged(kind: str) -> None:
    assert outside(with_kernel("out", kind=kind, precision="fp32")) == []


def test_in_fp16_every_product_belongs_in_fp16() -> None:
    assert outside(replace(REPORT, precision="fp16", expected=())) == ["q+k"]


# --- tables


def test_the_table_counts_kernels_and_names_what_is_not_as_asked() -> None:
    text = shown(report_table((with_kernel("q+k", precision="fp32"),)))
    for word in ("pre", "1 fp32", "1 fp16", "3.0", "0.5", "1.2", "fp32 blocks.0.to_q, blocks.0.to_k"):
        assert word in text


def test_the_table_says_so_when_all_is_as_asked() -> None:
    assert "–" in shown(report_table((REPORT,)))


def test_the_table_says_so_when_the_kernels_are_not_listed() -> None:
    text = shown(report_table((replace(REPORT, kernels=()),)))
    assert "not listed" in text
    assert "not known" in text


def test_a_layers_name_is_no_markup() -> None:
    report = with_kernel("out", precision="fp32", layers=("a.[red]b[/red]",))
    assert "fp32 a.[red]b[/red]" in shown(report_table((report,)))
    assert "a.[red]b[/red]" in shown(layer_table(report))


def test_the_layers_of_an_engine_are_listed_with_their_precision() -> None:
    lines = shown(layer_table(REPORT)).splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split("│")[2].strip() for row in rows] == ["matmul", "", "attention", "", "matmul", "convolution"]
    assert "__myl_Add" not in "".join(rows)
