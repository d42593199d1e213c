"""What a session runs: a trajectory bound to memory, and one graph bound to memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ilf_trt.contract.plan import StepPlan
from ilf_trt.runtime.engine import Array
from ilf_trt.runtime.timings import Timings

Watch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What a trajectory is bound for: a plan, pictures of one size (H, W) in cells, with or without guidance."""

    plan: StepPlan
    pictures: int
    size: tuple[int, int]
    guided: bool


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a trajectory runs. `watch` is called after every step; what it raises ends the run.

    `profile` times every graph; `on_device` leaves the latents on the GPU.
    """

    profile: bool = False
    on_device: bool = False
    watch: Watch | None = None


class Trajectory(Protocol):
    """Every graph run of a plan, bound to memory: replaying it binds and allocates nothing."""

    def run(
        self,
        noise: Any,
        conditions: Mapping[str, Array],
        guidance_scale: float,
        options: RunOptions,
    ) -> tuple[Any, Timings]:
        """noise (B, C, H, W) of unit variance, conditions by rows under their port names -> new latents, timings.

        A run that `options.watch` ended may be repeated.
        """

    def close(self) -> None:
        """Free its memory."""


class Call(Protocol):
    """One graph alone, bound to memory: fill `inputs`, call it, read `outputs`, which the next call overwrites."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """By input port, to write to."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """By output port."""

    def __call__(self) -> None: ...

    def close(self) -> None:
        """Free its memory."""
