"""The feedback blocks of the study: each is a packaged recipe with some changes, trained on the same frozen base.

    python -m benchmarks.study.trainings --data digits --output build/study/digits [--only tuned small-lr]
    python -m benchmarks.study.trainings --data cifar10 --output build/study/cifar10 \\
        --base benchmarks/bases/cifar10 --pictures FOLDER
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study.arithmetic import arithmetic_on
from benchmarks.study.cifar10 import pictures_of, read
from ilf_trt.model.base import base_scheduler, base_source, load_backbone
from ilf_trt.model.checkpoint import fingerprint
from ilf_trt.model.surgery import attach
from ilf_trt.train.batch_stream import Batch, BatchStream, MemoryStream
from ilf_trt.train.checkpoints import Base
from ilf_trt.train.data.digits import digits_stream
from ilf_trt.train.loop import RunSetup, train
from ilf_trt.train.recipe import Recipe

SHORTER = 750
INTERVAL = (
    "loss.kind=interval",
    "loss.second_pass=t-i*m/n",
    "loss.reconstruction=0",
    "loss.teacher_steps=4",
)
SHORT = (f"optimisation.iterations={SHORTER}",)
CHANGES: dict[str, Sequence[str]] = {
    "tuned": (),
    "small-lr": (
        "optimisation.iterations=1500",
        "optimisation.lr=1e-4",
        "optimisation.scale_lr=1e-3",
        "optimisation.warm_up=0",
        "optimisation.ema=0",
    ),
    "interval": (*INTERVAL, "optimisation.iterations=1500"),
    "long": (f"checkpoint.every={SHORTER}", "checkpoint.keep=99"),
    "half": (*SHORT, "loss.second_pass=t/2"),
    "none": (*SHORT, "loss.kind=none"),
    "standard": (*SHORT, "loss.kind=standard"),
    "standard-2": (*SHORT, "loss.kind=standard", "loss.teacher_steps=2"),
    "near": (*SHORT, "loss.look_ahead=100"),
    "near-200": (*SHORT, "loss.look_ahead=200"),
    "near-200-long": ("loss.look_ahead=200",),
    "near-2": (*SHORT, "loss.kind=standard", "loss.teacher_steps=2", "loss.look_ahead=100"),
    "quarter": (*SHORT, "loss.distillation=0.25"),
    "distillation": (*SHORT, "loss.reconstruction=0"),
    "begin": (*SHORT, "model.initialisation=begin"),
    "zero": (*SHORT, "model.initialisation=zero"),
    "loop-0-4": (*SHORT, "model.loop=0:4"),
    "loop-7-11": (*SHORT, "model.loop=7:11"),
    "loop-4-6": (*SHORT, "model.loop=4:6"),
    "loop-2-9": (*SHORT, "model.loop=2:9"),
}
"""`tuned` is the unchanged recipe. `small-lr` has a tenth of its learning rate, a fifth of the scales' learning rate,
and no running mean. Trainings that differ in one setting run for SHORTER iterations; compare them with `long` at the
same iteration."""


def stream_of(data: str, pictures: Path | None, recipe: Recipe) -> BatchStream:
    """The digits, or CIFAR-10 in memory with every picture also mirrored."""
    options = {"global_batch": recipe.optimisation.batch_size, "seed": recipe.seed}
    if data == "digits":
        return digits_stream(**options)
    pixels, labels = (torch.from_numpy(array) for array in read(pictures or Path(), "train"))
    x0 = pictures_of(pixels)
    return MemoryStream(Batch(torch.cat([x0, x0.flip(-1)]), {"class_labels": labels.repeat(2)}), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "cifar10"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--set", nargs="+", default=[], help="more changes of every recipe, SECTION.KEY=VALUE")
    parser.add_argument("--base", default="demo", help="folder of the base")
    parser.add_argument("--pictures", type=Path, help="CIFAR-10: folder of the mosaics")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        folder = options.output / name
        if (folder / "ilf.json").is_file():
            continue
        recipe = Recipe.read(
            "demo" if options.data == "digits" else "cifar10", ["logging.samples_every=0", *CHANGES[name], *options.set]
        )
        source = base_source(options.base)
        backbone = load_backbone(source)
        model = attach(backbone, recipe.model.loop, initialisation=recipe.model.initialisation)
        setup = RunSetup(
            folder, Base(source, fingerprint(backbone)), base_scheduler(source), cpu=options.device == "cpu"
        )
        with arithmetic_on(options.device):
            outcome = train(model, recipe, stream_of(options.data, options.pictures, recipe), setup)
        if name != "long":
            shutil.rmtree(folder / "steps")
        print(f"{name}: {outcome.iteration} iterations, mean loss {outcome.mean_loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
