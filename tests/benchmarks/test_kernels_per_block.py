"""Kernels of a block, counted in a report written by hand."""

from benchmarks.speed.kernels_per_block import row_of
from ilf_trt.engines.listing import Kernel
from ilf_trt.engines.report import EngineReport


def block(index: int, *others: str) -> list[Kernel]:
    """A product of query and key, an attention, and kernels of no kind."""
    path = f"transformer_blocks.{index}.attn1"
    return [
        Kernel("q+k", "matmul", "fp8", (f"{path}.to_q", f"{path}.to_k")),
        Kernel("bias", "other", "fp16", (f"{path}.to_q",)),
        Kernel("mha", "attention", "fp8", (f"{path}.scores", f"{path}.mixed")),
        *(Kernel(name, "other", "fp16", ()) for name in others),
    ]


def report(*kernels: Kernel) -> EngineReport:
    return EngineReport("loop_body", "fp8", 1.0, 1.0, 1, 1, {}, (), kernels)


def test_a_block_ends_where_the_next_begins_and_the_first_and_last_do_not_count() -> None:
    blocks = [*block(8, *"abcdef"), *block(9, "a"), *block(10, "a"), *block(11, *"abc")]
    assert row_of(report(Kernel("cast", "other", "fp16", ()), *blocks)) == {
        "graph_blocks": 4,
        "graph_kernels": 24,
        "kernels": 4,
        "matmul_fp8": 1,
        "matmul_fp16": 0,
        "attention_fp8": 1,
        "attention_fp16": 0,
        "other": 2,
    }


def test_of_blocks_that_differ_the_most_usual_one_counts() -> None:
    blocks = [*block(8), *block(9, "a"), *block(10), *block(11), *block(12)]
    assert row_of(report(*blocks))["kernels"] == 3
