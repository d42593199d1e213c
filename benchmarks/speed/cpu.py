"""Latency on a CPU, as ratios in one run: eager PyTorch, ONNX Runtime with one graph a step, ilf-trt plain and ILF.

    python -m benchmarks.speed.cpu [--within 0.02] [--max-seconds 120]

`ilf-trt bench` measures two models, each in its own run: the demo, and a random DiT of 12 blocks, width 384 and 256
tokens. This command builds their bundles, adds the quality of the demo, and writes the results as rows of a CSV.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from benchmarks.record import append_rows
from benchmarks.study.judge import DigitsJudge
from benchmarks.study.served_quality import BATCH, SHOWN, sample
from ilf_trt import attach, save_ilf
from ilf_trt.assembly.conductor import build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.bench.conductor import Conductor
from ilf_trt.bench.observation import Observation
from ilf_trt.bench.options import DEFAULT_MAX_S, DEFAULT_STEPS, DEFAULT_WITHIN, BenchOptions
from ilf_trt.bench.result import Result, RowResult
from ilf_trt.bench.row import Rival
from ilf_trt.bench.statistics import ratio_interval
from ilf_trt.contract.spec import BatchRange
from ilf_trt.errors import BenchmarkFailed
from ilf_trt.runtime import Pipeline

ONE = BatchRange(1, 1, 1)
LOOP = (3, 7)
GUIDANCE_SCALE = 4.0
ILF_STEPS, FEEDBACK, EQUAL_STEPS = 10, "outer:2", 12
ONE_GRAPH = Rival.ONE_GRAPH.value
NAMES = {
    "eager": "eager diffusers",
    "eager-equal": "eager diffusers at equal cost",
    "eager-ilf": "eager ILF",
    "onnx": "ONNX Runtime, diffusers' own graph",
    ONE_GRAPH: "ONNX Runtime, one graph",
    "plain": "ilf-trt plain",
    "equal": "ilf-trt plain at equal cost",
    "ilf": "ilf-trt ILF",
}
"""Names in the CSV of the rows of `ilf-trt bench`."""
PROCESSES, GENERATIONS = 7, 35
IMPORTS = "import time; t = time.perf_counter(); import ilf_trt.runtime; print(time.perf_counter() - t)"
SERVING = (
    "import sys; from ilf_trt.process_memory import peak_mib; from ilf_trt.runtime import Pipeline; "
    "p = Pipeline.load(sys.argv[1]); p.generate(class_labels=[3]); "
    "print(peak_mib())"
)

Cost = tuple[int, int]
"""Steps and block forwards of a plan."""
Quality = Mapping[Cost, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Model:
    """A measured model: its bundle for one picture with guidance, and the class of that picture."""

    name: str
    checkpoint: str
    bundle: Path
    label: int

    @classmethod
    def built(cls, name: str, checkpoint: str, folder: Path, label: int) -> "Model":
        """Build the bundle into `folder`."""
        options = BuildOptions(batch=ONE, guidance_scale=GUIDANCE_SCALE)
        return cls(name, checkpoint, build(checkpoint, folder / f"{name}.ilf", options).bundle.path, label)


def measure(model: Model, command: str, within: float, max_s: float) -> tuple[Result, list[Observation]]:
    """The result of a benchmark and its samples. Raises BenchmarkFailed if a row gave nothing."""
    options = BenchOptions(
        bundle=model.bundle,
        checkpoint=model.checkpoint,
        against=(Rival.EAGER, Rival.ONNX, Rival.ONE_GRAPH),
        ilf_steps=ILF_STEPS,
        feedback=FEEDBACK,
        labels=(model.label,),
        within=within,
        max_s=max_s,
    )
    samples: list[Observation] = []
    return Conductor(options, command, write=samples.append).run(), samples


def latency_rows(name: str, result: Result, samples: Sequence[Observation], quality: Quality) -> list[dict[str, Any]]:
    """The rows of model `name` for the CSV, from a result against eager PyTorch and one graph a step.

    `faster_low` and `faster_high` are the bounds of the median ratio, `faster_min` and `faster_max` the least and the
    most of all turns. Raises BenchmarkFailed if a row gave nothing.
    """
    failed = [row for row in result.rows if row.failed or row.host is None]
    if failed:
        raise BenchmarkFailed(f"{name}: {failed[0].title} gave no times: {failed[0].failed or 'no turn ended'}")
    times_ms = {row.slug: _times_ms(row, samples) for row in result.rows}
    base, one_graph = times_ms[result.base_line], times_ms[ONE_GRAPH]
    rows = []
    for row in result.rows:
        assert row.host is not None
        own, agreement = times_ms[row.slug], row.agreement
        faster, each = ratio_interval(base, own), [first / second for first, second in zip(base, own, strict=True)]
        known = quality.get((row.steps, row.block_forwards), {})
        relative = None if agreement is None else agreement.own_plan_relative
        rows.append(
            {
                "model": name,
                "row": NAMES[row.slug],
                "steps": row.steps,
                "block_forwards": row.block_forwards,
                "batch": row.batch,
                "warm_ups": row.warm_ups,
                "n": row.host.n,
                "median_ms": round(row.host.p50_ms, 2),
                "min_ms": round(row.host.least_ms, 2),
                "max_ms": round(row.host.most_ms, 2),
                "faster_than_eager_20": round(faster.median, 3),
                "faster_min": round(min(each), 3),
                "faster_max": round(max(each), 3),
                "faster_low": round(faster.low, 3),
                "faster_high": round(faster.high, 3),
                "cost_against_one_graph": round(ratio_interval(own, one_graph).median, 4),
                "relative_difference": "" if relative is None else f"{relative:.1e}",
                "frechet": known.get("frechet", ""),
                "accuracy": known.get("accuracy", ""),
                "noise": "; ".join(result.noise.reasons),
            }
        )
    return rows


def _times_ms(row: RowResult, samples: Sequence[Observation]) -> list[float]:
    """The times of a row that count, turn by turn."""
    times = {one.turn: one.best_ms for one in samples if (one.row, one.batch) == (row.slug, row.batch) and one.counts}
    return [times[turn] for turn in sorted(times)]


DEMO, MIDDLE = "demo", "dit-12x384"
LABELS = {DEMO: 3, MIDDLE: 207}
"""The models by name, with the class of the picture."""


def demo_quality(folder: Path) -> Quality:
    """Distance and accuracy of the demo under the timed plans, for one noise seed and without guidance."""
    judge = DigitsJudge()
    built = build("demo", folder / "quality.ilf", BuildOptions(batch=BatchRange(1, BATCH, BATCH), guidance=False))
    with Pipeline.load(built.bundle.path) as pipeline:
        plans = [
            pipeline.plan(DEFAULT_STEPS, feedback="none"),
            pipeline.plan(EQUAL_STEPS, feedback="none"),
            pipeline.plan(ILF_STEPS, feedback=FEEDBACK),
        ]
        return {
            (len(plan.steps), plan.block_forwards): {
                key: round(value, 4)
                for key, value in judge.judge(sample(pipeline, plan, judge.labels, 1, 1.0)).items()
                if key in SHOWN
            }
            for plan in plans
        }


def middle_checkpoint(folder: Path) -> str:
    """A checkpoint of a random DiT of 12 blocks, width 384 and 256 tokens, with feedback scales of 0.05."""
    torch.manual_seed(0)
    backbone = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
    )
    model = attach(backbone, LOOP)
    with torch.no_grad():
        model.feedback.scales.fill_(0.05)
    save_ilf(model, folder / "middle")
    return str(folder / "middle")


def overhead_us(model: Model) -> float:
    """The median Python time of a step, without its engines."""
    with Pipeline.load(model.bundle) as pipeline:
        plan = pipeline.plan(ILF_STEPS, feedback=FEEDBACK)
        results = [pipeline.generate(class_labels=[model.label], plan=plan, seed=0) for _ in range(1 + GENERATIONS)]
    return float(np.median([result.timings.overhead_us_per_step for result in results[1:]]))


def process_facts(bundle: Path) -> dict[str, float]:
    """Import time and peak memory of a process that serves one picture and measures nothing."""

    def run(code: str, *arguments: str) -> float:
        process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return float(json.loads(process.stdout))

    return {
        "import_s": round(float(np.median([run(IMPORTS) for _ in range(PROCESSES)])), 3),
        "serving_peak_mib": round(float(np.median([run(SERVING, str(bundle)) for _ in range(3)])), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--within", type=float, default=DEFAULT_WITHIN, help="measure until ratios are known to ± this")
    parser.add_argument("--max-seconds", type=float, default=DEFAULT_MAX_S, help="most seconds of the turns of a model")
    parser.add_argument("--models", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--process-only", action="store_true", help="import time, memory and overhead, no latency")
    options = parser.parse_args()
    command = f"python -m benchmarks.speed.cpu --within {options.within:g} --max-seconds {options.max_seconds:g}"
    command += f" --models {' '.join(options.models)}" + " --process-only" * options.process_only
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = {DEMO: lambda: "demo", MIDDLE: lambda: middle_checkpoint(folder)}
        models = [Model.built(name, makers[name](), folder, LABELS[name]) for name in options.models]
        if not options.process_only:
            rows = []
            for model in models:
                result, samples = measure(model, command, options.within, options.max_seconds)
                rows += latency_rows(model.name, result, samples, demo_quality(folder) if model.name == DEMO else {})
            for row in rows:
                print(row)
            print(append_rows("cpu-latency", command, rows, key=("device", "model", "row")))
        facts = [
            {"model": model.name, "overhead_us_per_step": round(overhead_us(model), 1)} | process_facts(model.bundle)
            for model in models
        ]
        for fact in facts:
            print(fact)
        print(append_rows("cpu-process", command, facts, key=("device", "model")))


if __name__ == "__main__":
    main()
