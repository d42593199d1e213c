"""The state of a training: checkpoints written whole or not at all, the last few and the best, and going on from one.

Each is a folder `steps/NNNNNNNN` and itself an ILF checkpoint, with the optimizer beside: safetensors and JSON only.
Where a running mean is served, that is what the ILF checkpoint holds, and the weights that train lie beside as well.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.model.checkpoint import FACTS_FILE, WEIGHTS_FILE, load_feedback, read_json_object, save_feedback, save_ilf
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.train.recipe import Recipe

SCHEMA = 1
STATE_FILE, OPTIMIZER_FILE, RAW_FILE = "state.json", "optimizer.safetensors", "raw.safetensors"
STEPS_FOLDER, BEST_LINK, PARTIAL = "steps", "best", ".partial-"


@dataclass(slots=True)
class Standing:
    """Where a training stands: what it needs beside weights and moments; the window is since the last checkpoint."""

    iteration: int = 0
    loss_total: float = 0.0
    window_sum: float = 0.0
    window_count: int = 0
    best: float | None = None
    best_iteration: int = 0

    @property
    def mean_loss(self) -> float:
        """Over all iterations so far."""
        return self.loss_total / max(1, self.iteration)

    def add(self, loss: float) -> None:
        self.iteration += 1
        self.loss_total += loss
        self.window_sum += loss
        self.window_count += 1

    def judge(self, value: float) -> None:
        """Take `value` of the metric at this iteration, and begin the next window."""
        if self.best is None or value < self.best:
            self.best, self.best_iteration = value, self.iteration
        self.window_sum, self.window_count = 0.0, 0


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model: where it is found again, and its fingerprint."""

    source: str
    sha256: str


class States:
    """The checkpoints of one training under a folder."""

    def __init__(self, folder: Path, recipe: Recipe, base: Base) -> None:
        self.folder, self.recipe, self.base = folder, recipe, base
        self.steps = folder / STEPS_FOLDER

    def save(
        self, standing: Standing, model: ILFModel, optimizer: Optimizer, scaler: dict[str, Any], *, served: ILFModel
    ) -> Path:
        """Write a checkpoint, point `best` at the best, remove what is neither it nor one of the last few.

        Raises CheckpointError when it cannot be written; what was there before is whole.
        """
        place = self.steps / f"{standing.iteration:08d}"
        state = {
            "schema": SCHEMA,
            "standing": asdict(standing),
            "scaler": scaler,
            "base_sha256": self.base.sha256,
            "recipe": self.recipe.as_json(),
        }
        with written_whole(place) as draft:
            facts = {"iteration": standing.iteration, "mean_loss": standing.mean_loss, **self.recipe.facts()}
            save_ilf(served, draft, base=self.base.source, base_sha256=self.base.sha256, training=facts)
            save_file(_flat(optimizer, model), draft / OPTIMIZER_FILE)
            if served is not model:
                save_feedback(model, draft / RAW_FILE)
            (draft / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        self.tidy(standing)
        return place

    def numbers(self) -> list[int]:
        """The iterations of whole checkpoints, ascending."""
        if not self.steps.is_dir():
            return []
        return sorted(int(path.name) for path in self.steps.iterdir() if path.name.isdecimal())

    def chosen(self, resume: str) -> Path | None:
        """The checkpoint to go on from: `auto` the last if any, `none`, or a path; raises InvalidRequest."""
        there = self.numbers()
        if resume == "auto":
            return self.steps / f"{there[-1]:08d}" if there else None
        if resume == "none":
            if there:
                raise InvalidRequest(
                    f"{self.folder} holds a training up to iteration {there[-1]}; pass --resume auto to go on, "
                    "or another --output"
                )
            return None
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise InvalidRequest(f"--resume {resume}: no {STATE_FILE} in it; give auto, none or a folder under steps/")
        path = path.resolve()
        if there and path.name.isdecimal() and there[-1] > int(path.name):
            raise InvalidRequest(
                f"{self.folder} holds later checkpoints, up to iteration {there[-1]}; pass --resume auto, "
                "or another --output"
            )
        return path

    def load(
        self, path: Path, model: ILFModel, optimizer: Optimizer, *, served: ILFModel
    ) -> tuple[Standing, dict[str, Any]]:
        """Read a checkpoint into `model`, `served` and `optimizer`; its standing and the scaler's state.

        Raises CheckpointError when a file is missing or damaged, or it is of another recipe or base, naming the field.
        """
        state = read_json_object(path / STATE_FILE)
        try:
            if state["schema"] != SCHEMA:
                raise CheckpointError(f"{path}: schema {state['schema']}, this version reads {SCHEMA}")
            standing, scaler = Standing(**state["standing"]), dict(state["scaler"])
            sha256, recipe = str(state["base_sha256"]), Recipe.from_table(state["recipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / STATE_FILE} is damaged ({error}); {_back(path)}") from error
        for name, mine, theirs in self.recipe.differences(recipe):
            raise CheckpointError(
                f"{path} is of another recipe: {name} is {theirs!r} there and {mine!r} here; set it back, "
                "or start anew in another --output"
            )
        if sha256 != self.base.sha256:
            raise CheckpointError(
                f"{path} was trained on another base: its weights hash to {sha256[:12]}…, those of "
                f"{self.base.source} to {self.base.sha256[:12]}…; set model.base to the one it was trained on"
            )
        load_feedback(served, path / WEIGHTS_FILE)
        if served is not model:
            load_feedback(model, path / RAW_FILE)
        try:
            _unflat(load_file(path / OPTIMIZER_FILE), optimizer, model)
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path / OPTIMIZER_FILE} is damaged ({error}); {_back(path)}") from error
        return standing, scaler

    def finish(self, standing: Standing) -> None:
        """Put the last checkpoint's model into the folder itself, where `ilf-trt build` takes it."""
        last = self.steps / f"{standing.iteration:08d}"
        for name in (WEIGHTS_FILE, FACTS_FILE):  # the facts last: with them it is a checkpoint
            part = self.folder / f".{name}{PARTIAL}{os.getpid()}"
            with _translated(self.folder):
                shutil.copyfile(last / name, part)
                _sync(part)
                part.replace(self.folder / name)

    def tidy(self, standing: Standing) -> None:
        """Point `best` at the best and remove what is not kept, and what a process that died left half-written."""
        numbers = self.numbers()
        best = self.steps / f"{standing.best_iteration:08d}"
        with _translated(self.folder):
            if best.is_dir():
                link = self.folder / f".{BEST_LINK}{PARTIAL}{os.getpid()}"
                link.unlink(missing_ok=True)
                link.symlink_to(Path(STEPS_FOLDER) / best.name)
                link.replace(self.folder / BEST_LINK)
            for number in numbers[: -self.recipe.checkpoint.keep]:
                if number != standing.best_iteration:
                    remove(self.steps / f"{number:08d}")
            for stale in (*self.steps.glob(f".*{PARTIAL}*"), *self.folder.glob(f".*{PARTIAL}*")):
                whole = stale.is_dir() and not stale.is_symlink()
                shutil.rmtree(stale, ignore_errors=True) if whole else stale.unlink(missing_ok=True)


@contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place` that takes its name once all of it is on the disk; raises CheckpointError."""
    draft = place.parent / f".{place.name}{PARTIAL}{uuid4().hex[:8]}"
    try:
        with _translated(place):
            draft.mkdir(parents=True)
            yield draft
            for path in draft.iterdir():
                _sync(path)
            _sync(draft)
            remove(place)
            draft.rename(place)
            _sync(place.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint: out of sight first, so that no half of it is ever taken for a whole."""
    if folder.is_dir():
        hidden = folder.parent / f".{folder.name}{PARTIAL}{uuid4().hex[:8]}"
        folder.rename(hidden)
        shutil.rmtree(hidden)


@contextmanager
def _translated(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CheckpointError(
            f"cannot write checkpoint {place}: {reason}; make room there, then run the same command with --resume auto"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _back(path: Path) -> str:
    return f"remove {path.name} to go on from the one before"


def _flat(optimizer: Optimizer, model: ILFModel) -> dict[str, Tensor]:
    """The moments by parameter name: `block.ff.….exp_avg`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.feedback.named_parameters()}
    return {
        f"{names[parameter]}.{moment}": value.detach().cpu().contiguous()
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def _unflat(flat: dict[str, Tensor], optimizer: Optimizer, model: ILFModel) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.feedback.named_parameters()}
    table = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(order):
        moments = ("step", "exp_avg", "exp_avg_sq")
        found = {moment: flat[f"{names[parameter]}.{moment}"] for moment in moments}
        if found["exp_avg"].shape != parameter.shape or not all(bool(torch.isfinite(x).all()) for x in found.values()):
            raise KeyError(f"{names[parameter]} has another shape, or is not finite")
        table["state"][index] = found
    optimizer.load_state_dict(table)
