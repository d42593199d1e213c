"""The predicted share of the true noise, and its error: of the base, of its teacher at t/2, and with feedback.

    python -m benchmarks.study.shrinkage --data digits --trainings build/study/digits --names tuned
    python -m benchmarks.study.shrinkage --data cifar10 --trainings build/study/cifar10 --names tuned --pictures FOLDER

A prediction p of the noise e has the share <p, e> / <e, e>. A sampler adds the missing noise to the picture, times
sigma / alpha.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write_rows
from benchmarks.study.arithmetic import arithmetic_on
from benchmarks.study.cifar10 import pictures_of, read
from ilf_trt import ILFModel, load_ilf
from ilf_trt.model.base import base_scheduler
from ilf_trt.model.checkpoint import read_checkpoint
from ilf_trt.model.sampling import scheduler_of
from ilf_trt.train.data.digits import digits
from ilf_trt.train.losses import add_noise

TIMES = (999, 900, 800, 700, 500, 300, 100, 30)
SAMPLES, SEED = 500, 0


def pictures(data: str, folder: Path | None) -> tuple[Tensor, Tensor]:
    """SAMPLES pictures (N, C, H, W) in [-1, 1] and labels (N,): digits, or the test pictures of CIFAR-10."""
    if data == "digits":
        x0, labels = (torch.from_numpy(array) for array in digits())
    else:
        tiles, labels = (torch.from_numpy(array) for array in read(folder or Path(), "test"))
        x0 = pictures_of(tiles)
    stride = len(x0) // SAMPLES
    return x0[::stride][:SAMPLES], labels[::stride][:SAMPLES]


@torch.inference_mode()
def shares(
    model: ILFModel, x0: Tensor, labels: Tensor, alphas_cumprod: Tensor, *, feedback: bool
) -> Iterator[dict[str, Any]]:
    """A row for every time; without feedback, also a row for the target of Fast Approximate Distillation."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
    for t in TIMES:
        passes = ((t, False), (t // 2, True)) if not feedback else ((t, False),)
        for pass_time, teacher in passes:
            time = torch.full((len(x0),), pass_time)
            x_t = add_noise(x0, noise, time, alphas_cumprod)
            predicted = model(x_t, time, class_labels=labels, feedback=feedback).sample[:, : x0.shape[1]]
            share = (predicted * noise).sum() / noise.square().sum()
            yield {
                "what": "feedback" if feedback else "teacher at t/2" if teacher else "base",
                "t": t,
                "sigma_over_alpha": round(((1 - alphas_cumprod[t]) / alphas_cumprod[t]).sqrt().item(), 4),
                "share": round(share.item(), 5),
                "mean_squared_error": round((predicted - noise).square().mean().item(), 6),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "cifar10"), required=True)
    parser.add_argument("--trainings", type=Path, required=True, help="folder of trainings, by name")
    parser.add_argument("--names", nargs="+", required=True, help="trainings to measure")
    parser.add_argument("--pictures", type=Path, help="CIFAR-10: folder of the mosaics")
    options = parser.parse_args()
    x0, labels = pictures(options.data, options.pictures)
    rows: list[dict[str, Any]] = []
    with arithmetic_on("cpu"):
        for name in options.names:
            model = load_ilf(options.trainings / name)
            base = read_checkpoint(options.trainings / name).base
            alphas = scheduler_of(base_scheduler(base)).alphas_cumprod
            if not rows:
                rows += [{"training": "", **row} for row in shares(model, x0, labels, alphas, feedback=False)]
            rows += [{"training": name, **row} for row in shares(model, x0, labels, alphas, feedback=True)]
    print(
        write_rows(
            f"shrinkage-{options.data}", shlex.join(["python", "-m", "benchmarks.study.shrinkage", *sys.argv[1:]]), rows
        )
    )


if __name__ == "__main__":
    main()
