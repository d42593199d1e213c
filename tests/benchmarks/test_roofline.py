"""The roofline: the traced work of a block, its rates, its rows, and the table and the limits that come from it."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import Records
from benchmarks.rivals.full_size_models import MODELS
from benchmarks.speed import block_work, gpu, gpu_tables, roofline, roofline_rates
from benchmarks.speed import rows as speed_rows
from benchmarks.speed.block_work import Attention, BlockWork, Product, trace_block
from benchmarks.speed.roofline_rates import FP8, FP16, GPUS, GpuRates, by_length, tiled_flop

H200 = GPUS[1]
OPENXLA_LAUNCH_US = 5.8  # what the smallest products of OpenXLA's table take
OPENXLA = (  # rows, outputs, inputs, TFLOP/s in bfloat16 on sm_90, of matmul_interpolator_data.h
    (256, 4096, 4096, 412.0),
    (512, 4096, 1024, 373.3),
    (512, 1024, 2048, 216.5),
    (512, 2048, 2048, 342.4),
    (1024, 1024, 2048, 350.0),
    (1024, 2048, 1024, 373.3),
    (2048, 1024, 2048, 523.3),
    (2048, 4096, 1024, 594.2),
    (4096, 1024, 1024, 488.1),
    (4096, 1024, 4096, 738.5),
    (4096, 4096, 4096, 783.3),
)
FIT = 0.12  # the largest error of the tiles against OpenXLA's table is 0.10


# --- the work of a block


def test_a_traced_block_has_the_kernels_of_dit() -> None:
    work = trace_block("dit-xl-256")
    large = [(each.rows, each.inputs, each.outputs) for each in work.engine_products]
    assert large == [(512, 1152, 3456), (512, 1152, 1152), (512, 1152, 4608), (512, 4608, 1152)]
    assert work.attentions == (Attention(2, 16, 256, 256, 72, False),)
    names = Counter(kernel.name for kernel in work.rest)
    assert (names["aten::native_layer_norm"], names["residual"], names["aten::gelu"]) == (2, 2, 1)
    assert work.fused_elements == 10 * work.token_elements == 10 * 2 * 256 * 1152


def test_a_traced_block_has_the_cross_attention_of_pixart() -> None:
    work = trace_block("pixart-sigma-1024")
    assert work.attentions == (Attention(2, 16, 4096, 4096, 72, False), Attention(2, 16, 4096, 300, 72, True))
    assert (600, 1152, 2304) in [(each.rows, each.inputs, each.outputs) for each in work.engine_products]
    assert work.fused_elements == 13 * work.token_elements


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-pixart"])
def test_a_traced_block_has_the_operations_that_torch_counts(name: str) -> None:
    model = block_work.make_meta_model(name)
    block, inputs = model.adapter.blocks[block_work.MIDDLE_BLOCK], {}

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        inputs["call"] = (args, kwargs)

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    work = block_work.trace_block(name, model)
    hook.remove()
    args, kwargs = inputs["call"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(*args, **kwargs)
    counted = sum(each.flop for each in work.products) + sum(each.flop() for each in work.attentions)
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize(("name", "attentions"), [("dit-xl-256", 1), ("pixart-alpha-512", 2)])
def test_fp8_attention_for_tensorrt_widens_the_linears_around_each_attention(name: str, attentions: int) -> None:
    work = trace_block(name)
    changed = [new for new, old in zip(work.filled.products, work.products, strict=True) if new != old]
    of_attention = [(1152, 1280), (1152, 1280), (1152, 1280), (1280, 1152)]  # 16 heads of 80
    assert [(each.inputs, each.outputs) for each in changed] == attentions * of_attention
    assert {each.head_size for each in work.filled.attentions} == {80}
    assert work.filled.filled == work.filled


def test_linears_of_one_input_are_one_product_of_an_engine() -> None:
    products = (Product(8, 4, 4, 0), Product(8, 4, 6, 0), Product(8, 4, 4, 1), Product(2, 4, 24, 2))
    work = BlockWork(products, (), (), 32)
    assert work.engine_products == (Product(8, 4, 10, 0), Product(8, 4, 4, 1))


# --- rates


@pytest.mark.parametrize(("rows", "outputs", "inputs", "rate"), OPENXLA)
def test_tiles_explain_the_rates_of_small_products(rows: int, outputs: int, inputs: int, rate: float) -> None:
    measured_us = 2 * rows * outputs * inputs / (rate * 1e6)
    model_us = OPENXLA_LAUNCH_US + tiled_flop(rows, inputs, outputs) / (H200.product[FP16] * 1e6)
    assert model_us == pytest.approx(measured_us, rel=FIT)


def test_a_full_wave_of_full_tiles_leaves_nothing_idle() -> None:
    assert tiled_flop(132 * 128, 64, 128) == 2 * 132 * 128 * 64 * 128
    assert tiled_flop(128, 64, 128) > 4 * 2 * 128 * 64 * 128


def test_a_rate_between_two_lengths_lies_on_their_line() -> None:
    rates = {512: 100.0, 1024: 200.0, 2048: 400.0}
    assert [by_length(rates, length) for length in (256, 512, 768, 1536, 4096)] == [100, 100, 150, 300, 400]


def published() -> GpuRates:
    return GpuRates.of(H200, [], [])


def test_without_measurements_every_rate_is_published() -> None:
    rates = published()
    product = Product(8192, 1152, 4608, 0)
    assert rates.product_us(product, FP16) >= product.flop / (783 * 1e6)
    assert rates.product_us(product, FP8) < rates.product_us(product, FP16)
    assert rates.bytes_us(4.18e6) == pytest.approx(1)
    assert rates.source == "published"


def test_a_product_of_few_rows_takes_as_long_as_its_weights() -> None:
    product = Product(2, 1152, 6912, 0)
    assert published().product_us(product, FP16) >= 2 * 1152 * 6912 / 4.18e6


@pytest.mark.parametrize("precision", [FP16, FP8])
@pytest.mark.parametrize("queries", [256, 1024, 4096])
def test_heads_padded_to_80_take_less_time_than_to_128(precision: str, queries: int) -> None:
    attention, rates = Attention(2, 16, queries, queries, 72, False), published()
    assert rates.attention_us(attention, precision, 80) < rates.attention_us(attention, precision)
    assert rates.attention_us(attention, FP8) < rates.attention_us(attention, FP16)


def measured_row(what: str, size: str, median: str, gpu: str = "NVIDIA H200", unit: str = "TFLOP/s") -> dict[str, str]:
    return {"gpu": gpu, "what": what, "size": size, "median": median, "unit": unit, "n": "15"}


def test_measured_rates_replace_published_ones_and_are_named() -> None:
    facts = [
        measured_row("matmul fp16", "8x8x8", "800"),
        measured_row("copy device, read and write", "1024 MiB", "4000", unit="GB/s"),
        measured_row("memory, MiB", "", "143771", unit=""),
    ]
    rows = [
        measured_row("linear fp16", "512x1152x1152", "400"),
        measured_row("attention fp16 default", "256x256, heads of 72", "100"),
        measured_row("attention fp16 flash", "256x256, heads of 128", "200"),
        measured_row("attention fp16 cudnn", "256x256, heads of 128", "300"),
        measured_row("attention fp16 cudnn", "256x256, heads of 80", ""),
    ]
    rates, gap = GpuRates.of(H200, facts, rows), roofline_rates.CAPTURED_US
    attention, product = Attention(2, 16, 256, 256, 72, False), Product(512, 1152, 1152, 0)
    assert rates.product_us(product, FP16) == pytest.approx(product.flop / 400e6 - gap)
    assert rates.attention_us(attention, FP16) == pytest.approx(attention.flop(128) / 300e6 - gap)
    assert rates.eager_attention_us(attention) == pytest.approx(attention.flop() / 100e6 - gap)
    assert rates.square_flop_per_us(FP16) == pytest.approx(800e6)
    assert rates.bytes_us(4e6) == pytest.approx(1)
    assert rates.source == "measured attention, copy, linear, matmul; else published"
    assert rates.attention_us(attention, FP16, 80) == published().attention_us(attention, FP16, 80)


def test_rates_of_another_gpu_are_not_used() -> None:
    rows = [measured_row("linear fp16", "512x1152x1152", "400", gpu="NVIDIA H100 80GB HBM3")]
    rates = GpuRates.of(H200, [], rows)
    rates.product_us(Product(512, 1152, 1152, 0), FP16)
    assert rates.source == "published"


@pytest.mark.parametrize(
    ("name", "measured", "same"),
    [
        ("H100 SXM", "NVIDIA H100 80GB HBM3", True),
        ("H100 SXM", "NVIDIA H100 PCIe", False),
        ("H100 SXM", "NVIDIA H200", False),
        ("H200", "NVIDIA H200", True),
        ("H200", "NVIDIA H200 NVL", False),
        ("H200", "none, a dry run on the CPU", False),
    ],
)
def test_a_gpu_is_known_by_the_name_of_torch(name: str, measured: str, same: bool) -> None:
    assert gpu_tables.is_gpu(name, measured) is same


# --- rows


def test_the_committed_roofline_is_that_of_the_committed_measurements() -> None:
    rows = roofline.roofline_rows(Records())
    committed = Records().read("gpu-roofline")
    assert [(row["gpu"], row["model"], row["precision"]) for row in rows] == [
        (gpu.name, name, precision) for gpu in GPUS for name in MODELS for precision in roofline.PRECISIONS
    ]
    assert [{column: row[column] for column in rows[0]} for row in committed] == [
        {column: str(value) for column, value in row.items()} for row in rows
    ]


def test_a_pass_is_its_parts_and_a_ratio_counts_the_block_forwards_of_both_plans() -> None:
    for row in Records().read("gpu-roofline"):
        number = {name: float(value) for name, value in row.items() if name.endswith(("_us", "_forwards"))}
        parts = sum(number[name] for name in ("linears_us", "attention_us", "rest_us", "gaps_us"))
        assert number["pass_us"] == pytest.approx(parts, abs=0.3)
        assert number["eager_us"] == max(number["eager_gpu_us"], number["eager_host_us"])
        assert number["eager_block_forwards"] == 20 * 28
        ratio = number["eager_us"] * number["eager_block_forwards"] / number["pass_us"] / number["ilf_block_forwards"]
        assert float(row["faster_ilf"]) == pytest.approx(ratio, rel=0.01)


def test_fp8_attention_computes_the_linears_with_filled_heads() -> None:
    for row in Records().read("gpu-roofline"):
        share = float(row["linears_padded_gflop"]) / float(row["linears_gflop"])
        if row["precision"] != gpu_tables.FP8_ATTENTION:
            assert share == 1
        elif row["model"] == "dit-xl-256":
            assert share == pytest.approx(1 + 4 / 12 / 9, abs=0.001)
        else:
            assert share > 1 + 4 / 12 / 9


def test_kernels_are_those_of_an_engine_of_the_same_kind() -> None:
    def report(model: str, precision: str, kernels: int, gpu: str = "sm89") -> dict[str, str]:
        return {"model": model, "precision": precision, "gpu": gpu, "kernels": str(kernels)}

    reports = [
        report("demo", FP16, 9),
        report("dit-xl-256", FP16, 10),
        report("dit-xl-256", FP8, 13, gpu="sm120"),
        report("dit-xl-256", FP8, 12),
        report("dit-xl-256", "fp8-attention", 15),
        report("dit-xl-256", "fp8-attention, padded heads", 14),
        report("pixart-alpha-512", FP8, 20),
        report("pixart-alpha-1024", FP8, 21),
    ]
    assert [roofline.kernels_of(reports, "dit-xl-256", name) for name in roofline.PRECISIONS] == [10, 12, 14]
    assert roofline.kernels_of(reports, "pixart-sigma-1024", FP8) == 20
    assert roofline.kernels_of(reports, "pixart-alpha-1024", FP8) == 21
    with pytest.raises(ValueError, match=r"no fp16 engine of pixart-sigma-1024 on sm89; run python -m benchmarks"):
        roofline.kernels_of(reports, "pixart-sigma-1024", FP16)


# --- the table and the limits


def roofline_row(**values: str) -> dict[str, str]:
    return {**Records().read("gpu-roofline")[0], **values}


def latency_row(**values: str) -> dict[str, str]:
    names = {"gpu": "NVIDIA H200", "model": "dit-xl-256", "batch": "1", "row": "ilf-trt ILF", "precision": "fp16"}
    return {**names, "faster_than_eager_20": "", "linear_share": "", "launch_us": "", **values}


def test_the_table_has_a_measured_speed_or_says_that_there_is_none() -> None:
    rows = [roofline_row(gpu="H200", model="dit-xl-256", precision=precision) for precision in (FP16, FP8)]
    latency = [latency_row(faster_than_eager_20=value) for value in ("4.5", "5.25", "")]
    latency.append(latency_row(faster_than_eager_20="9", batch="4"))
    lines = gpu_tables.gpu_roofline(rows, latency).splitlines()
    assert [line.split(" | ")[-2] for line in lines[2:4]] == ["5.25x", "–"]
    captured = latency_row(row=gpu_tables.TORCH_ILF_ROW, faster_than_eager_20="3")
    assert " | 3.00x by torch | " in gpu_tables.gpu_roofline(rows, [captured])
    assert gpu_tables.TORCH_ILF_ROW in speed_rows.SLUGS.values()
    assert lines[-1] == "–: Not measured: no GPU was at hand."
    assert "Not measured" not in gpu_tables.gpu_roofline(rows[:1], latency)


def test_measured_fp8_attention_stands_beside_its_own_roofline() -> None:
    rows = [roofline_row(gpu="H200", model="dit-xl-256", precision=name) for name in (FP8, "fp8-attention")]
    latency = [latency_row(precision=name, faster_than_eager_20=v) for name, v in ((FP8, "5"), ("fp8-attention", "6"))]
    lines = gpu_tables.gpu_roofline(rows, latency).splitlines()
    assert [line.split(" | ")[-2] for line in lines[2:4]] == ["5.00x", "6.00x"]
    assert set(roofline.PRECISIONS) == set(gpu.PRECISIONS)


@pytest.mark.parametrize("precision", [FP16, FP8, "fp8-attention"])
def test_a_limit_is_a_share_of_the_roofline_of_its_gpu_and_precision(precision: str) -> None:
    name = {"model": "pixart-alpha-1024", "precision": precision}
    rows = [roofline_row(gpu="H200", **name, faster_ilf="5.0")]
    for faster, verdict in (("4.1", "reached"), ("3.9", "not reached")):
        lines = gpu_tables.gpu_limits([latency_row(**name, faster_than_eager_20=faster)], rows)
        told = f"80 % of the roofline, faster than eager, PixArt-α 1024 {precision}: {faster} of 4, NVIDIA H200"
        assert [line for line in lines if not line.startswith("not measured")] == [f"{verdict}: {told}"]


def test_a_gpu_without_a_roofline_is_held_against_the_launch_alone() -> None:
    lines = gpu_tables.gpu_limits([latency_row(gpu="NVIDIA A100", faster_than_eager_20="4", launch_us="9")], [])
    assert [line.partition(":")[0] for line in lines].count("no roofline") == 1
    assert "reached: launch within 50 µs, DiT-XL/2 256 fp16: 9 of 50, NVIDIA A100" in lines
