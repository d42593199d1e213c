"""Builds full-size models with random weights, ahead of time and without a GPU: seconds, memory, sizes, kernels.

    python -m benchmarks.speed.full_size_build [--models dit-xl-256 pixart-512 …] [--precisions fp16 fp8] [--gpu sm89]

Every model has the paper's dimensions (28 blocks, loop 8-19), and DiT's embedders are equal copies, as in the converted
official checkpoints. Each build runs in a new process; memory is the sampled sum over that process and its children.
FP8 has attention in FP8 too. It is calibrated on one picture of two steps: enough for a build, and no measure of
quality.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import append_rows
from benchmarks.rivals.full_size_models import MODELS, make_checkpoint

MIB = 1 << 20
SAMPLE_S = 0.1
SLACK_MIB = 100  # kernels, graphs, and constants other than weights


def build_one(name: str, precision: str, gpu: str, checkpoint: Path, output: Path) -> dict[str, Any]:
    """Build in this process, and return the stages and a row for each graph."""
    from ilf_trt.assembly.conductor import build
    from ilf_trt.assembly.options import BuildOptions
    from ilf_trt.contract.spec import BatchRange, Precision
    from ilf_trt.contract.target import Architecture, EngineOptions, Library

    fp8 = Precision(precision) is Precision.FP8
    options = BuildOptions(
        precision=Precision(precision),
        batch=BatchRange(1, 1, 1),
        text_tokens=MODELS[name]["text_tokens"] or 1,
        steps=2 if fp8 else 10,
        feedback="first:1" if fp8 else "outer:2",
        calibration=checkpoint / "conditions.npz" if fp8 else None,
        verify=False,
        engines=EngineOptions(Library.TENSORRT_RTX, tuple(map(Architecture.parse, gpu.split(",")))),
    )
    result = build(str(checkpoint), output, options, force=True)
    files = result.bundle.manifest.files
    rows = []
    for report in result.reports:
        onnx = sum(f.size_bytes for path, f in files.items() if path.startswith(f"graphs/{report.graph}.onnx"))
        counts = report.by_kind
        rows.append(
            {
                "graph": report.graph,
                "export_s": round(result.stage_s[f"export {report.graph}"], 1),
                "build_s": round(result.stage_s[f"engine {report.graph}"], 1),
                "onnx_mib": round(onnx / MIB, 1),
                "engine_mib": round(report.engine_bytes / MIB, 1),
                "scratch_mib": round(report.scratch_bytes / MIB, 1),
                "builder_peak_mib": report.builder_peak_mib,
                "kernels": len(report.kernels),
                **{
                    f"matmul_{kind}": sum(n for (what, p), n in counts.items() if what == "matmul" and p == kind)
                    for kind in ("fp8", "fp16", "fp32")
                },
                "fused_attentions": report.fused_attentions,
                "not_as_asked": len(report.outside),
            }
        )
    return {"stages": result.stage_s, "rows": rows}


def measure(name: str, precision: str, gpu: str, work: Path) -> list[Mapping[str, Any]]:
    """The rows of one build: one for each graph, and one for all graphs."""
    checkpoint, output, facts = work / name, work / f"{name}-{precision}.ilf", work / "facts.json"
    if not (checkpoint / "conditions.npz").is_file():
        make_checkpoint(name, checkpoint)
    arguments = ["--one", name, precision, gpu, str(checkpoint), str(output), str(facts)]
    start_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.speed.full_size_build", *arguments])
    peak_bytes = _watch(process)
    wall_s = time.perf_counter() - start_s
    if process.returncode:
        raise SystemExit(f"{name} {precision} failed with exit code {process.returncode}")
    build = json.loads(facts.read_text())
    rows, stages = build["rows"], build["stages"]
    total = {key: round(sum(row[key] for row in rows), 1) for key in rows[0] if key != "graph"}
    total |= {
        "graph": "all",
        "scratch_mib": max(row["scratch_mib"] for row in rows),
        "builder_peak_mib": max(row["builder_peak_mib"] for row in rows),
    }
    shared = {"model": name, "precision": precision, "gpu": gpu}
    weights = _weights_mib(checkpoint, precision)
    extra = {
        "weights_mib": round(weights, 1),
        "engines_of_weights": round(total["engine_mib"] / weights, 3),
        "calibrate_s": round(stages.get("calibrate", 0), 1),
        "wall_s": round(wall_s, 1),
        "peak_mib": round(peak_bytes / MIB),
    }
    if total["engine_mib"] > 1.05 * weights + SLACK_MIB:
        raise SystemExit(f"{name} {precision}: engines of {total['engine_mib']} MiB for {weights:.0f} MiB of weights")
    shutil.rmtree(output)
    return [{**shared, **row, **dict.fromkeys(extra, "")} for row in rows] + [{**shared, **total, **extra}]


def _weights_mib(checkpoint: Path, precision: str) -> float:
    """MiB of base and feedback block in the precision; the equal copies of an embedder count once."""
    from ilf_trt import load_ilf

    model = load_ilf(checkpoint)
    parameters = [*model.backbone.named_parameters(), *model.feedback.named_parameters()]
    embedders = sum(p.numel() for n, p in parameters if ".norm1.emb." in n and n.startswith(model.adapter.block_path))
    unique = sum(p.numel() for _, p in parameters) - embedders + embedders // len(model.adapter.blocks)
    in_fp8 = 0
    if precision == "fp8":
        linears = (*model.adapter.blocks.named_modules(), *model.feedback.block.named_modules())
        in_fp8 = sum(
            layer.weight.numel()
            for name, layer in linears
            if layer.__class__.__name__ == "Linear" and set(model.adapter.linears) & set(name.split("."))
        )
    return (2 * unique - in_fp8) / MIB


def _watch(process: subprocess.Popen[bytes]) -> int:
    """The largest sum of resident memory over the process and its children, until the process ends."""
    peak_bytes, root = 0, psutil.Process(process.pid)
    while process.poll() is None:
        resident = 0
        try:
            for member in (root, *root.children(recursive=True)):
                resident += member.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak_bytes = max(peak_bytes, resident)
        time.sleep(SAMPLE_S)
    return peak_bytes


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        name, precision, gpu, checkpoint, output, facts = sys.argv[2:]
        Path(facts).write_text(json.dumps(build_one(name, precision, gpu, Path(checkpoint), Path(output))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=["fp16", "fp8"], default=["fp16"])
    parser.add_argument("--gpu", default="sm89")
    parser.add_argument("--work", type=Path, default=Path("build/full-size"), help="folder for checkpoints and bundles")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.speed.full_size_build --gpu {options.gpu}"
    for name in options.models:
        for precision in options.precisions:
            rows = measure(name, precision, options.gpu, options.work)
            print(append_rows("build", command, rows, key=("model", "precision", "gpu")), rows[-1], flush=True)


if __name__ == "__main__":
    main()
