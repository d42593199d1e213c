"""The training loop: trains F and s on a frozen backbone, on one device or many, and resumes to the bit."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ilf_trt.contract.ports import Role
from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.errors import CheckpointError, InvalidRequest
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import scheduler_of

from .batch_stream import Batch, BatchStream, StreamItem
from .checkpoints import Base, Checkpoints, TrainingState, advice_on
from .folder_lock import locked
from .launcher import start_accelerator
from .log import Sampler, TrainingLog
from .losses import Objective
from .random_draws import TRAINING, VALIDATION, RandomDraws, draw_rows
from .recipe import Metric, Recipe, TrainPrecision
from .weights import clip_gradient, mean_model, new_optimizer, training_model, update_mean

DTYPES = {TrainPrecision.BF16: torch.bfloat16, TrainPrecision.FP16: torch.float16}
KEYS_SHOWN = 8
SMALLEST_SCALE = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunSetup:
    """Where and how one run trains, beside its recipe.

    `scheduler` is the diffusers config with the noise schedule of the base's training. `resume` is auto, none, or the
    folder of a checkpoint. `labels` are the classes of the sample grids. With `cpu`, a GPU stays unused.
    """

    folder: Path
    base: Base
    scheduler: Mapping[str, Any]
    resume: str = "auto"
    cpu: bool = False
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run: its last iteration, the mean loss, whether `stop` ended it early.

    `main` is true in the process that writes.
    """

    iteration: int
    mean_loss: float
    stopped: bool
    main: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that run at once, and their random draws."""

    batch: Batch
    draws: RandomDraws


def train(
    model: ILFModel,
    recipe: Recipe,
    stream: BatchStream,
    setup: RunSetup,
    *,
    validation: BatchStream | None = None,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train `model.feedback` in place, and end with the weights of the last checkpoint; the backbone does not change.

    Writes checkpoints, log and samples under `setup.folder`, and at the end an ILF checkpoint into the folder. The main
    process calls `progress` after every iteration, with the loss as its detail. Every process calls `stop` in every
    iteration; the run ends after an iteration in which one of them answers true.

    Raises InvalidRequest if recipe, data, base and setup do not fit, or if loss or gradient is not finite, with the
    keys of the rows; CheckpointError if a checkpoint cannot be read or written.
    """
    with _deterministic(recipe.compute.deterministic):
        training = Training(model, recipe, stream, setup, validation=validation)
        try:
            training.resume()
            return training.run(progress=progress, stop=stop)
        finally:
            training.close()


class Training:
    """One run: the model on its device, the optimizer, and the state of the training."""

    def __init__(
        self,
        model: ILFModel,
        recipe: Recipe,
        stream: BatchStream,
        setup: RunSetup,
        *,
        validation: BatchStream | None = None,
    ) -> None:
        self.recipe, self.stream, self.setup, self.validation = recipe, stream, setup, validation or stream
        self.accelerator = start_accelerator(recipe, cpu=setup.cpu)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        self.at_once = recipe.optimisation.rows_at_once(self.world)
        self.autocast = DTYPES.get(recipe.compute.precision)
        self.model = training_model(model, self.autocast)
        conditioning = self.model.adapter.conditioning(1)
        label = conditioning.port(Role.LABEL)
        self.null = dict(stream.null or {})
        if label is not None and conditioning.classes is not None:
            self.null[label.name] = torch.tensor([conditioning.classes])
        if recipe.loss.condition_dropout and not self.null:
            raise InvalidRequest(
                f"loss.condition_dropout is {recipe.loss.condition_dropout}, but the data has no embedding of the "
                "empty text; add one, or set loss.condition_dropout=0"
            )
        if recipe.compute.compile:
            self.model.adapter.compile()
        self.objective = self._objective(self.model)
        _exclude_frozen(self.objective)
        self.parallel_objective: nn.Module = self.accelerator.prepare_model(self.objective)
        self.served_model = mean_model(self.model) if recipe.optimisation.ema else self.model
        self.optimizer = new_optimizer(self.model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.checkpoints = Checkpoints(setup.folder, recipe, setup.base)
        self.state = TrainingState()
        self.saved_iteration = 0
        self.held = ExitStack()

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    def resume(self) -> None:
        """Hold the folder, and load the checkpoint that `setup.resume` names, if any; raises as `train` does."""
        self.checkpoints.resume_point(self.setup.resume)  # refuses before a folder is made
        self._hold_folder()
        checkpoint = self.checkpoints.resume_point(self.setup.resume)
        if checkpoint is not None:
            self.state, scaler = self.checkpoints.load(
                checkpoint, self.model, self.optimizer, served_model=self.served_model
            )
            self._load_scaler(scaler, checkpoint)
            if self.main:
                self.checkpoints.tidy(self.state)
            logger.info("resumes from %s", checkpoint)
        self.saved_iteration = self.state.iteration
        iterations = self._gather([self.saved_iteration])
        if len(set(iterations)) > 1:
            raise InvalidRequest(
                f"the processes find checkpoints of iterations {iterations} under {self.setup.folder}; put --output "
                "where all of them see the same files"
            )

    def run(self, *, progress: Progress = no_progress, stop: Callable[[], bool]) -> Outcome:
        """Run the remaining iterations, or fewer if `stop` answers true."""
        recipe, state, stopped = self.recipe, self.state, False
        last = recipe.optimisation.iterations
        if state.iteration > last:
            raise InvalidRequest(
                f"the checkpoint stands at iteration {state.iteration}, past optimisation.iterations {last}; "
                "raise it, or start again in another --output"
            )
        with ExitStack() as open_files:
            log = self._open_log(open_files)
            sampler = self._sampler()
            start_s, rows = perf_counter(), 0
            batches = self.stream.batches(start_iteration=state.iteration + 1, rank=self.rank, world=self.world)
            while state.iteration < last and not stopped:
                facts, stopped = self.step(batches, stop)
                iteration = state.iteration
                rows += recipe.optimisation.batch_size
                if self.main:
                    progress("feedback", iteration, last, f"loss {facts['loss']:.4f}")
                if log and (iteration % recipe.logging.every == 0 or iteration == last):
                    facts |= {"processes": self.world, "rows_per_second": rows / (perf_counter() - start_s)}
                    log.write(iteration, facts | {"scales": self.model.feedback.scales.tolist()})
                    start_s, rows = perf_counter(), 0
                if iteration % recipe.checkpoint.every == 0 or iteration == last:
                    state.note_metric(self.measure())
                    self.save()
                if sampler and self.main and (iteration % recipe.logging.samples_every == 0 or iteration == last):
                    sampler.write(self.served_model, iteration, self.autocast)
            if state.iteration != self.saved_iteration:
                self.save()
            if self.main and state.iteration == last:
                self.checkpoints.finish(state)
        self.model.feedback.load_state_dict(self.served_model.feedback.state_dict())
        self.accelerator.wait_for_everyone()
        return Outcome(state.iteration, state.mean_loss, stopped and state.iteration < last, self.main)

    def close(self) -> None:
        """Let go of the folder, and leave the group of processes.

        Free DDP before its group: freed later, it joins gloo's threads under Python's lock and may hang.
        """
        self.held.close()
        self.parallel_objective = self.objective
        if self.world > 1:
            self.accelerator.free_memory()
        self.accelerator.end_training()

    def step(
        self, batches: Iterator[StreamItem], stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], bool]:
        """Run one iteration on the next batch.

        Returns the loss and other numbers, means over all processes, and whether any process answered true to `stop`.
        The host waits for the device once, before the weights change.
        """
        optimisation = self.recipe.optimisation
        iteration = self.state.iteration + 1
        stream_iteration, keys, batch = next(batches)
        if stream_iteration != iteration:
            raise InvalidRequest(
                f"the data gives iteration {stream_iteration}, expected {iteration}; open its batches at the iteration "
                "of the training"
            )
        lr_factor = optimisation.lr_factor(iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * lr_factor
        self.optimizer.zero_grad(set_to_none=True)
        terms_of_parts = []
        for index, part in self.parts(batch, iteration, TRAINING):
            last = index == optimisation.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.parallel_objective):
                terms = _terms(self.parallel_objective, part)
                self.scaler.scale(self.objective.total(terms) / optimisation.accumulate).backward()
            terms_of_parts.append(terms.detach())
        self.scaler.unscale_(self.optimizer)
        local_norm = clip_gradient(self.optimizer, optimisation.clip)
        terms_by_row = torch.cat(terms_of_parts, 1)  # (2, rows of this process)
        local_means = torch.stack([self.objective.total(terms_by_row), *terms_by_row.mean(1), local_norm])
        vote = torch.tensor([float(stop())], device=self.device)
        means = self._mean(torch.cat([local_means, vote])).tolist()
        loss, reconstruction, distillation, norm, stop_votes = means
        self._check_finite(iteration, loss, norm, terms_by_row, keys)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.served_model is not self.model:
            update_mean(self.served_model, self.model, half_life=optimisation.ema)
        self.state.add(loss)
        facts = {
            "loss": loss,
            "reconstruction": reconstruction,
            "distillation": distillation,
            "grad_norm": norm,
            "lr": optimisation.lr * lr_factor,
        }
        return facts, stop_votes > 0

    def parts(self, batch: Batch, iteration: int, purpose: int) -> Iterator[tuple[int, Part]]:
        """The parts of this process's rows with their indices, on the device, conditions dropped."""
        loss, size = self.recipe.loss, len(batch.x0)
        draws = draw_rows(
            self.recipe.seed,
            iteration,
            range(self.rank * size, (self.rank + 1) * size),
            self.model.adapter.latent,
            times=len(self.objective.alphas_cumprod),
            dropout=loss.condition_dropout,
            purpose=purpose,
        )
        for index in range(size // self.at_once):
            rows = slice(index * self.at_once, (index + 1) * self.at_once)
            part = Part(batch.part(rows, self.device), draws.part(rows, self.device))
            if loss.condition_dropout:
                part = replace(part, batch=part.batch.without_condition(part.draws.drop_mask, self.null))
            yield index, part

    @torch.no_grad()
    def measure(self) -> float:
        """The metric of the best checkpoint; see `recipe.Metric`."""
        if self.recipe.checkpoint.metric is Metric.LOSS:
            return self.state.window_sum / max(1, self.state.window_count)
        objective = self.objective
        if self.served_model is not self.model:
            objective = self._objective(self.served_model).to(self.device)
        batches = self.validation.batches(start_iteration=1, rank=self.rank, world=self.world)
        losses = []
        for _ in range(self.recipe.checkpoint.validation_batches):
            iteration, _, batch = next(batches)
            parts = self.parts(batch, iteration, VALIDATION)
            losses += [objective.total(_terms(objective, part)) for _, part in parts]
        return float(self._mean(torch.stack(losses).mean()))

    def save(self) -> None:
        """Write a checkpoint of this iteration, in the main process."""
        if self.main:
            scaler = self.scaler.state_dict()
            self.checkpoints.save(self.state, self.model, self.optimizer, scaler, served_model=self.served_model)
        self.saved_iteration = self.state.iteration

    def _hold_folder(self) -> None:
        """Keep other trainings out of the folder until `close`, by a lock of the process that writes."""
        refusal = ""
        if self.main:
            self.setup.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.held.enter_context(locked(self.setup.folder, doing="trains in"))
            except InvalidRequest as error:
                refusal = str(error)
        for reason in self._gather([refusal]):
            if reason:
                raise InvalidRequest(reason)

    def _load_scaler(self, scaler: Mapping[str, float], checkpoint: Path) -> None:
        """The loss scale of float16; a training in another precision has none."""
        expected = torch.amp.GradScaler("cpu").state_dict().keys()
        if scaler and scaler.keys() != expected:
            raise CheckpointError(f"{checkpoint} holds no loss scale of {', '.join(expected)}; {advice_on(checkpoint)}")
        if scaler:
            self.scaler.load_state_dict(dict(scaler))

    def _objective(self, model: ILFModel) -> Objective:
        return Objective(
            model,
            _alphas_cumprod(self.setup.scheduler),
            self.recipe.loss,
            autocast=self.autocast,
            recompute=self.recipe.compute.gradient_checkpointing,
        )

    def _mean(self, numbers: Tensor) -> Tensor:
        """The mean over all processes."""
        mean: Tensor = self.accelerator.reduce(numbers.float(), "mean")
        return mean

    def _gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        return list(gather_object(values)) if self.world > 1 else values

    def _check_finite(self, iteration: int, loss: float, norm: float, terms: Tensor, keys: Sequence[str]) -> None:
        """Raise InvalidRequest before the weights change; in float16 the scaler skips a step that overflows."""
        scaling = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
        if isfinite(loss) and (isfinite(norm) or scaling):
            return
        bad_rows = (~terms.isfinite().all(0)).tolist()
        bad_keys = self._gather([str(key) for key, bad in zip(keys, bad_rows, strict=True) if bad])
        all_keys = self._gather([str(key) for key in keys])
        what, suspects = (f"loss is {loss}", bad_keys) if bad_keys else (f"gradient's norm is {norm}", all_keys)
        more = f" and {len(suspects) - KEYS_SHOWN} more" if len(suspects) > KEYS_SHOWN else ""
        raise InvalidRequest(
            f"{what} at iteration {iteration}, in {', '.join(suspects[:KEYS_SHOWN])}{more}; look at these rows, or "
            "lower optimisation.lr; the weights are still those of the iteration before"
        )

    def _open_log(self, open_files: ExitStack) -> TrainingLog | None:
        if not self.main:
            return None
        return open_files.enter_context(TrainingLog(self.setup.folder, self.state.iteration))

    def _sampler(self) -> Sampler | None:
        settings = self.recipe.logging
        if not settings.samples_every:
            return None
        if not Sampler.serves(self.model):
            logger.warning("no sample grids: %s is not a model of classes in pixels", self.model.adapter.model_class())
            return None
        if not self.setup.labels:
            logger.warning("no sample grids: the setup has no labels; give some, or set logging.samples_every=0")
            return None
        return Sampler(self.setup.folder, settings, dict(self.setup.scheduler), list(self.setup.labels))


def facts_of(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """The facts of a training that its ILF checkpoint records."""
    return {"iteration": outcome.iteration, "mean_loss": outcome.mean_loss, **recipe.facts()}


def _terms(objective: nn.Module, part: Part) -> Tensor:
    """Both terms of the loss by row, (2, rows of the part)."""
    terms: Tensor = objective(part.batch, part.draws.time, part.draws.noise, part.draws.share)
    return terms


def _exclude_frozen(objective: Objective) -> None:
    """Keep DDP from sending frozen parameters at the start and buffers at every forward: they never differ."""
    frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in objective.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen + buffers)


def _alphas_cumprod(scheduler: Mapping[str, Any]) -> Tensor:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InvalidRequest(f"the base predicts {prediction!r}; training needs a base that predicts the noise")
    alphas: Tensor = scheduler_of(scheduler).alphas_cumprod
    return alphas


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Ask torch for deterministic kernels while the block runs."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(enabled or before, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
