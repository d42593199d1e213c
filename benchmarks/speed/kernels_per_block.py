"""Kernels of one block in TensorRT-RTX engines, by kind and precision, from the engines' reports, without a GPU.

    python -m benchmarks.speed.kernels_per_block [--models demo dit-xl-256 …] [--variants fp16 fp8 fp8-attention …]

A block is what runs from the first kernel of its query's Linear to that of the next block's, in graph `loop_body`; the
first block is left out, because a builder moves work of all blocks there. `…, scale unfolded` builds the graph as the
exporter writes it, with the scale of attention as products of query and key; `…, padded heads` as for TensorRT. Weights
are random but for the demo.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.record import append_rows
from benchmarks.rivals.full_size_models import MODELS, make_checkpoint
from ilf_trt.assembly.conductor import build, compile_bundle
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.engines.report import EngineReport

DEMO = "demo"
ATTENTION, PADDED = "fp8-attention", "fp8-attention, padded heads"
UNFOLDED = ", scale unfolded"
VARIANTS = (f"fp16{UNFOLDED}", "fp16", f"fp8{UNFOLDED}", "fp8", ATTENTION, PADDED)
GPUS = ("sm89", "sm120")
GRAPH = "loop_body"
COLUMNS = (("matmul", "fp8"), ("matmul", "fp16"), ("attention", "fp8"), ("attention", "fp16"))


def measure(model: str, variant: str, gpus: list[str], work: Path) -> list[Mapping[str, Any]]:
    """A row for each GPU, of engines of batch 1 with guidance."""
    checkpoint, output = work / model, work / "kernels.ilf"
    text = model != DEMO and MODELS[model]["kind"] == "pixart"
    if model != DEMO and not (checkpoint / "conditions.npz").is_file():
        make_checkpoint(model, checkpoint)
    precision = Precision(variant[: len("fp16")] if variant.startswith("fp16") else variant[: len("fp8")])
    options = BuildOptions(
        precision=precision,
        batch=BatchRange(1, 1, 1),
        text_tokens=MODELS[model]["text_tokens"] if text else None,
        steps=2,
        feedback="first:1",
        calibration=checkpoint / "conditions.npz" if model != DEMO and precision is Precision.FP8 else None,
        calibrator=Calibrator.OWN,
        fp8_attention=variant in (ATTENTION, PADDED) if precision is Precision.FP8 else None,
        verify=False,
    )
    targets = {gpu: EngineOptions(Library.TENSORRT_RTX, (Architecture.parse(gpu),)) for gpu in gpus}
    if variant != PADDED:  # without a target, heads are padded for TensorRT
        options = replace(options, engines=targets[gpus[0]])
    unfolded = mock.patch("ilf_trt.export.graph.fold_attention_scales", return_value=0)
    with unfolded if variant.endswith(UNFOLDED) else nullcontext():
        built = build(DEMO if model == DEMO else str(checkpoint), output, options, force=True)
    rows: list[Mapping[str, Any]] = []
    for gpu in gpus:
        done = variant != PADDED and gpu == gpus[0]
        result = built if done else compile_bundle(output, output, targets[gpu], force=True)
        reports = {report.graph: report for report in result.reports}
        outside = sum(len(report.outside) for report in result.reports)
        rows.append(
            {"model": model, "precision": variant, "gpu": gpu, **row_of(reports[GRAPH]), "not_as_asked": outside}
        )
    shutil.rmtree(output)
    return rows


def row_of(report: EngineReport) -> dict[str, int]:
    """The kernels of the most usual block of a report, and of the whole graph."""
    begins: dict[str, int] = {}
    for index, kernel in enumerate(report.kernels):
        for layer in kernel.layers:
            if layer.endswith("attn1.to_q"):
                begins.setdefault(layer, index)
    starts = sorted(begins.values())
    blocks = [report.kernels[begin:end] for begin, end in pairwise(starts[1:])]
    ((size, _),) = Counter(map(len, blocks)).most_common(1)
    block = next(kernels for kernels in blocks if len(kernels) == size)
    counts = Counter((kernel.kind, kernel.precision) for kernel in block)
    named = {f"{kind}_{precision}": counts[kind, precision] for kind, precision in COLUMNS}
    return {
        "graph_blocks": len(starts),
        "graph_kernels": len(report.kernels),
        "kernels": size,
        **named,
        "other": size - sum(named.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=[DEMO, *MODELS], default=[DEMO, "dit-xl-256", "pixart-alpha-512"]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--gpus", nargs="+", default=list(GPUS))
    parser.add_argument("--work", type=Path, default=Path("build/full-size"), help="folder for checkpoints and bundles")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for variant in options.variants:
            rows = measure(model, variant, options.gpus, options.work)
            path = append_rows(
                "kernels-per-block",
                "python -m benchmarks.speed.kernels_per_block",
                rows,
                key=("model", "precision", "gpu"),
            )
            print(path, *rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
