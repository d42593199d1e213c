"""The training of a small base: one loop, a running mean of the weights, and a saved state to resume from.

The caller provides the data and the loss.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LEARNING_RATE = 1e-3
LOGGED_EVERY = 50
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Course:
    """Length and learning rate of a training: the rate warms up, stays, and falls over the last third.

    `mean_half_life` is the half-life of the weights' running mean, in iterations.
    """

    iterations: int
    warm_up: int
    mean_half_life: int
    save_every: int

    def rate(self, iteration: int) -> float:
        """The factor of the learning rate at an iteration, at most 1."""
        return min(1.0, iteration / self.warm_up, 3 * (1 - iteration / (self.iterations + 1)))


def train_base(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    output: Path,
    course: Course,
    write: Callable[[dict[str, Tensor]], None],
) -> None:
    """Train `model` by the loss of every iteration; every save calls `write` with the mean of its weights."""
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    first = _restore(output, model, mean, optimizer) + 1
    output.mkdir(parents=True, exist_ok=True)
    start_s, total = time.perf_counter(), 0.0
    for iteration in range(first, course.iterations + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * course.rate(iteration)
        loss = loss_of(iteration)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = min(0.5 ** (1 / course.mean_half_life), iteration / (iteration + 10))
        for name, value in model.state_dict().items():
            mean[name].lerp_(value, 1 - share)
        total += loss.item()
        if iteration % LOGGED_EVERY == 0:
            seconds = round(time.perf_counter() - start_s, 1)
            row = {"iteration": iteration, "loss": total / LOGGED_EVERY, "seconds": seconds}
            with (output / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            total = 0.0
        if iteration % course.save_every == 0 or iteration == course.iterations:
            write(mean)
            _save(output, model, mean, optimizer, iteration)


def _save(
    output: Path, model: nn.Module, mean: dict[str, Tensor], optimizer: torch.optim.Optimizer, iteration: int
) -> None:
    moments = {
        f"{kind}.{index}": values[kind] for index, values in optimizer.state_dict()["state"].items() for kind in MOMENTS
    }
    weights = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}  # T5 ties two of its own
    means = {f"mean.{name}": value for name, value in mean.items()}
    save_file({**moments, **weights, **means}, output / "state.partial")
    (output / "state.partial").replace(output / "state.safetensors")
    (output / "state.json").write_text(json.dumps({"iteration": iteration}))


def _restore(output: Path, model: nn.Module, mean: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Load the state in `output`, in place, and return its iteration; 0 without a state."""
    if not (output / "state.safetensors").exists():
        return 0
    saved = load_file(output / "state.safetensors")
    model.load_state_dict({name[6:]: value for name, value in saved.items() if name.startswith("model.")})
    mean.update({name[5:]: value for name, value in saved.items() if name.startswith("mean.")})
    table = optimizer.state_dict()
    for index in table["param_groups"][0]["params"]:
        if f"step.{index}" in saved:
            table["state"][index] = {kind: saved[f"{kind}.{index}"] for kind in MOMENTS}
    optimizer.load_state_dict(table)
    return int(json.loads((output / "state.json").read_text())["iteration"])
