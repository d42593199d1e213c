"""Quality of the served demo in every precision: Fréchet distance to the real digits, and label accuracy.

    python -m benchmarks.study.served_quality [--seeds 3] [--precisions fp8 fp8-attention …]

`fp8` keeps attention in float16, `fp8-attention` has it in FP8 too. Rows of other precisions stay in the CSV.
The runtime draws 1,797 samples under every plan, with the labels of the real digits. The distance is between the
Gaussians of the 64 pixels in [-1, 1]; the classifier is a support vector machine trained on the real digits.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import append_rows
from benchmarks.study.judge import DigitsJudge, rounded
from ilf_trt.assembly.conductor import build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.export.rounding import write_rounded
from ilf_trt.runtime import Pipeline

BATCH = 256
PLAIN_STEPS = (20, 12)
SHOWN = ("frechet", "accuracy")
FP8_ATTENTION = "fp8-attention"
PRECISIONS = (*map(str, Precision), FP8_ATTENTION)


def sample(
    pipeline: Pipeline, plan: StepPlan, labels: NDArray[np.int64], seed: int, guidance_scale: float
) -> NDArray[np.float32]:
    """Latents for all labels."""
    noise = np.random.default_rng(seed).standard_normal((len(labels), *pipeline.manifest.spec.latent), np.float32)
    parts = []
    for begin in range(0, len(labels), BATCH):
        chunk = slice(begin, begin + BATCH)
        result = pipeline.generate(
            class_labels=labels[chunk], latents=noise[chunk], plan=plan, guidance_scale=guidance_scale
        )
        parts.append(result.latents)
    return np.concatenate(parts)


def plans(pipeline: Pipeline) -> dict[str, StepPlan]:
    """The plans of the table by name: plain steps, and the bundle's plan."""
    table = {f"plain {steps}": pipeline.plan(steps, feedback="none") for steps in PLAIN_STEPS}
    own = pipeline.manifest.plan
    return {**table, f"ILF {len(own.steps)} {own.feedback} {own.rule} {own.ratio}": own}


def measure(checkpoint: str, seeds: int, guidance_scale: float, name: str) -> list[Mapping[str, Any]]:
    """A row for every plan and noise seed, in a precision of `PRECISIONS`; bfloat16 runs as rounded float32."""
    precision = Precision.FP8 if name == FP8_ATTENTION else Precision(name)
    judge = DigitsJudge()
    rows: list[Mapping[str, Any]] = []
    guided = guidance_scale != 1
    with tempfile.TemporaryDirectory() as folder:
        built = build(
            checkpoint,
            Path(folder) / "demo.ilf",
            BuildOptions(
                precision=precision,
                batch=BatchRange(1, BATCH, BATCH),
                guidance=guided,
                guidance_scale=guidance_scale,
                calibrator=Calibrator.OWN,
                fp8_attention=name == FP8_ATTENTION if precision is Precision.FP8 else None,
            ),
        )
        path = built.bundle.path
        if precision is Precision.BF16:
            path = write_rounded(path, Path(folder) / "rounded.ilf", built.bundle.manifest)
        with Pipeline.load(path) as pipeline:
            for plan_name, plan in plans(pipeline).items():
                for seed in range(1, seeds + 1):
                    latents = sample(pipeline, plan, judge.labels, seed, guidance_scale)
                    numbers = rounded(judge.judge(latents))
                    row = {
                        "plan": plan_name,
                        "precision": name,
                        "steps": len(plan.steps),
                        "block_forwards": plan.block_forwards,
                        "guidance_scale": guidance_scale,
                        "seed": seed,
                        **{number: numbers[number] for number in SHOWN},
                    }
                    print(row, flush=True)
                    rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 builds without guidance")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--name", default="quality-precision", help="CSV to write under benchmarks/results/")
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.study.served_quality", *sys.argv[1:]])
    for name in options.precisions:
        rows = measure(options.checkpoint, options.seeds, options.guidance_scale, name)
        print(append_rows(options.name, command, rows, key=("plan", "precision", "guidance_scale", "seed")))


if __name__ == "__main__":
    main()
