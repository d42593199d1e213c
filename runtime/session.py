"""A session: the memory of one generation at a time, and the trajectories that it keeps ready to replay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ilf_trt.contract import DECODE, TEXT, Graph
from ilf_trt.errors import OutOfMemory
from ilf_trt.schedule import StepPlan

from .engine import Array

KEPT_TRAJECTORIES = 4
KEPT_CALLS = 8


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

    @classmethod
    def together(cls, runs: "Sequence[Timings]") -> "Timings":
        """One after another: their sums, of graphs and of steps that bear the same number."""
        if len(runs) == 1:
            return runs[0]
        graphs = dict.fromkeys(name for run in runs for name in run.graph_ms)
        on_gpu = [run.device_ms for run in runs if run.device_ms is not None]
        launches = [run.launch_us for run in runs if run.launch_us is not None]
        return cls(
            sum(run.total_ms for run in runs),
            {name: sum(run.graph_ms.get(name, 0.0) for run in runs) for name in graphs},
            tuple(map(sum, zip(*(run.step_ms for run in runs), strict=False))),
            sum(run.steps for run in runs),
            sum(on_gpu) if on_gpu else None,
            sum(launches) if launches else None,
            all(run.captured for run in runs),
        )

    def with_stages(self, before: Mapping[str, float], after: Mapping[str, float]) -> "Timings":
        """With ms of what ran before and after the trajectory, by graph."""
        total_ms = self.total_ms + sum(before.values()) + sum(after.values())
        return replace(self, total_ms=total_ms, graph_ms={**before, **self.graph_ms, **after})

    @property
    def overhead_us_per_step(self) -> float:
        """What a step costs beyond its engines: Python and the copies in and out."""
        beside_ms = sum(self.graph_ms.get(name, 0.0) for name in (TEXT, DECODE))
        engines_ms = sum(self.graph_ms.values()) if self.device_ms is None else self.device_ms + beside_ms
        return (self.total_ms - engines_ms) * 1000 / self.steps


Watch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What a trajectory is bound for: a plan, pictures of one size (H, W) in cells, with or without guidance."""

    plan: StepPlan
    pictures: int
    size: tuple[int, int]
    guided: bool


class Trajectory(Protocol):
    """Every graph run of a plan, bound to memory: replaying it binds and allocates nothing."""

    def run(
        self,
        noise: Any,
        conditions: Mapping[str, Array],
        guidance_scale: float,
        *,
        profile: bool,
        on_device: bool,
        watch: Watch | None,
    ) -> tuple[Any, Timings]:
        """noise (B, C, H, W) of unit variance, conditions by rows under their port names -> new latents, timings.

        `watch` is called after every step; what it raises ends the run, which may be repeated.
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


class Session:
    """Runs one trajectory at a time; several sessions share engines, none shares memory."""

    def __init__(
        self,
        bind: Callable[[Job], Trajectory],
        bind_call: Callable[[Graph, Mapping[str, int]], Call],
        release: Callable[[], None] = lambda: None,
        *,
        kept: int = KEPT_TRAJECTORIES,
    ) -> None:
        """`bind` makes the trajectory of a job, `bind_call` a graph alone for what its symbols stand for.

        `release` frees what the session owns; the last `kept` trajectories stay bound.
        """
        self._kept = kept
        self._bind = bind
        self._bind_call = bind_call
        self._release = release
        self._calls: dict[tuple[str, tuple[tuple[str, int], ...]], Call] = {}
        self._trajectories: dict[Job, Trajectory] = {}

    def trajectory(self, job: Job) -> Trajectory:
        """The bound runs of a job; the last few are kept, and all go when memory is short."""
        kept = self._trajectories.pop(job, None)
        if kept is None:
            while len(self._trajectories) >= self._kept:
                self._drop(next(iter(self._trajectories)))
            try:
                kept = self._bind(job)
            except OutOfMemory:
                if not self._trajectories:
                    raise
                for other in list(self._trajectories):
                    self._drop(other)
                kept = self._bind(job)
        self._trajectories[job] = kept
        return kept

    def call(self, graph: Graph, sizes: Mapping[str, int]) -> Call:
        """A graph alone, bound for what its symbols stand for; the last few are kept."""
        key = (graph.name, tuple(sorted(sizes.items())))
        kept = self._calls.pop(key, None)
        if kept is None:
            while len(self._calls) >= KEPT_CALLS:
                self._calls.pop(next(iter(self._calls))).close()
            kept = self._bind_call(graph, sizes)
        self._calls[key] = kept
        return kept

    def close(self) -> None:
        for job in list(self._trajectories):
            self._drop(job)
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        self._release()

    def _drop(self, job: Job) -> None:
        self._trajectories.pop(job).close()
