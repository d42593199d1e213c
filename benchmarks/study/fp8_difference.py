"""How far the served demo's pictures are from those in float32, in FP16, in FP8, and in FP8 with attention in FP8.

    python -m benchmarks.study.fp8_difference [--seeds 6]

Every picture is drawn from the same noise under the bundle's own plan with guidance. Its difference is the largest over
its pixels, divided by the largest value of all pictures in float32, as a build compares a trajectory.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import write_rows
from ilf_trt.assembly.conductor import build
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.spec import BatchRange, Calibrator, Precision
from ilf_trt.runtime import Pipeline

PICTURES = 8
CLASSES = 10
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": Precision.FP32},
    "fp16": {"precision": Precision.FP16},
    "fp8": {"precision": Precision.FP8, "fp8_attention": False},
    "fp8-attention": {"precision": Precision.FP8, "fp8_attention": True},
}


def draw(options: BuildOptions, seeds: int) -> NDArray[np.float32]:
    """Latents of `PICTURES` pictures a seed."""
    with tempfile.TemporaryDirectory() as folder:
        built = build("demo", Path(folder) / "demo.ilf", options)
        with Pipeline.load(built.bundle.path) as pipeline:
            parts = []
            for seed in range(seeds):
                shape = (PICTURES, *pipeline.manifest.spec.latent)
                noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
                labels = (np.arange(PICTURES) + seed) % CLASSES
                parts.append(pipeline.generate(class_labels=labels, latents=noise).latents)
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    shared = {"batch": BatchRange(1, PICTURES, PICTURES), "calibrator": Calibrator.OWN, "verify": False}
    drawn = {name: draw(BuildOptions(**shared, **facts), options.seeds) for name, facts in VARIANTS.items()}
    reference = drawn.pop("fp32")
    rows = []
    for name, latents in drawn.items():
        differences = np.abs(latents - reference).max(axis=(1, 2, 3)) / np.abs(reference).max()
        rows.append(
            {
                "precision": name,
                "pictures": len(differences),
                "median": round(float(np.median(differences)), 4),
                "p90": round(float(np.quantile(differences, 0.9)), 4),
                "largest": round(float(differences.max()), 4),
                "limit": Precision(name.partition("-")[0]).parity_limit,
            }
        )
    print(write_rows("fp8-difference", f"python -m benchmarks.study.fp8_difference --seeds {options.seeds}", rows))


if __name__ == "__main__":
    main()
