"""A training small enough for a test: a backbone of 4 blocks, 23 pictures in memory, a recipe of 6 iterations."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ilf_trt import ILFModel, attach
from ilf_trt.contract.solver import DEFAULT_SCHEDULER
from ilf_trt.train.batch_stream import Batch, MemoryStream, StreamItem
from ilf_trt.train.checkpoints import Base
from ilf_trt.train.loop import Outcome, RunSetup, train
from ilf_trt.train.recipe import Recipe
from tests.conftest import CLASSES, LOOP, TEXT_CHANNELS, TEXT_TOKENS, small_dit

ROWS, BATCH, ITERATIONS = 23, 8, 6
BASE = Base("nowhere", "0" * 64)
# The same sums of float32 products in another order, through six steps of AdamW at a rate of 1e-3.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
TABLE: dict[str, Any] = {
    "seed": 0,
    "model": {"base": "nowhere", "loop": "1:2"},
    "data": {"kind": "memory"},
    "optimisation": {
        "iterations": ITERATIONS,
        "batch_size": BATCH,
        "lr": 1e-3,
        "scale_lr": 2e-2,
        "weight_decay": 0.01,
        "warm_up": 0,
        "clip": 1.0,
    },
    "loss": {"kind": "fast", "second_pass": "t", "condition_dropout": 0.1},
    "checkpoint": {"every": 2, "keep": 1},
    "logging": {"every": 1},
}


def small_recipe(**sections: Any) -> Recipe:
    """The recipe with some fields of some sections changed."""
    table = {name: dict(value) if isinstance(value, dict) else value for name, value in TABLE.items()}
    for name, change in sections.items():
        table[name] = {**table.get(name, {}), **change} if isinstance(change, dict) else change
    return Recipe.from_table(table)


def dit_rows(size: int = ROWS) -> Batch:
    """Pictures of noise and their labels, the null class among them."""
    generator = torch.Generator().manual_seed(7)
    x0 = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
    return Batch(x0, {"class_labels": torch.arange(size) % (CLASSES + 1)})


def pixart_rows(size: int, *, sized: bool = True) -> Batch:
    """Latents of noise and their texts, with alpha's sizes or without."""
    generator = torch.Generator().manual_seed(8)
    sizes = {"resolution": torch.full((size, 2), 128.0), "aspect_ratio": torch.ones(size, 1)}
    conditions = {
        "text": torch.randn(size, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
        "text_mask": torch.ones(size, TEXT_TOKENS),
        **(sizes if sized else {}),
    }
    return Batch(torch.randn(size, 4, 16, 16, generator=generator), conditions)


def small_stream(recipe: Recipe, rows: Batch | None = None, **options: Any) -> MemoryStream:
    return MemoryStream(
        dit_rows() if rows is None else rows,
        global_batch=recipe.optimisation.batch_size,
        seed=recipe.seed,
        **options,
    )


class Spoilt(MemoryStream):
    """A stream whose row in place 2 holds NaN at one iteration."""

    def __init__(self, recipe: Recipe, iteration: int) -> None:
        super().__init__(dit_rows(), global_batch=recipe.optimisation.batch_size, seed=recipe.seed)
        self.iteration = iteration

    def batches(self, *, start_iteration: int, rank: int, world: int) -> Iterator[StreamItem]:
        for iteration, keys, batch in super().batches(start_iteration=start_iteration, rank=rank, world=world):
            if iteration == self.iteration:
                batch.x0[2] = float("nan")
            yield iteration, keys, batch


def small_setup(folder: Path, **changes: Any) -> RunSetup:
    return RunSetup(**{"folder": folder, "base": BASE, "scheduler": DEFAULT_SCHEDULER, "cpu": True, **changes})


def small_model() -> ILFModel:
    return attach(small_dit(), LOOP)


@dataclass
class TrainingRun:
    """A training after its end: the model, the outcome, and the losses by iteration."""

    model: ILFModel
    outcome: Outcome
    losses: dict[int, float] = field(default_factory=dict)


def run_training(
    folder: Path,
    recipe: Recipe | None = None,
    *,
    model: ILFModel | None = None,
    stream: Any = None,
    stop_after: int | None = None,
    validation: Any = None,
    **setup: Any,
) -> TrainingRun:
    """Train in this process; the run stops after `stop_after` iterations. The recipe must log every iteration."""
    recipe = recipe or small_recipe()
    model = model or small_model()
    iterations: list[int] = []
    calls = count(1)
    outcome = train(
        model,
        recipe,
        stream or small_stream(recipe),
        small_setup(folder, **setup),
        validation=validation,
        progress=lambda what, done, total, *_: iterations.append(done),
        stop=lambda: next(calls) == stop_after,
    )
    losses = {line["iteration"]: line["loss"] for line in log_of(folder)}
    return TrainingRun(model, outcome, {iteration: losses[iteration] for iteration in iterations})


def column(folder: Path, name: str) -> Tensor:
    """One number of every line of the log."""
    return torch.tensor([line[name] for line in log_of(folder)])


def losses_of(losses: dict[int, float]) -> Tensor:
    return torch.tensor(list(losses.values()))


def feedback_of(model: ILFModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.feedback.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit, under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


def assert_same_training(folder: Path, other: Path) -> None:
    """Checkpoints, the model at the end, the best and the log are equal to the bit."""
    assert sorted(p.name for p in (folder / "steps").iterdir()) == sorted(p.name for p in (other / "steps").iterdir())
    for path in (folder, *(folder / "steps").iterdir()):
        twin = other / path.relative_to(folder)
        for name in {p.name for p in (*path.glob("*.safetensors"), *twin.glob("*.safetensors"))}:
            assert equal(load_file(path / name), load_file(twin / name)), (path.name, name)
        if path != folder:
            mine, theirs = (json.loads((one / "state.json").read_text())["standing"] for one in (path, twin))
            assert mine == theirs
    assert (folder / "best").resolve().name == (other / "best").resolve().name
    assert log_of(folder) == log_of(other)
