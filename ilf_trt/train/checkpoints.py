"""The checkpoints of a training: each is whole or absent, the last few and the best stay, and a training resumes.

A checkpoint is a folder `steps/NNNNNNNN`. It is an ILF checkpoint with the optimizer's state in it, safetensors and
JSON only. With a running mean (`optimisation.ema`), the ILF checkpoint holds the mean, and `raw.safetensors` holds the
weights that train.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from ilf_trt.contract.bundle import sha256_of
from ilf_trt.errors import CheckpointError, InvalidRequest, one_line
from ilf_trt.files import remove_folder, sweep_folder, whole_file, whole_folder, whole_link
from ilf_trt.model.checkpoint import FACTS_FILE, WEIGHTS_FILE, load_feedback, read_json_object, save_feedback, save_ilf
from ilf_trt.model.ilf_model import ILFModel

from .recipe import Recipe

log = logging.getLogger(__name__)

SCHEMA = 1
STATE_FILE, OPTIMIZER_FILE, RAW_FILE = "state.json", "optimizer.safetensors", "raw.safetensors"
STEPS_FOLDER, BEST_LINK = "steps", "best"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class TrainingState:
    """The progress of a training, which a checkpoint stores with weights and moments.

    `loss_total` sums over all iterations, the window over those since the last checkpoint. `best` is the lowest metric.
    """

    iteration: int = 0
    loss_total: float = 0.0
    window_sum: float = 0.0
    window_count: int = 0
    best: float | None = None
    best_iteration: int = 0

    @property
    def mean_loss(self) -> float:
        """The mean over all iterations so far."""
        return self.loss_total / max(1, self.iteration)

    def add(self, loss: float) -> None:
        """Count one iteration with its loss."""
        self.iteration += 1
        self.loss_total += loss
        self.window_sum += loss
        self.window_count += 1

    def note_metric(self, value: float) -> None:
        """Note the metric of this iteration, and begin the next window."""
        if self.best is None or value < self.best:
            self.best, self.best_iteration = value, self.iteration
        self.window_sum, self.window_count = 0.0, 0


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model: its folder or hub id, and the sha256 of its weights."""

    source: str
    sha256: str


class Checkpoints:
    """The checkpoints of one training, under `folder`."""

    def __init__(self, folder: Path, recipe: Recipe, base: Base) -> None:
        self.folder, self.recipe, self.base = folder, recipe, base
        self.steps = folder / STEPS_FOLDER

    def save(
        self,
        state: TrainingState,
        model: ILFModel,
        optimizer: Optimizer,
        scaler: dict[str, Any],
        *,
        served_model: ILFModel,
    ) -> Path:
        """Write a checkpoint, then `tidy`. `served_model` is `model` itself, or holds the running mean.

        Raises CheckpointError if the disk refuses; older checkpoints stay whole.
        """
        place = self._place(state.iteration)
        table = {
            "schema": SCHEMA,
            "standing": asdict(state),
            "scaler": scaler,
            "base_sha256": self.base.sha256,
            "recipe": self.recipe.as_json(),
        }
        with _checkpoint_errors(place), whole_folder(place, replace=True, sync=True) as draft:
            facts = {"iteration": state.iteration, "mean_loss": state.mean_loss, **self.recipe.facts()}
            save_ilf(served_model, draft, base=self.base.source, base_sha256=self.base.sha256, training=facts)
            save_file(_optimizer_tensors(optimizer, model), draft / OPTIMIZER_FILE)
            if served_model is not model:
                save_feedback(model, draft / RAW_FILE)
            table["files"] = {path.name: sha256_of(path) for path in sorted(draft.glob("*.safetensors"))}
            (draft / STATE_FILE).write_text(json.dumps(table, indent=2) + "\n")
        self.tidy(state)
        return place

    def iterations(self) -> list[int]:
        """The iterations of all whole checkpoints, ascending."""
        if not self.steps.is_dir():
            return []
        return sorted(int(path.name) for path in self.steps.iterdir() if path.name.isdecimal())

    def resume_point(self, resume: str) -> Path | None:
        """The checkpoint that `--resume` names: `auto` is the last one if any, `none` is none, else a folder.

        Raises InvalidRequest for a folder without a checkpoint, and if later checkpoints would be overwritten.
        """
        iterations = self.iterations()
        if resume == "auto":
            return self._place(iterations[-1]) if iterations else None
        if resume == "none":
            if iterations:
                raise InvalidRequest(
                    f"{self.folder} holds a training up to iteration {iterations[-1]}; pass --resume auto to resume "
                    "it, or another --output"
                )
            return None
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise InvalidRequest(f"--resume {resume}: no {STATE_FILE} in it; give auto, none or a folder under steps/")
        path = path.resolve()
        if iterations and path.name.isdecimal() and iterations[-1] > int(path.name):
            raise InvalidRequest(
                f"{self.folder} holds later checkpoints, up to iteration {iterations[-1]}; pass --resume auto, "
                "or another --output"
            )
        return path

    def load(
        self, path: Path, model: ILFModel, optimizer: Optimizer, *, served_model: ILFModel
    ) -> tuple[TrainingState, dict[str, Any]]:
        """Read a checkpoint into `model`, `served_model` and `optimizer`; return its state and that of the scaler.

        Raises CheckpointError if a file is missing or damaged, or if the recipe or the base differs.
        """
        table = read_json_object(path / STATE_FILE)
        try:
            if table["schema"] != SCHEMA:
                raise CheckpointError(f"{path}: schema {table['schema']}, this version reads {SCHEMA}")
            state, scaler = TrainingState(**table["standing"]), dict(table["scaler"])
            sha256, recipe = str(table["base_sha256"]), Recipe.from_table(table["recipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / STATE_FILE} is damaged ({error}); {_advice(path)}") from error
        for name, mine, theirs in self.recipe.differences(recipe):
            raise CheckpointError(
                f"{path} is of another recipe: {name} is {theirs!r} there and {mine!r} here; set {name} back, "
                "or start again in another --output"
            )
        if sha256 != self.base.sha256:
            raise CheckpointError(
                f"{path} was trained on another base: its weights hash to {sha256[:12]}…, those of "
                f"{self.base.source} to {self.base.sha256[:12]}…; set model.base to the base of that training"
            )
        load_feedback(served_model, path / WEIGHTS_FILE)
        if served_model is not model:
            load_feedback(model, path / RAW_FILE)
        try:
            _load_optimizer(load_file(path / OPTIMIZER_FILE), optimizer, model)
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path / OPTIMIZER_FILE} is damaged ({error}); {_advice(path)}") from error
        _check_files(path, table.get("files"))
        return state, scaler

    def finish(self, state: TrainingState) -> None:
        """Copy the model of the last checkpoint into the folder itself, where `ilf-trt build` reads it."""
        last = self._place(state.iteration)
        for name in (WEIGHTS_FILE, FACTS_FILE):  # the facts last: with them the folder is a checkpoint
            with _checkpoint_errors(self.folder), whole_file(self.folder / name) as draft:
                shutil.copyfile(last / name, draft)

    def tidy(self, state: TrainingState) -> None:
        """Point `best` at the best; remove old checkpoints, and the drafts of killed processes."""
        best = self._place(state.best_iteration)
        with _checkpoint_errors(self.folder):
            if best.is_dir():
                whole_link(self.folder / BEST_LINK, Path(STEPS_FOLDER) / best.name)
            for iteration in self.iterations()[: -self.recipe.checkpoint.keep]:
                if iteration != state.best_iteration:
                    remove_folder(self._place(iteration))
            for folder in (self.steps, self.folder):
                sweep_folder(folder)

    def _place(self, iteration: int) -> Path:
        return self.steps / f"{iteration:08d}"


@contextmanager
def _checkpoint_errors(place: Path) -> Iterator[None]:
    """Turn what the disk refuses into a CheckpointError that names `place`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {place}: {one_line(error)}; make room there, then run the same command with "
            "--resume auto"
        ) from error


def _check_files(path: Path, files: Any) -> None:
    """Raise CheckpointError for a file of weights or moments that is not the one that was written."""
    if not isinstance(files, dict):
        log.warning("%s does not say what its files hold: a damaged one would not be noticed", path / STATE_FILE)
        return
    for name, sha256 in files.items():
        try:
            same = Path(name).name == name and sha256_of(path / name) == sha256
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read ({one_line(error)}); {_advice(path)}") from error
        if not same:
            raise CheckpointError(f"{path / name} is not the file that was written; {_advice(path)}")


def _advice(path: Path) -> str:
    return f"remove {path.name} to resume from the checkpoint before"


def _optimizer_tensors(optimizer: Optimizer, model: ILFModel) -> dict[str, Tensor]:
    """The moments by parameter name: `block.ff.….exp_avg`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.feedback.named_parameters()}
    return {
        f"{names[parameter]}.{moment}": value.detach().cpu().contiguous()
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def _load_optimizer(tensors: dict[str, Tensor], optimizer: Optimizer, model: ILFModel) -> None:
    """Raises KeyError for a moment that is missing, of another shape or not finite."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.feedback.named_parameters()}
    table = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        moments = {moment: tensors[f"{names[parameter]}.{moment}"] for moment in MOMENTS}
        finite = all(bool(torch.isfinite(value).all()) for value in moments.values())
        if moments["exp_avg"].shape != parameter.shape or not finite:
            raise KeyError(f"{names[parameter]} has another shape, or is not finite")
        table["state"][index] = moments
    optimizer.load_state_dict(table)
