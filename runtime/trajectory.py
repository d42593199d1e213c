"""What a session runs: a trajectory that is bound to memory, and one graph that is bound to memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ilf_trt.contract.plan import StepPlan

from .engine import Array
from .timings import Timings

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
    """How a trajectory runs. It calls `watch` after every step; an error from `watch` ends the run.

    `profile` times every graph on a GPU; `on_device` leaves the latents on the GPU.
    """

    profile: bool = False
    on_device: bool = False
    watch: Watch | None = None


class Trajectory(Protocol):
    """Every graph run of a plan, bound to memory; `run` binds and allocates nothing but its result."""

    def run(
        self,
        noise: Any,
        conditions: Mapping[str, Array],
        guidance_scale: float,
        options: RunOptions,
    ) -> tuple[Any, Timings]:
        """noise (B, C, H, W) of unit variance, condition rows by port name -> new latents (B, C, H, W), timings.

        A run that `options.watch` ended may be repeated. Raises NonFinite if a latent holds NaN or infinity at the
        end; the message names the graph and the step that gave them first.
        """

    def close(self) -> None:
        """Free the memory of the trajectory."""


class GraphCall(Protocol):
    """A single graph, bound to memory: fill `inputs`, call it, read `outputs`, which the next call overwrites."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays by input port, to write to; float32 for a bfloat16 port."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Arrays by output port, to read from; float32 for a bfloat16 port."""

    def __call__(self) -> None:
        """Run the graph; return when the outputs are complete."""

    def close(self) -> None:
        """Free the memory of the call."""
