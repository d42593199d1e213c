"""The study: quality over cost of fewer steps, caching and inner loop feedback, on the same frozen base and noise.

    python -m benchmarks.study.quality --data digits --trainings build/study/digits
    python -m benchmarks.study.quality --data cifar10 --trainings build/study/cifar10 --pictures FOLDER \\
        --classifier resnet56-4bfd9763.th --compiled

Every row is one sampler and one seed of noise. The command skips rows that the CSV has for the same weights.
`benchmarks/study/trainings.py` makes the trainings.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import ROOT, append_rows, read_rows
from benchmarks.study.arithmetic import arithmetic_on
from benchmarks.study.judge import CifarJudge, DigitsJudge, Judge, rounded
from benchmarks.study.samplers import Kind, Sampler, plain, samplers, with_guidance
from ilf_trt import load_ilf
from ilf_trt.bench.rivals import CACHED_EVERY, Eager, Run, cached_blocks
from ilf_trt.contract.plan import StepPlan, cached_block_forwards, make_plan
from ilf_trt.contract.spec import Loop
from ilf_trt.errors import MissingDependency
from ilf_trt.model.base import base_scheduler, load_backbone
from ilf_trt.model.checkpoint import WEIGHTS_FILE, fingerprint
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import CompileMode, CompileOptions
from ilf_trt.model.surgery import attach
from ilf_trt.train.losses import autocasting

BASE = ROOT / "benchmarks" / "bases" / "cifar10"
BATCH = 50
LONG, FIRST_SEED = 50, 1  # steps of the reference pictures, and the seed that is compared with them
DISTANCES = ("psnr_db", "feature_distance")
KEY = ("sampler", "training", "seed", "weights")
SHOWN = ("sampler", "training", "seed", "block_forwards", "frechet", "accuracy")


Draw = Callable[[int], tuple[NDArray[np.float32], int]]
"""A seed -> pictures (N, C, H, W) for all labels of the judge, and the block forwards of one picture."""


@dataclass(slots=True)
class Study:
    """One data set: its base, its judge, and the trainings on the base.

    `far` also measures the distance of the first seed's pictures to those of a long run from the same noise.
    """

    base: str
    judge: Judge
    trainings: Path
    autocast: torch.dtype | None
    device: str
    compiled: CompileOptions | None
    far: bool
    _long: dict[float, NDArray[np.float32]] = field(default_factory=dict, init=False)  # by guidance scale
    _weights: dict[str, str] = field(default_factory=dict, init=False)  # by training

    def model(self, training: str) -> ILFModel:
        """The model of a training; without a name, the base with feedback that adds nothing."""
        if training:
            return load_ilf(self.trainings / training)
        return attach(load_backbone(self.base), Loop(3, 7))

    def weights(self, training: str) -> str:
        """A short hash of the weights of a training, or of the base without a name."""
        if training not in self._weights:
            self._weights[training] = self._digest(training)[:12]
        return self._weights[training]

    def _digest(self, training: str) -> str:
        if not training:
            return fingerprint(load_backbone(self.base))
        with (self.trainings / training / WEIGHTS_FILE).open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    @contextmanager
    def drawing(self, sampler: Sampler) -> Iterator[Draw]:
        """A sampler with its model loaded, for any number of seeds; compiled if the study compiles."""
        model = self.model(sampler.training)
        if sampler.noise_over != 1:
            _divide_noise(model, sampler.noise_over)
        scheduler = {**base_scheduler(self.base), "solver_order": sampler.order}
        plan = make_plan(
            scheduler,
            sampler.steps,
            blocks=len(model.adapter.blocks),
            loop=model.loop,
            feedback=sampler.feedback,
            rule=sampler.rule,
            ratio=sampler.ratio,
        )
        labels = torch.from_numpy(self.judge.labels)
        shape = (len(labels), *model.adapter.latent)
        scale = sampler.guidance_scale
        eager = Eager(model, scheduler, scale, self.device, torch.float32, guidance=scale != 1)
        with self._run(eager, sampler, plan) as (run, cost):

            def draw(seed: int) -> tuple[NDArray[np.float32], int]:
                noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
                parts = []
                with arithmetic_on(self.device), autocasting(self.device, self.autocast):
                    for begin in range(0, len(labels), BATCH):
                        rows = slice(begin, begin + BATCH)
                        parts.append(run({"class_labels": labels[rows]}, noise[rows]).float().cpu().numpy())
                return np.concatenate(parts), cost()

            yield draw

    def measure(self, sampler: Sampler, draw: Draw, seed: int) -> dict[str, Any]:
        """One row of the table."""
        pictures, cost = draw(seed)
        distances: dict[str, float] = {}
        if seed == FIRST_SEED and self.far:
            if sampler == with_guidance(plain(LONG), sampler.guidance_scale):
                self._long[sampler.guidance_scale] = pictures
            distances = self.judge.distances(pictures, self._long_run(sampler.guidance_scale))
        return {
            "part": sampler.part,
            "sampler": sampler.name,
            "training": sampler.training,
            "weights": self.weights(sampler.training),
            "steps": sampler.steps,
            "block_forwards": cost,
            "seed": seed,
            "samples": len(pictures),
            "precision_of_products": "bf16" if self.autocast else "fp32",
            **rounded(self.judge.judge(pictures)),
            **{name: round(distances[name], 4) if name in distances else "" for name in DISTANCES},
        }

    def _long_run(self, guidance_scale: float) -> NDArray[np.float32]:
        if guidance_scale not in self._long:
            with self.drawing(with_guidance(plain(LONG), guidance_scale)) as draw:
                self._long[guidance_scale] = draw(FIRST_SEED)[0]
        return self._long[guidance_scale]

    @contextmanager
    def _run(self, eager: Eager, sampler: Sampler, plan: StepPlan) -> Iterator[tuple[Run, Any]]:
        if sampler.kind is Kind.CACHE_DIT:
            with eager.cache_dit(plan) as (run, block_forwards):
                yield run, block_forwards
        elif sampler.kind is Kind.CACHED:
            costs = cached_block_forwards(
                plan.blocks, len(plan.steps), cached=cached_blocks(plan.blocks), every=CACHED_EVERY
            )
            with eager.cached(plan) as run:
                yield run, lambda: sum(costs)
        else:
            with eager.ilf(plan, compiled=self.compiled) as run:
                yield run, lambda: plan.block_forwards


@torch.no_grad()
def _divide_noise(model: ILFModel, over: float) -> None:
    """Divide the output of the last layer, which is linear."""
    for parameter in cast(Any, model.backbone).proj_out_2.parameters():
        parameter.div_(over)


def study_of(options: argparse.Namespace) -> Study:
    """The study of the options; CIFAR-10 needs its pictures, its base and the classifier."""
    compiled = CompileOptions(CompileMode.DEFAULT) if options.compiled else None
    how = (options.device, compiled, not options.near)
    if options.data == "digits":
        return Study("demo", DigitsJudge(options.rounds), options.trainings, None, *how)
    judge = CifarJudge(options.pictures, options.classifier, options.samples)
    return Study(str(options.base), judge, options.trainings, torch.bfloat16, *how)


def recorded_keys(name: str) -> set[tuple[str, ...]]:
    """The keys of the rows in the CSV."""
    return {tuple(row[key] for key in KEY) for row in read_rows(name)}


def run(study: Study, subset: list[Sampler], seeds: list[int], name: str, command: str) -> None:
    """Measure every sampler with every seed."""
    old_keys = recorded_keys(name)
    for sampler in subset:
        weights = study.weights(sampler.training)
        new_seeds = [seed for seed in seeds if (sampler.name, sampler.training, str(seed), weights) not in old_keys]
        if not new_seeds:
            continue
        try:
            with study.drawing(sampler) as draw:
                for seed in new_seeds:
                    row: Mapping[str, Any] = study.measure(sampler, draw, seed)
                    append_rows(name, command, [row], key=KEY)
                    print({key: row[key] for key in SHOWN}, flush=True)
        except MissingDependency as error:
            print(f"skipped {sampler.name}: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "cifar10"), required=True)
    parser.add_argument("--trainings", type=Path, required=True, help="folder of trainings, by name")
    parser.add_argument("--parts", nargs="+", help="parts of the study; by default all")
    parser.add_argument("--names", nargs="+", help="samplers by name; by default all of the parts")
    parser.add_argument("--only", nargs="+", help="samplers with the feedback of these trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="digits: samples for each real digit; more than one goes to a separate table",
    )
    parser.add_argument("--table", help="name of the table; by default that of the data")
    parser.add_argument("--samples", type=int, default=2000, help="CIFAR-10: samples of a row")
    parser.add_argument("--base", type=Path, default=BASE, help="CIFAR-10: folder of the base")
    parser.add_argument("--pictures", type=Path, help="CIFAR-10: folder of the mosaics")
    parser.add_argument("--classifier", type=Path, help="CIFAR-10: file of the ResNet's weights")
    parser.add_argument("--near", action="store_true", help="skip the distances to long runs, which take longest")
    parser.add_argument("--compiled", action="store_true", help="use torch.compile, except for the caches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = study_of(options)
    subset = [
        sampler
        for sampler in samplers()
        if (not options.parts or sampler.part in options.parts)
        and (not options.names or sampler.name in options.names)
        and (not options.only or sampler.training in options.only)
        and (not sampler.training or (options.trainings / sampler.training / WEIGHTS_FILE).is_file())
    ]
    suffix = f"-{options.rounds}-rounds" if options.data == "digits" and options.rounds > 1 else ""
    run(
        study,
        subset,
        options.seeds,
        f"quality-{options.table or options.data + suffix}",
        shlex.join(["python", "-m", "benchmarks.study.quality", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    main()
