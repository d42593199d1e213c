"""A session: the memory of one generation at a time, and the trajectories that it keeps ready to replay."""

from collections.abc import Callable, Mapping

from ilf_trt.contract.ports import Graph
from ilf_trt.errors import OutOfMemory
from ilf_trt.runtime.trajectory import Call, Job, Trajectory

KEPT_TRAJECTORIES = 4
KEPT_CALLS = 8


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
