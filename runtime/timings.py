"""Timings: how long one generation took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ilf_trt.contract.ports import DECODE, TEXT


@dataclass(frozen=True, slots=True)
class Timings:
    """How long one generation took.

    `total_ms` is the whole generation by the host's clock. `graph_ms` and `step_ms` are the times of the graph runs,
    summed by graph and by step; on a GPU they are empty without `profile`. `device_ms` is the time from the first run
    to the last by the GPU's clock. `launch_us` is the time in which the host enqueued the runs. `captured` says that
    the runs were one CUDA graph.
    """

    total_ms: float
    graph_ms: dict[str, float]
    step_ms: tuple[float, ...]
    steps: int
    device_ms: float | None = None
    launch_us: float | None = None
    captured: bool = False

    @classmethod
    def total(cls, runs: "Sequence[Timings]") -> "Timings":
        """The sums over runs one after another, by graph and by step number."""
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

    def with_parts(self, before: Mapping[str, float], after: Mapping[str, float]) -> "Timings":
        """These timings plus those of the parts before and after the transformer; ms by graph."""
        total_ms = self.total_ms + sum(before.values()) + sum(after.values())
        return replace(self, total_ms=total_ms, graph_ms={**before, **self.graph_ms, **after})

    @property
    def overhead_us_per_step(self) -> float:
        """Time of a step outside of the engines: Python, and copies to and from the GPU."""
        parts_ms = sum(self.graph_ms.get(name, 0.0) for name in (TEXT, DECODE))
        engines_ms = sum(self.graph_ms.values()) if self.device_ms is None else self.device_ms + parts_ms
        return (self.total_ms - engines_ms) * 1000 / self.steps
