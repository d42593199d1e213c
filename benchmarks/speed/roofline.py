"""The least time of a block pass on a Hopper GPU, in an engine and in eager PyTorch, and what ILF gains from it.

    python -m benchmarks.speed.roofline
    python -m benchmarks.tables

Sizes come from the models' configurations, the kernels of eager torch from a trace of diffusers' own block, the kernels
of an engine from benchmarks/results/kernels-per-block.csv, and each rate from the source that stands above it in
`roofline_rates.py`. A rate that gpu-facts.csv or gpu-rates.csv has of that GPU replaces the published one, and the
column `rates` says which. Both sides leave out everything outside the blocks: embedders, head, guidance, solver.

`fp8` keeps attention in FP16. `fp8-attention` is a bundle for TensorRT, the library of Hopper GPUs: its heads of 72 are
filled up with zeros to 80 in the weights of query, key, value and output.

| column | meaning |
|---|---|
| `linears_gflop`, `attention_gflop` | useful operations; `..._padded_gflop`: with the zeros that the kernels compute |
| `linears_us`, `attention_us`, `rest_us` | arithmetic or bytes, whichever takes longer, kernel by kernel |
| `gaps_us` | the gaps between the kernels of a block pass in one CUDA graph |
| `linear_share` | the rate of the Linears over the whole pass, as a share of the best square product |
| `eager_us` | a block pass of eager torch: time of the GPU or of the host's launches, whichever is longer |
| `..._at_80` | with heads padded to 80 inside the kernel, if a kernel did so |
| `faster_plain` | 20 plain steps against 20 plain steps of eager torch |
| `faster_ilf` | 10 steps of ILF against 20 plain steps of eager torch |
"""

import argparse
from typing import Any

from benchmarks.record import Records
from benchmarks.rivals.full_size_models import LOOP, MODELS
from benchmarks.speed import kernels_per_block
from benchmarks.speed.block_work import BlockWork, trace_block
from benchmarks.speed.gpu_tables import FACTS, FP8_ATTENTION, RATES, ROOFLINE
from benchmarks.speed.roofline_rates import (
    CAPTURED_US,
    EAGER_LAUNCH_US,
    FP8,
    FP16,
    GPUS,
    PADDED,
    PADDED_LESS,
    GpuRates,
)
from benchmarks.speed.rows import FEEDBACK, FEEDBACK_STEPS, STEPS
from ilf_trt.contract.plan import make_plan
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.contract.spec import Loop

GIGA, MIB = 1e9, 1 << 20
COMMAND = "python -m benchmarks.speed.roofline"
HALF_BYTES, FP8_BYTES = 2, 1
PRECISIONS = {FP16: (FP16, FP16), FP8: (FP8, FP16), FP8_ATTENTION: (FP8, FP8)}  # of the Linears, of the attentions
BLOCKS = 28
KERNELS = "kernels-per-block"
VARIANTS = {FP16: FP16, FP8: FP8, FP8_ATTENTION: kernels_per_block.PADDED}  # in KERNELS
ENGINE_GPU = "sm89"  # in KERNELS; TensorRT-RTX builds no engine for a Hopper GPU


def roofline_rows(records: Records) -> list[dict[str, Any]]:
    """A row for each GPU, model and precision; `records` holds what was measured, and the kernels."""
    works = {name: trace_block(name) for name in MODELS}
    kernels = records.read(KERNELS)
    rows = []
    for gpu in GPUS:
        for name, work in works.items():
            for precision in PRECISIONS:
                rates = GpuRates.of(gpu, records.read(FACTS), records.read(RATES))
                rows.append(_row(rates, name, work, precision, kernels_of(kernels, name, precision)))
    return rows


def kernels_of(reports: list[dict[str, str]], name: str, precision: str) -> int:
    """Kernels of a block of an engine, of the model or of another one of its kind.

    Raises ValueError if kernels-per-block.csv has neither.
    """
    kinds = {
        row["model"]: int(row["kernels"])
        for row in reports
        if (row["precision"], row["gpu"]) == (VARIANTS[precision], ENGINE_GPU)
        and row["model"] in MODELS
        and MODELS[row["model"]]["kind"] == MODELS[name]["kind"]
    }
    if not kinds:
        raise ValueError(
            f"{KERNELS}.csv has no {VARIANTS[precision]} engine of {name} on {ENGINE_GPU}; "
            "run python -m benchmarks.speed.kernels_per_block"
        )
    return kinds.get(name, next(iter(kinds.values())))


def eager_us(rates: GpuRates, work: BlockWork) -> tuple[float, float]:
    """The time of the GPU and of the host for a block pass of eager torch in float16."""
    gpu_us = sum(rates.product_us(product, FP16) for product in work.products)
    gpu_us += sum(rates.eager_attention_us(attention) for attention in work.attentions)
    gpu_us += sum(rates.bytes_us(kernel.bytes_moved) for kernel in work.rest)
    return gpu_us + work.kernels * CAPTURED_US, work.kernels * EAGER_LAUNCH_US


def rest_bytes(work: BlockWork, precision: str) -> float:
    """Bytes that the norms, modulations, gates and residuals of an engine move; in FP8, also the activation's."""
    alone = work.activation_elements * (HALF_BYTES + FP8_BYTES) if precision != FP16 else 0
    return work.fused_elements * HALF_BYTES + alone


def _row(rates: GpuRates, name: str, work: BlockWork, precision: str, kernels: int) -> dict[str, Any]:
    of_linears, of_attention = PRECISIONS[precision]
    engine = work.filled if precision == FP8_ATTENTION else work
    products = engine.engine_products
    linears_us = sum(rates.product_us(product, of_linears) for product in products)
    attention_us, at_80_us = (
        sum(rates.attention_us(attention, of_attention, size) for attention in engine.attentions)
        for size in (PADDED, PADDED_LESS)
    )
    moved = rest_bytes(work, precision)
    rest_us, gaps_us = rates.bytes_us(moved), kernels * CAPTURED_US
    pass_us = linears_us + attention_us + rest_us + gaps_us
    pass_80_us = pass_us - attention_us + at_80_us
    linear_flop = sum(product.flop for product in work.engine_products)
    eager_gpu_us, eager_host_us = eager_us(rates, work)
    eager = max(eager_gpu_us, eager_host_us)
    plain, ilf = (
        make_plan(DEFAULT_SCHEDULER, steps, blocks=BLOCKS, loop=Loop(*LOOP), feedback=feedback).block_forwards
        for steps, feedback in ((STEPS, "none"), (FEEDBACK_STEPS, FEEDBACK))
    )
    operand, operand_attention = (FP8_BYTES if kind == FP8 else HALF_BYTES for kind in (of_linears, of_attention))
    return {
        "gpu": rates.gpu.name,
        "model": name,
        "precision": precision,
        "tokens": work.attentions[0].queries,
        "linears_gflop": round(linear_flop / GIGA, 2),
        "linears_padded_gflop": round(sum(product.flop for product in products) / GIGA, 2),
        "attention_gflop": round(sum(attention.flop() for attention in work.attentions) / GIGA, 2),
        "attention_padded_gflop": round(sum(attention.flop(PADDED) for attention in work.attentions) / GIGA, 2),
        "linears_mib": _mib(sum(product.bytes_moved(operand, HALF_BYTES) for product in products)),
        "attention_mib": _mib(sum(each.bytes_moved(operand_attention, HALF_BYTES) for each in engine.attentions)),
        "rest_mib": _mib(moved),
        "kernels": kernels,
        "linears_us": round(linears_us, 1),
        "attention_us": round(attention_us, 1),
        "attention_us_at_80": round(at_80_us, 1),
        "rest_us": round(rest_us, 1),
        "gaps_us": round(gaps_us, 1),
        "pass_us": round(pass_us, 1),
        "linear_share": round(linear_flop / (pass_us * rates.square_flop_per_us(of_linears)), 3),
        "eager_kernels": work.kernels,
        "eager_gpu_us": round(eager_gpu_us, 1),
        "eager_host_us": round(eager_host_us, 1),
        "eager_us": round(eager, 1),
        "eager_block_forwards": plain,
        "ilf_block_forwards": ilf,
        "faster_plain": round(eager / pass_us, 2),
        "faster_ilf": round(eager * plain / (pass_us * ilf), 2),
        "faster_ilf_at_80": round(eager * plain / (pass_80_us * ilf), 2),
        "rates": rates.source,
    }


def _mib(moved: float) -> float:
    return round(moved / MIB, 2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    records = Records()
    print(records.write(ROOFLINE, COMMAND, roofline_rows(records)))


if __name__ == "__main__":
    main()
