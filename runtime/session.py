"""A session: the memory of one generation at a time, and the trajectories that it keeps ready to replay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ilf_trt.errors import OutOfMemory
from ilf_trt.schedule import StepPlan

from .engine import Array

KEPT_TRAJECTORIES = 4


@dataclass(frozen=True, slots=True)
class Timings:
    """How long one generation took.

    `total_ms` is the host's clock over everything. `graph_ms` and `step_ms` are the runs of the graphs, summed by graph
    and by step; on a GPU they are measured only when asked for, and empty else. `device_ms` is the GPU's clock from the
    first run to the last, `launch_us` what the host needed to set it going, `captured` whether as one CUDA graph.
    """

    total_ms: float
    graph_ms: dict[str, float]
    step_ms: tuple[float, ...]
    steps: int
    device_ms: float | None = None
    launch_us: float | None = None
    captured: bool = False

    @property
    def overhead_us_per_step(self) -> float:
        """What a step costs beyond its engines: Python and the copies in and out."""
        engines_ms = sum(self.graph_ms.values()) if self.device_ms is None else self.device_ms
        return (self.total_ms - engines_ms) * 1000 / self.steps


class Trajectory(Protocol):
    """Every graph run of a plan, bound to memory: replaying it binds and allocates nothing."""

    def run(
        self, noise: Any, conditions: Mapping[str, Array], guidance_scale: float, *, profile: bool, on_device: bool
    ) -> tuple[Any, Timings]:
        """noise (B, C, H, W) of unit variance, conditions under their port names -> new latents, timings."""

    def close(self) -> None:
        """Free its memory."""


class Session:
    """Runs one trajectory at a time; several sessions share engines, none shares memory."""

    def __init__(self, bind: Callable[[StepPlan, int], Trajectory], release: Callable[[], None] = lambda: None) -> None:
        """`bind` makes the trajectory of a plan for a number of pictures, `release` frees what the session owns."""
        self._bind = bind
        self._release = release
        self._trajectories: dict[tuple[StepPlan, int], Trajectory] = {}

    def trajectory(self, plan: StepPlan, pictures: int) -> Trajectory:
        """The bound runs of a plan for a number of pictures; the last few are kept, and all go when memory is short."""
        key = (plan, pictures)
        kept = self._trajectories.pop(key, None)
        if kept is None:
            while len(self._trajectories) >= KEPT_TRAJECTORIES:
                self._drop(next(iter(self._trajectories)))
            try:
                kept = self._bind(plan, pictures)
            except OutOfMemory:
                if not self._trajectories:
                    raise
                for other in list(self._trajectories):
                    self._drop(other)
                kept = self._bind(plan, pictures)
        self._trajectories[key] = kept
        return kept

    def close(self) -> None:
        for key in list(self._trajectories):
            self._drop(key)
        self._release()

    def _drop(self, key: tuple[StepPlan, int]) -> None:
        self._trajectories.pop(key).close()
