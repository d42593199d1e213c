"""The engine: trains F and s on a frozen backbone, on one device or many, and goes on where it stopped, to the bit."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn

from ilf_trt.errors import InvalidRequest
from ilf_trt.model.backbones import backbone_of
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import scheduler_of
from ilf_trt.train.batch_stream import Batch, Feed
from ilf_trt.train.checkpoints import Base, Standing, States
from ilf_trt.train.log import Sampler, TrainingLog
from ilf_trt.train.losses import Objective
from ilf_trt.train.random_draws import TRAINING, VALIDATION, draw
from ilf_trt.train.recipe import Metric, Recipe, TrainPrecision

DTYPES = {TrainPrecision.BF16: torch.bfloat16, TrainPrecision.FP16: torch.float16}
KEYS_SHOWN = 8
SMALLEST_SCALE = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a training runs on beside its recipe; `scheduler` is the diffusers config that noised the base's training.

    `resume`: auto, none, or a checkpoint. `labels` are those of the sample grids. `cpu` leaves a GPU alone.
    """

    folder: Path
    base: Base
    scheduler: Mapping[str, Any]
    resume: str = "auto"
    cpu: bool = False
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended: after all its iterations, or `stopped` before; `main` in the process that writes."""

    iteration: int
    mean_loss: float
    stopped: bool
    main: bool


Progress = Callable[[int, float], None]


def train(
    model: ILFModel,
    recipe: Recipe,
    feed: Feed,
    setting: Setting,
    *,
    validation: Feed | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train `model.feedback` in place, in the end to what the checkpoint holds; the backbone stays as it is.

    Writes checkpoints, log and samples under `setting.folder`, and at the end an ILF checkpoint into it. `progress` is
    called in the main process with the iteration and its loss; `stop` is asked after every iteration, in every process.
    Raises InvalidRequest when something does not fit, and when loss or gradient is not finite, with the batch's keys;
    CheckpointError when a checkpoint cannot be read or written.
    """
    with _deterministic(recipe.compute.deterministic):
        training = Training(model, recipe, feed, setting, validation=validation)
        try:
            training.resume()
            return training.run(progress=progress, stop=stop)
        finally:
            training.close()


class Training:
    """One training: the model on its device, the optimizer, and where it stands."""

    def __init__(
        self, model: ILFModel, recipe: Recipe, feed: Feed, setting: Setting, *, validation: Feed | None = None
    ) -> None:
        self.recipe, self.feed, self.setting, self.validation = recipe, feed, setting, validation or feed
        spread = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(cpu=setting.cpu, mixed_precision="no", kwargs_handlers=[spread])
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        self.at_once = recipe.optimisation.rows_at_once(self.world)
        self.autocast = DTYPES.get(recipe.compute.precision)
        self.model = _working(model, self.autocast)
        self.null = feed.null if self.model.adapter.null is None else self.model.adapter.null
        if recipe.loss.condition_dropout and self.null is None:
            raise InvalidRequest(
                f"loss.condition_dropout is {recipe.loss.condition_dropout}, but the data has no text that says "
                "nothing to put in its place; add it, or set loss.condition_dropout=0"
            )
        if recipe.compute.compile:
            self.model.adapter.compile()
        self.objective = self._objective(self.model)
        _leave_to_itself(self.objective)
        self.spread: nn.Module = self.accelerator.prepare_model(self.objective)
        self.served = _copied(self.model) if recipe.optimisation.ema else self.model
        self.optimizer = new_optimizer(self.model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.states = States(setting.folder, recipe, setting.base)
        self.standing = Standing()
        self.saved = 0

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    def resume(self) -> None:
        """Go on from the checkpoint that the setting asks for, if there is one; raises as `train` does."""
        start = self.states.chosen(self.setting.resume)
        if start is not None:
            self.standing, scaler = self.states.load(start, self.model, self.optimizer, served=self.served)
            if scaler:
                self.scaler.load_state_dict(scaler)
            if self.main:
                self.states.tidy(self.standing)
            logger.info("goes on from %s", start)
        self.saved = self.standing.iteration
        seen = gather_object([self.saved]) if self.world > 1 else [self.saved]
        if len(set(seen)) > 1:
            raise InvalidRequest(
                f"the processes find checkpoints of iterations {seen} under {self.setting.folder}; put --output where "
                "all of them see the same files"
            )

    def run(self, *, progress: Progress | None, stop: Callable[[], bool]) -> Outcome:
        """All iterations that are left, or up to where `stop` says so."""
        recipe, standing, stopped = self.recipe, self.standing, False
        last = recipe.optimisation.iterations
        if standing.iteration > last:
            raise InvalidRequest(
                f"the checkpoint stands at iteration {standing.iteration}, past optimisation.iterations {last}; "
                "raise it, or start anew in another --output"
            )
        with ExitStack() as open_files:
            log = self._open_log(open_files)
            sampler = self._sampler()
            began, rows = perf_counter(), 0
            stream = self.feed.stream(start_iteration=standing.iteration + 1, rank=self.rank, world=self.world)
            while standing.iteration < last and not stopped:
                facts, stopped = self.step(stream, stop)
                iteration = standing.iteration
                rows += recipe.optimisation.batch_size
                if progress and self.main:
                    progress(iteration, facts["loss"])
                if log and (iteration % recipe.logging.every == 0 or iteration == last):
                    facts |= {"processes": self.world, "rows_per_second": rows / (perf_counter() - began)}
                    log.write(iteration, facts | {"scales": self.model.feedback.scales.tolist()})
                    began, rows = perf_counter(), 0
                if iteration % recipe.checkpoint.every == 0 or iteration == last:
                    standing.judge(self.measure())
                    self.save()
                if sampler and self.main and (iteration % recipe.logging.samples_every == 0 or iteration == last):
                    sampler.write(self.served, iteration, self.autocast)
            if standing.iteration != self.saved:
                self.save()
            if self.main and standing.iteration == last:
                self.states.finish(standing)
        self.model.feedback.load_state_dict(self.served.feedback.state_dict())
        self.accelerator.wait_for_everyone()
        return Outcome(standing.iteration, standing.mean_loss, stopped and standing.iteration < last, self.main)

    def close(self) -> None:
        """Leave the other processes.

        What DDP holds goes first: freed after its group, it joins gloo's threads under Python's lock and may hang.
        """
        self.spread = self.objective
        if self.world > 1:
            self.accelerator.free_memory()
        self.accelerator.end_training()

    def step(self, stream: Iterator[Any], stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, float], bool]:
        """One iteration over the whole batch: its numbers over all processes, and whether any was asked to stop.

        The host waits for the device once, before the weights change.
        """
        optimisation = self.recipe.optimisation
        iteration = self.standing.iteration + 1
        pulled, keys, batch = next(stream)
        if pulled != iteration:
            raise InvalidRequest(
                f"the data gives iteration {pulled}, expected {iteration}; open it where training stands"
            )
        warmth = optimisation.warmth(iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * warmth
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for part, terms in self.terms(self.spread, batch, iteration, TRAINING):
            last = part == optimisation.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.spread):
                found = terms()
                self.scaler.scale(self.objective.total(found) / optimisation.accumulate).backward()
            parts.append(found.detach())
        self.scaler.unscale_(self.optimizer)
        norm = self._clipped()
        by_row = torch.cat(parts, 1)  # (2, rows of this process)
        numbers = torch.stack([self.objective.total(by_row), *by_row.mean(1), norm])
        wish = torch.tensor([float(stop())], device=self.device)
        loss, reconstruction, distillation, norm_now, wishes = self._mean(torch.cat([numbers, wish])).tolist()
        self._check_finite(iteration, loss, norm_now, by_row, keys)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        self.standing.add(loss)
        facts = {
            "loss": loss,
            "reconstruction": reconstruction,
            "distillation": distillation,
            "grad_norm": norm_now,
            "lr": optimisation.lr * warmth,
        }
        return facts, wishes > 0

    def terms(
        self, objective: nn.Module, batch: Batch, iteration: int, purpose: int
    ) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """For each part of this process's rows a call that makes its terms (2, rows at once)."""
        loss, size = self.recipe.loss, len(batch.x0)
        rows = range(self.rank * size, (self.rank + 1) * size)
        latent, times = self.model.adapter.latent, len(self.objective.alphas_cumprod)
        draws = draw(
            self.recipe.seed, iteration, rows, latent, times=times, dropout=loss.condition_dropout, purpose=purpose
        )
        for part in range(size // self.at_once):
            here = slice(part * self.at_once, (part + 1) * self.at_once)
            given, drawn = batch.part(here, self.device), draws.part(here, self.device)
            if loss.condition_dropout and self.null is not None:
                given = given.without(drawn.dropped, self.null)
            yield part, lambda given=given, drawn=drawn: objective(given, drawn.time, drawn.noise, drawn.share)  # type: ignore[misc]

    @torch.no_grad()
    def measure(self) -> float:
        """The metric that the best is chosen by."""
        if self.recipe.checkpoint.metric is Metric.LOSS:
            return self.standing.window_sum / max(1, self.standing.window_count)
        objective = self.objective if self.served is self.model else self._objective(self.served).to(self.device)
        stream = self.validation.stream(start_iteration=1, rank=self.rank, world=self.world)
        found = []
        for _ in range(self.recipe.checkpoint.validation_batches):
            iteration, _, batch = next(stream)
            found += [objective.total(terms()) for _, terms in self.terms(objective, batch, iteration, VALIDATION)]
        return float(self._mean(torch.stack(found).mean()))

    def save(self) -> None:
        """A checkpoint of where the training stands."""
        if self.main:
            self.states.save(self.standing, self.model, self.optimizer, self.scaler.state_dict(), served=self.served)
        self.saved = self.standing.iteration

    def _objective(self, model: ILFModel) -> Objective:
        return Objective(
            model,
            _alphas_cumprod(self.setting.scheduler),
            self.recipe.loss,
            autocast=self.autocast,
            recompute=self.recipe.compute.gradient_checkpointing,
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Move the running mean, where one is served, by what its half-life leaves to the weights of now."""
        if self.served is self.model:
            return
        share = 1 - 0.5 ** (1 / self.recipe.optimisation.ema)
        for mean, now in zip(self.served.feedback.parameters(), self.model.feedback.parameters(), strict=True):
            mean.lerp_(now, share)

    def _clipped(self) -> Tensor:
        """The norm of the gradient, which is clipped in place."""
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.recipe.optimisation.clip:
            nn.utils.clip_grads_with_norm_(trained, self.recipe.optimisation.clip, norm)
        return norm

    def _mean(self, numbers: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(numbers.float(), "mean")
        return reduced

    def _check_finite(self, iteration: int, loss: float, norm: float, by_row: Tensor, keys: Any) -> None:
        """Raise InvalidRequest, before the weights change; in float16 the scaler skips a step that overflows."""
        scaling = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
        if isfinite(loss) and (isfinite(norm) or scaling):
            return
        bad = (~by_row.isfinite().all(0)).tolist()
        found = [str(key) for key, is_bad in zip(keys, bad, strict=True) if is_bad]
        named = gather_object(found) if self.world > 1 else found
        whole = gather_object([str(key) for key in keys]) if self.world > 1 else [str(key) for key in keys]
        what, chosen = (f"loss is {loss}", named) if named else (f"gradient's norm is {norm}", whole)
        more = f" and {len(chosen) - KEYS_SHOWN} more" if len(chosen) > KEYS_SHOWN else ""
        raise InvalidRequest(
            f"{what} at iteration {iteration}, in {', '.join(chosen[:KEYS_SHOWN])}{more}; look at these rows, or lower "
            "optimisation.lr; the weights are still those of the iteration before"
        )

    def _open_log(self, open_files: ExitStack) -> TrainingLog | None:
        if not self.main:
            return None
        self.setting.folder.mkdir(parents=True, exist_ok=True)
        return open_files.enter_context(TrainingLog(self.setting.folder, self.standing.iteration))

    def _sampler(self) -> Sampler | None:
        settings = self.recipe.logging
        if not settings.samples_every:
            return None
        if not Sampler.serves(self.model):
            logger.warning("no sample grids: %s is not a model of classes in pixels", self.model.adapter.model_class)
            return None
        if not self.setting.labels:
            logger.warning("no sample grids: the setting has no labels; give some, or set logging.samples_every=0")
            return None
        return Sampler(self.setting.folder, settings, dict(self.setting.scheduler), list(self.setting.labels))


def new_optimizer(model: ILFModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over F, and over s with its own rate and without decay; nothing frozen is in it."""
    optimisation = recipe.optimisation
    groups = [
        {"params": list(model.feedback.block.parameters()), "full_lr": optimisation.lr},
        {"params": [model.feedback.scales], "full_lr": optimisation.scale_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optimisation.lr, weight_decay=optimisation.weight_decay)


def facts_of(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """What an ILF checkpoint says about a training."""
    return {"iteration": outcome.iteration, "mean_loss": outcome.mean_loss, **recipe.facts()}


def _working(model: ILFModel, dtype: torch.dtype | None) -> ILFModel:
    """The model that trains: F and s themselves, the backbone shared or, for another dtype, a copy.

    Its adapter is new, so that compiling it leaves the caller's as it is.
    """
    backbone = model.backbone
    if dtype is not None:
        backbone = deepcopy(backbone)
        nn.Module.to(backbone, dtype)  # diffusers' own warns of modules to keep in float32; these models have none
    return ILFModel(backbone_of(backbone), model.loop, model.feedback)


def _leave_to_itself(objective: Objective) -> None:
    """Have DDP send no frozen parameter at the start and no buffer at every forward: all processes read the same."""
    frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in objective.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen + buffers)


def _copied(model: ILFModel) -> ILFModel:
    """The same backbone with F and s of its own, which do not train."""
    return ILFModel(model.adapter, model.loop, deepcopy(model.feedback).requires_grad_(False))


def _alphas_cumprod(scheduler: Mapping[str, Any]) -> Tensor:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InvalidRequest(f"the base predicts {prediction!r}; only a base that predicts the noise can be trained on")
    alphas: Tensor = scheduler_of(scheduler).alphas_cumprod
    return alphas


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted or before, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
