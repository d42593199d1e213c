"""Quality of the demo under every plan: Fréchet distance to the real digits, and the accuracy of a classifier on them.

    python benchmarks/quality.py [--seeds 3]
    python benchmarks/quality.py --name quality-precision --precisions fp32 fp16 bf16 fp8 --plans "plain 20" \\
        "ILF 10 outer:2 anneal m/n"

Every plan draws 1,797 samples, with the labels of the real digits, through the runtime. The distance is between the
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
from record import write_rows
from sklearn.svm import SVC

from ilf_trt.build import BuildOptions, build
from ilf_trt.contract import Batch, Calibrator, Precision
from ilf_trt.demo import digits
from ilf_trt.export.rounding import write_rounded
from ilf_trt.runtime import Pipeline
from ilf_trt.schedule import StepPlan

BATCH = 256
PLAIN_STEPS = (50, 20, 12, 10, 9, 6)
FED = ((10, "outer:2"), (6, "all"))
RULES = (
    ("none", "m/n"),
    ("uniform", "m/n"),
    ("rescale", "m/n"),
    ("rescale", "n/m"),
    ("anneal", "m/n"),
    ("anneal", "n/m"),
)


class Judge:
    """Holds the real digits' statistics and a classifier trained on them."""

    def __init__(self) -> None:
        pixels, self.labels = digits()
        self.real = pixels.reshape(len(pixels), -1).astype(np.float64)
        self.classifier = SVC(gamma=0.05).fit(self.real, self.labels)

    def judge(self, latents: NDArray[np.float32]) -> dict[str, float]:
        """latents (1797, 1, 8, 8) in the order of the real labels -> distance and accuracy."""
        made = np.clip(latents.reshape(len(latents), -1).astype(np.float64), -1, 1)
        return {
            "frechet": frechet(made, self.real),
            "accuracy": float((self.classifier.predict(made) == self.labels).mean()),
        }


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Fréchet distance between the Gaussians of two samples (n, d)."""
    mean = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))  # pixels that are always dark give zeros
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


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
    """Every plan of the table under its name."""
    table = {f"plain {steps}": pipeline.plan(steps, feedback="none") for steps in PLAIN_STEPS}
    for steps, feedback in FED:
        for rule, ratio in RULES:
            name = f"ILF {steps} {feedback} {rule}" + ("" if rule in ("none", "uniform") else f" {ratio}")
            table[name] = pipeline.plan(steps, feedback=feedback, rule=rule, ratio=ratio)
    return table


def measure(
    checkpoint: str, seeds: int, guidance_scale: float, precision: Precision, chosen: list[str] | None
) -> list[Mapping[str, Any]]:
    """A row for every plan and noise seed; bfloat16 runs in float32 that is rounded to it."""
    judge = Judge()
    rows: list[Mapping[str, Any]] = []
    guided = guidance_scale != 1
    with tempfile.TemporaryDirectory() as folder:
        built = build(
            checkpoint,
            Path(folder) / "demo.ilf",
            BuildOptions(
                precision=precision,
                batch=Batch(1, BATCH, BATCH),
                guidance=guided,
                guidance_scale=guidance_scale,
                calibrator=Calibrator.OWN,
            ),
        )
        path = built.bundle.path
        if precision is Precision.BF16:
            path = write_rounded(path, Path(folder) / "rounded.ilf", built.bundle.manifest)
        with Pipeline.load(path) as pipeline:
            for name, plan in plans(pipeline).items():
                if chosen and name not in chosen:
                    continue
                for seed in range(1, seeds + 1):
                    latents = sample(pipeline, plan, judge.labels, seed, guidance_scale)
                    row = {
                        "plan": name,
                        "precision": precision.value,
                        "steps": len(plan.steps),
                        "block_forwards": plan.block_forwards,
                        "guidance_scale": guidance_scale,
                        "seed": seed,
                        **{key: round(value, 4) for key, value in judge.judge(latents).items()},
                    }
                    print(row, flush=True)
                    rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 builds without guidance")
    parser.add_argument("--precisions", nargs="+", type=Precision, default=[Precision.FP32])
    parser.add_argument("--plans", nargs="+", help="names of plans, as they stand in the table; by default all")
    parser.add_argument("--name", default="quality-demo", help="CSV to write under benchmarks/results/")
    options = parser.parse_args()
    command = shlex.join(["benchmarks/quality.py", *sys.argv[1:]])
    rows = [
        row
        for precision in options.precisions
        for row in measure(options.checkpoint, options.seeds, options.guidance_scale, precision, options.plans)
    ]
    print(write_rows(options.name, command, rows))


if __name__ == "__main__":
    main()
