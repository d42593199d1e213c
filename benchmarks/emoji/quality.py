"""Quality of the text-to-image demo under plans of equal and unequal cost, against the real emoji.

    python -m benchmarks.emoji.quality --pictures FOLDER

`benchmarks/emoji/data.py` describes FOLDER. The prompt of a picture is the name of an emoji, once for each seed.
`frechet` is the distance between Gaussians of the pictures, reduced to 8x8 pixels. `own` is the share of pictures whose
nearest real emoji is the requested one; `near` is the share with the requested one among the five nearest.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.emoji.data import SIDE, read
from benchmarks.record import ROOT, append_rows
from benchmarks.study.judge import Gaussian
from ilf_trt.assembly.packaged_bundle import bundle_of
from ilf_trt.runtime import Pipeline

FEATURES = 8  # pixels to a side
NEAREST = 5
PLANS = (("plain 20", 20, "none"), ("plain 12", 12, "none"), ("plain 9", 9, "none"))
FEEDBACK_PLANS = (("ILF 10 outer:2", 10, "outer:2"), ("ILF 7 outer:2", 7, "outer:2"))


def features(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """pixels (N, 32, 32, 3) -> (N, 192) in [-1, 1], each the mean of 4x4 pixels."""
    block = SIDE // FEATURES
    small = pixels.reshape(-1, FEATURES, block, FEATURES, block, 3).mean((2, 4)) / 127.5 - 1
    return small.reshape(len(pixels), -1)


def ranks(pictures: NDArray[np.float64], real: NDArray[np.float64]) -> NDArray[np.int64]:
    """For every picture, the number of real emoji that are nearer to it than the requested one."""
    distance = ((pictures[:, None] - real[None]) ** 2).sum(-1)
    return (distance < np.diagonal(distance)[:, None]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--guidance-scale", type=float, default=None)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "cache", help="folder of the bundles")
    options = parser.parse_args()
    pixels, emoji = read(options.pictures)
    real, names = features(pixels), [one.name for one in emoji]
    command = shlex.join(["python", "-m", "benchmarks.emoji.quality", *sys.argv[1:]])
    with Pipeline.load(bundle_of("demo-emoji", options.cache), threads=1) as pipeline:
        scale = pipeline.manifest.guidance_scale if options.guidance_scale is None else options.guidance_scale
        for seed in options.seeds:
            for name, steps, feedback in (*PLANS, *FEEDBACK_PLANS):
                plan = pipeline.plan(steps, feedback=feedback)
                result = pipeline.generate(names, seed=seed, plan=plan, guidance_scale=scale)
                pictures = features(result.pixels)
                rank = ranks(pictures, real)
                row: dict[str, Any] = {
                    "sampler": name,
                    "block_forwards": plan.block_forwards,
                    "guidance_scale": scale,
                    "seed": seed,
                    "samples": len(pictures),
                    "frechet": round(Gaussian.of(pictures).distance(Gaussian.of(real)), 4),
                    "own": round(float((rank == 0).mean()), 4),
                    "near": round(float((rank < NEAREST).mean()), 4),
                }
                print(row, flush=True)
                append_rows("quality-emoji", command, [row], key=("sampler", "guidance_scale", "seed"))


if __name__ == "__main__":
    main()
