"""Pictures of the study side by side: a row for each sampler, the same noise and label in a column.

    python -m benchmarks.study.sheet --data cifar10 --trainings build/study/cifar10 --base benchmarks/bases/cifar10 \\
        --names "plain 20" "plain 12" "cache 20" "ILF 10 outer:2 anneal m/n" "ILF 8 all anneal m/n@near"
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.record import RESULTS
from benchmarks.study.quality import Study
from benchmarks.study.samplers import TUNED, samplers

COLUMNS, CLASSES, SEED, LARGER = 16, 10, 1, 2


class Labels:
    """The part of a judge that drawing needs."""

    labels: NDArray[np.int64] = np.arange(COLUMNS) % CLASSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "cifar10"), required=True)
    parser.add_argument("--trainings", type=Path, required=True, help="folder of trainings, by name")
    parser.add_argument("--base", default="demo", help="folder of the base")
    parser.add_argument(
        "--names", nargs="+", required=True, help="samplers in the order of the rows; @TRAINING unless it is `tuned`"
    )
    options = parser.parse_args()
    autocast = None if options.data == "digits" else torch.bfloat16
    study = Study(options.base, Labels(), options.trainings, autocast, "cpu", None, far=False)
    known = {f"{sampler.name}@{sampler.training or TUNED}": sampler for sampler in samplers()}
    rows = []
    for name in options.names:
        with study.drawing(known[name if "@" in name else f"{name}@{TUNED}"]) as draw:
            pictures = np.clip(draw(SEED)[0], -1, 1)
        rows.append(np.concatenate(list(((pictures + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)), axis=1))
    sheet = Image.fromarray(np.concatenate(rows).squeeze())
    size = (sheet.width * LARGER, sheet.height * LARGER)
    path = RESULTS / f"sheet-{options.data}.png"
    sheet.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
