"""The recipe: everything that decides how a feedback block is trained, read from a TOML file."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

from ilf_trt.contract.spec import Initialisation, Loop
from ilf_trt.errors import InvalidRequest
from ilf_trt.train.table import _nearest, parsed

FREE_ON_RESUME = (
    "model.base",
    "optimisation.iterations",
    "optimisation.accumulate",
    "data.path",
    "data.workers",
    "data.max_broken",
    "data.verify",
)
FREE_SECTIONS = ("checkpoint", "logging", "compute", "validation")


class LossKind(StrEnum):
    """What the student is distilled from, besides the noise itself; see `ilf_trt.train.losses`."""

    FAST = "fast"
    STANDARD = "standard"
    INTERVAL = "interval"
    NONE = "none"


class SecondPass(StrEnum):
    """The time that the student's second pass is conditioned on while it trains."""

    SAME = "t"
    HALF = "t/2"
    RESCALE = "t-i*m/n"


class TrainPrecision(StrEnum):
    """What the frozen backbone is kept in and matrix products run in; F, s, their moments and the sum stay float32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Metric(StrEnum):
    """What the best checkpoint is chosen by: the mean loss since the last one, or the loss on fixed draws."""

    LOSS = "loss"
    VALIDATION = "validation"


@dataclass(frozen=True, slots=True)
class ModelPart:
    """`base`: a diffusers folder, a hub id, or `demo`. `kind` and `config` let a dry run do without it."""

    base: str
    loop: Loop
    kind: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int = 0
    initialisation: Initialisation = Initialisation.END

    def check(self) -> None:
        _at_least(0, "model.", text_tokens=self.text_tokens)


@dataclass(frozen=True, slots=True)
class Optimisation:
    """`batch_size` is global: over all processes and all `accumulate` parts. A `clip` of 0 is none.

    `ema` is the half-life, in iterations, of a running mean of F and s that is served in their place; 0 is none.
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
        _at_least(1, "optimisation.", **ones)
        _at_least(0, "optimisation.", lr=self.lr, scale_lr=self.scale_lr, weight_decay=self.weight_decay)
        _at_least(0, "optimisation.", warm_up=self.warm_up, clip=self.clip, ema=self.ema)

    def rows_at_once(self, world: int) -> int:
        """Rows that one process runs at a time; raises InvalidRequest when the batch does not divide."""
        parts = world * self.accumulate
        if self.batch_size % parts:
            raise InvalidRequest(
                f"optimisation.batch_size is {self.batch_size}, it must divide by {world} processes times "
                f"optimisation.accumulate {self.accumulate}; take {self.batch_size // parts * parts or parts}"
            )
        return self.batch_size // parts

    def warmth(self, iteration: int) -> float:
        """The share of the learning rates at an iteration, from 1: rises over `warm_up` iterations, then stays."""
        return min(1.0, iteration / self.warm_up) if self.warm_up else 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """Weights of both terms, and what the student and the teacher are asked; see `ilf_trt.train.losses`.

    `look_ahead` is how far from t, at most, the teacher's t/2 lies, in times of the noise schedule; 0: at t/2 always.
    Intervals are those of samplers of `fewest_steps` to `most_steps` steps.
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
        _at_least(0, "loss.", reconstruction=self.reconstruction, distillation=self.distillation)
        _at_least(0, "loss.", look_ahead=self.look_ahead)
        _at_least(1, "loss.", fewest_steps=self.fewest_steps)
        _at_least(2, "loss.", teacher_steps=self.teacher_steps)
        _at_least(self.fewest_steps, "loss.", most_steps=self.most_steps)
        if (self.kind is LossKind.INTERVAL) != (self.second_pass is SecondPass.RESCALE):
            raise InvalidRequest(
                f"loss.kind is {self.kind} and loss.second_pass is {self.second_pass}; {LossKind.INTERVAL} goes with "
                f"{SecondPass.RESCALE} and nothing else does: i is the length of an interval"
            )
        if not 0 <= self.condition_dropout <= 1:
            raise InvalidRequest(f"loss.condition_dropout is {self.condition_dropout}, it must be from 0 to 1")
        if not self.reconstruction + (self.kind is not LossKind.NONE) * self.distillation:
            raise InvalidRequest("every term of the loss has weight 0; set loss.reconstruction or loss.distillation")


@dataclass(frozen=True, slots=True)
class CheckpointPart:
    """A checkpoint `every` N iterations, the last `keep` of them kept, and the best by `metric`."""

    every: int = 500
    keep: int = 2
    metric: Metric = Metric.LOSS
    validation_batches: int = 4

    def check(self) -> None:
        _at_least(1, "checkpoint.", every=self.every, keep=self.keep, validation_batches=self.validation_batches)


@dataclass(frozen=True, slots=True)
class Logging:
    """A line `every` N iterations; sample grids of `labels` every `samples_every` (0: none), classes in pixels only."""

    every: int = 50
    samples_every: int = 0
    labels: str = "0-9"
    steps: int = 10
    guidance_scale: float = 1.0

    def check(self) -> None:
        _at_least(1, "logging.", every=self.every, steps=self.steps)
        _at_least(0, "logging.", samples_every=self.samples_every, guidance_scale=self.guidance_scale)


@dataclass(frozen=True, slots=True)
class Compute:
    """How the same sums are computed: none of it changes what is trained beyond rounding."""

    precision: TrainPrecision = TrainPrecision.FP32
    gradient_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = True

    def check(self) -> None:
        """Any combination will do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training; `data` and `validation` are the tables that say where pictures come from."""

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
        """A recipe file, or one of the package by name, with `SECTION.KEY=VALUE` changes; raises InvalidRequest."""
        table = read_table(name)
        for change in changes:
            _set(table, change)
        try:
            return cls.from_table(table)
        except InvalidRequest as error:
            raise InvalidRequest(f"recipe {name}: {error}") from error

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Recipe":
        """Raises InvalidRequest for a key that is unknown, missing, of the wrong type or out of its range."""
        recipe: Recipe = parsed(cls, table, "")
        return recipe

    def check(self) -> None:
        _at_least(0, "", seed=self.seed)

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_table` reads it back."""
        plain: dict[str, Any] = _plain(asdict(self))
        if plain["model"]["kind"] is None:
            del plain["model"]["kind"]
        return plain

    def facts(self) -> dict[str, Any]:
        """What an ILF checkpoint says about its training."""
        facts = self.as_json()
        kept = {name: facts[name] for name in ("seed", "optimisation", "loss", "data", "compute")}
        return {**kept, "initialisation": facts["model"]["initialisation"]}

    def differences(self, other: "Recipe") -> list[tuple[str, Any, Any]]:
        """Fields with both values in which two recipes differ so that one cannot go on where the other stopped."""
        here, there = dict(_flat(self.as_json(), "")), dict(_flat(other.as_json(), ""))
        return [
            (name, here.get(name), there.get(name))
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
            and name not in FREE_ON_RESUME
            and name.partition(".")[0] not in FREE_SECTIONS
        ]


def recipe_names() -> list[str]:
    """The recipes in the package."""
    folder = files("ilf_trt") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_table(name: str) -> dict[str, Any]:
    """The TOML of a file, or of a recipe in the package; raises InvalidRequest."""
    path = Path(name)
    if not path.is_file():
        known = recipe_names()
        if name not in known:
            near = _nearest(name, known)
            raise InvalidRequest(f"recipe {name!r} is neither a file nor one of {', '.join(known)}{near}")
        path = Path(str(files("ilf_trt") / "recipes" / f"{name}.toml"))
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"recipe {name} is not readable TOML: {error}; mend that line") from error


def _set(table: dict[str, Any], change: str) -> None:
    name, separator, text = change.partition("=")
    if not separator or not name.strip():
        raise InvalidRequest(f"--set {change!r} is not SECTION.KEY=VALUE, such as optimisation.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, key = name.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InvalidRequest(f"--set {change!r}: {section} is no section; give SECTION.KEY=VALUE")
    table[key] = value


def _at_least(low: int, section: str, **values: float) -> None:
    for name, value in values.items():
        if value < low:
            raise InvalidRequest(f"{section}{name} is {value}, it must be at least {low}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"begin", "end"}:
            return f"{value['begin']}:{value['end']}"
        return {name: _plain(inner) for name, inner in value.items()}
    return value.value if isinstance(value, StrEnum) else value


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
