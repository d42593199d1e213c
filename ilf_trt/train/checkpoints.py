"""The checkpoints of a training: each is whole or absent, the last few and the best stay, and a training resumes.

A checkpoint is a folder `steps/NNNNNNNN`. It is an ILF checkpoint with the optimizer's state in it, safetensors and
JSON only. Its `state.json` holds a digest of every file and of itself. With a running mean (`optimisation.ema`), the
ILF checkpoint holds the mean, and `raw.safetensors` holds the weights that train.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from torch.optim import Optimizer

from ilf_trt.contract.bundle import sha256_of
from ilf_trt.contract.document import MOST_BYTES, DocumentError
from ilf_trt.contract.stamp import Sha256, stamped_text
from ilf_trt.errors import CheckpointError, InvalidRequest, one_line, shown, told
from ilf_trt.files import is_file, read_bytes, remove_folder, sweep_folder, whole_file, whole_folder, whole_link
from ilf_trt.model.checkpoint import (
    FACTS_FILE,
    WEIGHTS_FILE,
    load_feedback,
    read_stamped,
    save_feedback,
    save_ilf,
)
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.tensor_file import read_tensors, write_tensors

from .recipe import Recipe

SCHEMA, UNSTAMPED_SCHEMA = 2, 1
STATE_FILE, OPTIMIZER_FILE, RAW_FILE = "state.json", "optimizer.safetensors", "raw.safetensors"
STEPS_FOLDER, BEST_LINK = "steps", "best"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
STEP_NAME = re.compile(r"[0-9]{8,15}")
VALUE_CHARS = 60
logger = logging.getLogger(__name__)

Counted = Annotated[int, msgspec.Meta(ge=0, lt=10**15)]


@dataclass(slots=True)
class TrainingState:
    """The progress of a training, which a checkpoint stores with weights and moments.

    `loss_total` sums over all iterations, the window over those since the last checkpoint. `best` is the lowest metric.
    """

    iteration: Counted = 0
    loss_total: float = 0.0
    window_sum: float = 0.0
    window_count: Counted = 0
    best: float | None = None
    best_iteration: Counted = 0

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
        """Note the metric of this iteration, and begin the next window; NaN and infinity are never the best."""
        if isfinite(value) and (self.best is None or value < self.best):
            self.best, self.best_iteration = value, self.iteration
        self.window_sum, self.window_count = 0.0, 0


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model: its folder or hub id, and the sha256 of its weights."""

    source: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StateFile:
    """The content of `state.json`: `files` are the digests of the other files, which those of schema 1 may lack."""

    schema: int
    standing: TrainingState
    scaler: dict[str, int | float]
    base_sha256: Sha256
    recipe: dict[str, Any]
    files: dict[str, Sha256] | None = None


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
        with _checkpoint_errors(place), whole_folder(place, replace=True, sync=True) as draft:
            facts = {"iteration": state.iteration, "mean_loss": state.mean_loss, **self.recipe.facts()}
            save_ilf(served_model, draft, base=self.base.source, base_sha256=self.base.sha256, training=facts)
            files = {name: sha256_of(draft / name) for name in (FACTS_FILE, WEIGHTS_FILE)}
            files[OPTIMIZER_FILE] = write_tensors(_optimizer_tensors(optimizer, model), draft / OPTIMIZER_FILE)
            if served_model is not model:
                files[RAW_FILE] = save_feedback(model, draft / RAW_FILE)
            table = {
                "schema": SCHEMA,
                "standing": asdict(state),
                "scaler": scaler,
                "base_sha256": self.base.sha256,
                "recipe": self.recipe.as_json(),
                "files": files,
            }
            (draft / STATE_FILE).write_text(stamped_text(table))
        self.tidy(state)
        return place

    def iterations(self) -> list[int]:
        """The iterations of all whole checkpoints, ascending."""
        if not self.steps.is_dir():
            return []
        return sorted(int(path.name) for path in self.steps.iterdir() if STEP_NAME.fullmatch(path.name))

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
        if not is_file(path / STATE_FILE):
            name = shown(resume, VALUE_CHARS)
            raise InvalidRequest(f"--resume {name}: no {STATE_FILE} in it; give auto, none or a folder under steps/")
        path = path.resolve()
        if iterations and STEP_NAME.fullmatch(path.name) and iterations[-1] > int(path.name):
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
        file = _read_state(path)
        try:
            recipe = Recipe.from_table(file.recipe)
        except InvalidRequest as error:
            raise CheckpointError(f"{path / STATE_FILE} is damaged ({error}); {advice_on(path)}") from error
        for name, mine, theirs in self.recipe.differences(recipe):
            raise CheckpointError(
                f"{path} is of another recipe: {name} is {told(theirs)} there and {told(mine)} here; set {name} "
                "back, or start again in another --output"
            )
        if file.base_sha256 != self.base.sha256:
            raise CheckpointError(
                f"{path} was trained on another base: its weights hash to {file.base_sha256[:12]}…, those of "
                f"{self.base.source} to {self.base.sha256[:12]}…; set model.base to the base of that training"
            )
        digests, advice = _digests(path, file, mean=served_model is not model), advice_on(path)
        _check_facts(path, digests[FACTS_FILE])
        load_feedback(served_model, path / WEIGHTS_FILE, sha256=digests[WEIGHTS_FILE], advice=advice)
        if served_model is not model:
            load_feedback(model, path / RAW_FILE, sha256=digests[RAW_FILE], advice=advice)
        _load_optimizer(path, digests[OPTIMIZER_FILE], optimizer, model)
        return file.standing, file.scaler

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
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {place}: {one_line(error)}; make room there, then run the same command with "
            "--resume auto"
        ) from error


def _read_state(path: Path) -> StateFile:
    """What `state.json` of a checkpoint says, checked against its own digest; raises CheckpointError."""
    place = path / STATE_FILE
    try:
        return read_stamped(place, StateFile, schema=SCHEMA, unstamped=UNSTAMPED_SCHEMA)
    except DocumentError as error:
        raise CheckpointError(f"{place} is damaged: it {error.reason}; {advice_on(path)}") from error


def _digests(path: Path, file: StateFile, *, mean: bool) -> dict[str, str | None]:
    """The digest of every file that resuming reads, None for those that schema 1 did not write down."""
    wanted = (FACTS_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, *([RAW_FILE] if mean else []))
    files = file.files or {}
    missing = [name for name in wanted if name not in files]
    if missing and file.schema == SCHEMA:
        raise CheckpointError(f"{path / STATE_FILE} is damaged: it lacks {missing[0]}; {advice_on(path)}")
    if missing:
        logger.warning("%s lacks the digest of %s, so damage may stay unseen", path / STATE_FILE, ", ".join(missing))
    return {name: files.get(name) for name in wanted}


def _check_facts(path: Path, sha256: str | None) -> None:
    """Refuse an `ilf.json` that is not the one that was written; the end of the training copies it."""
    place = path / FACTS_FILE
    try:
        content = read_bytes(place, most=MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read ({one_line(error)}); {advice_on(path)}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{place} is damaged (its sha256 is not {sha256[:12]}…); {advice_on(path)}")


def advice_on(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"remove {path.name} to resume from the checkpoint before"


def _optimizer_tensors(optimizer: Optimizer, model: ILFModel) -> dict[str, Tensor]:
    """The moments by parameter name: `block.ff.….exp_avg`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.feedback.named_parameters()}
    return {
        f"{names[parameter]}.{moment}": value.detach().cpu().contiguous()
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def _load_optimizer(path: Path, sha256: str | None, optimizer: Optimizer, model: ILFModel) -> None:
    """Raises CheckpointError for a file that is damaged, or a moment of another name or shape, or not finite."""
    place = path / OPTIMIZER_FILE
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.feedback.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {
        f"{names[parameter]}.{moment}": () if moment == "step" else tuple(parameter.shape)
        for parameter in parameters
        for moment in MOMENTS
    }
    tensors = read_tensors(place, wanted, sha256=sha256, advice=advice_on(path))
    table = optimizer.state_dict()
    for index, parameter in enumerate(parameters):
        moments = {moment: tensors[f"{names[parameter]}.{moment}"] for moment in MOMENTS}
        if not all(bool(torch.isfinite(value).all()) for value in moments.values()):
            raise CheckpointError(f"{place} holds NaN or infinity in {names[parameter]}; {advice_on(path)}")
        table["state"][index] = moments
    optimizer.load_state_dict(table)
