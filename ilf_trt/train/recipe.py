"""The recipe of a training: every setting that decides the weights, read from a TOML file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

from ilf_trt.contract.document import DocumentError, read_toml
from ilf_trt.contract.spec import Initialisation, Loop
from ilf_trt.errors import InvalidRequest, shown
from ilf_trt.files import is_file

from .table import check_at_least, did_you_mean, flat, parse, plain, set_field

FREE_ON_RESUME = (
    "model.base",
    "optimisation.iterations",
    "optimisation.accumulate",
    "data.path",
    "data.workers",
    "data.max_broken",
    "data.verify",
)
NAME_CHARS = 80
FREE_SECTIONS = ("checkpoint", "logging", "compute", "validation")


class LossKind(StrEnum):
    """The teacher's target, beside the noise; see `ilf_trt.train.losses`."""

    FAST = "fast"
    STANDARD = "standard"
    INTERVAL = "interval"
    NONE = "none"


class SecondPass(StrEnum):
    """The time that conditions the student's second pass in training."""

    SAME = "t"
    HALF = "t/2"
    RESCALE = "t-i*m/n"


class TrainPrecision(StrEnum):
    """The dtype of the frozen backbone and of matrix products.

    F, s, their moments and the sum that runs through the blocks stay in float32.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Metric(StrEnum):
    """The measure of the best checkpoint: the mean loss since the last one, or the loss on fixed rows and draws."""

    LOSS = "loss"
    VALIDATION = "validation"


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The frozen base and the loop in it.

    `base` is a diffusers folder, a hub id, or `demo`. With `kind` and `config`, a dry run needs no base on the disk.
    """

    base: str
    loop: Loop
    kind: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int = 0
    initialisation: Initialisation = Initialisation.END

    def check(self) -> None:
        check_at_least(0, "model.", text_tokens=self.text_tokens)


@dataclass(frozen=True, slots=True)
class Optimisation:
    """The optimizer's settings. 0 turns `clip` and `ema` off.

    `batch_size` is global: the sum over all processes and all `accumulate` parts. `ema` is the half-life, in
    iterations, of the running mean of F and s. Checkpoints and bundles serve the mean.
    """

    iterations: int
    batch_size: int
    lr: float
    scale_lr: float
    weight_decay: float
    warm_up: int
    clip: float
    accumulate: int = 1
    ema: float = 0.0

    def check(self) -> None:
        ones = {"iterations": self.iterations, "batch_size": self.batch_size, "accumulate": self.accumulate}
        check_at_least(1, "optimisation.", **ones)
        check_at_least(0, "optimisation.", lr=self.lr, scale_lr=self.scale_lr, weight_decay=self.weight_decay)
        check_at_least(0, "optimisation.", warm_up=self.warm_up, clip=self.clip, ema=self.ema)

    def rows_at_once(self, world: int) -> int:
        """Rows that one of `world` processes runs at a time; raises InvalidRequest if the batch does not divide."""
        parts = world * self.accumulate
        if self.batch_size % parts:
            raise InvalidRequest(
                f"optimisation.batch_size is {self.batch_size}, it must divide by {world} processes times "
                f"optimisation.accumulate {self.accumulate}; take {self.batch_size // parts * parts or parts}"
            )
        return self.batch_size // parts

    def lr_factor(self, iteration: int) -> float:
        """The factor of both learning rates: rises linearly over iterations 1 to `warm_up`, then stays at 1."""
        return min(1.0, iteration / self.warm_up) if self.warm_up else 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss: its two terms, their weights, and the times of student and teacher; see `ilf_trt.train.losses`.

    `look_ahead` limits the distance of the teacher's time t/2 from t, in times of the noise schedule; 0 sets no limit.
    Interval distillation draws intervals of samplers with `fewest_steps` to `most_steps` steps.
    """

    kind: LossKind
    second_pass: SecondPass
    condition_dropout: float
    reconstruction: float = 1.0
    distillation: float = 1.0
    teacher_steps: int = 8
    look_ahead: int = 0
    fewest_steps: int = 5
    most_steps: int = 12

    def check(self) -> None:
        check_at_least(0, "loss.", reconstruction=self.reconstruction, distillation=self.distillation)
        check_at_least(0, "loss.", look_ahead=self.look_ahead)
        check_at_least(1, "loss.", fewest_steps=self.fewest_steps)
        check_at_least(2, "loss.", teacher_steps=self.teacher_steps)
        check_at_least(self.fewest_steps, "loss.", most_steps=self.most_steps)
        if (self.kind is LossKind.INTERVAL) != (self.second_pass is SecondPass.RESCALE):
            raise InvalidRequest(
                f"loss.kind is {self.kind} and loss.second_pass is {self.second_pass}; {LossKind.INTERVAL} needs "
                f"{SecondPass.RESCALE}, and no other kind takes it: i is the length of an interval"
            )
        if not 0 <= self.condition_dropout <= 1:
            raise InvalidRequest(f"loss.condition_dropout is {self.condition_dropout}, it must be from 0 to 1")
        if not self.reconstruction + (self.kind is not LossKind.NONE) * self.distillation:
            raise InvalidRequest("every term of the loss has weight 0; set loss.reconstruction or loss.distillation")


@dataclass(frozen=True, slots=True)
class CheckpointPart:
    """Checkpoints: one `every` N iterations. The training keeps the last `keep` and the best by `metric`."""

    every: int = 500
    keep: int = 2
    metric: Metric = Metric.LOSS
    validation_batches: int = 4

    def check(self) -> None:
        check_at_least(1, "checkpoint.", every=self.every, keep=self.keep, validation_batches=self.validation_batches)


@dataclass(frozen=True, slots=True)
class Logging:
    """The log: a line `every` N iterations, a sample grid of `labels` every `samples_every` iterations (0: none).

    Only models of classes in pixels get sample grids.
    """

    every: int = 50
    samples_every: int = 0
    labels: str = "0-9"
    steps: int = 10
    guidance_scale: float = 1.0

    def check(self) -> None:
        check_at_least(1, "logging.", every=self.every, steps=self.steps)
        check_at_least(0, "logging.", samples_every=self.samples_every, guidance_scale=self.guidance_scale)


@dataclass(frozen=True, slots=True)
class Compute:
    """How the device computes the same sums; these settings change the trained weights by rounding only."""

    precision: TrainPrecision = TrainPrecision.FP32
    gradient_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = True

    def check(self) -> None:
        """All combinations are valid."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training. `data` and `validation` are tables that name the source of the pictures."""

    seed: int
    model: ModelPart
    data: Mapping[str, Any]
    optimisation: Optimisation
    loss: Loss
    checkpoint: CheckpointPart = field(default_factory=CheckpointPart)
    logging: Logging = field(default_factory=Logging)
    compute: Compute = field(default_factory=Compute)
    validation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, changes: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file, or a recipe of the package by name, and apply `SECTION.KEY=VALUE` changes.

        Raises InvalidRequest with the name of the recipe.
        """
        table = read_table(name)
        for change in changes:
            set_field(table, change)
        try:
            return cls.from_table(table)
        except InvalidRequest as error:
            raise InvalidRequest(f"recipe {name}: {error}") from error

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Recipe":
        """Raises InvalidRequest for a key that is unknown, missing, of the wrong type or out of its range."""
        return parse(cls, table)

    def check(self) -> None:
        check_at_least(0, "", seed=self.seed)

    def as_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; `from_table` reads it back."""
        table: dict[str, Any] = plain(asdict(self))
        if table["model"]["kind"] is None:
            del table["model"]["kind"]
        return table

    def facts(self) -> dict[str, Any]:
        """The part of the recipe that an ILF checkpoint records."""
        table = self.as_json()
        sections = {name: table[name] for name in ("seed", "optimisation", "loss", "data", "compute")}
        return {**sections, "initialisation": table["model"]["initialisation"]}

    def differences(self, other: "Recipe") -> list[tuple[str, Any, Any]]:
        """The fields that forbid one training to resume the other: name, value here, value in `other`.

        FREE_ON_RESUME and FREE_SECTIONS name the fields that may differ.
        """
        mine, theirs = dict(flat(self.as_json())), dict(flat(other.as_json()))
        return [
            (name, mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
            and name not in FREE_ON_RESUME
            and name.partition(".")[0] not in FREE_SECTIONS
        ]


def recipe_names() -> list[str]:
    """The names of the recipes in the package."""
    folder = files("ilf_trt") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_table(name: str) -> dict[str, Any]:
    """The TOML table of a file, or of a recipe in the package by name; raises InvalidRequest."""
    path = Path(name)
    if not is_file(path):
        names = recipe_names()
        if name not in names:
            hint = did_you_mean(name, names)
            raise InvalidRequest(
                f"recipe {shown(name, NAME_CHARS)!r} is neither a file nor one of {', '.join(names)}{hint}"
            )
        path = Path(str(files("ilf_trt") / "recipes" / f"{name}.toml"))
    try:
        return read_toml(path)
    except DocumentError as error:
        raise InvalidRequest(f"recipe {name} {error.reason}; mend that line") from error
