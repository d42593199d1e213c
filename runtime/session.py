"""A session: the memory of one generation at a time, and the trajectories that are ready for reuse."""

from collections.abc import Callable, Mapping

from ilf_trt.contract.ports import Graph
from ilf_trt.errors import OutOfMemory

from .trajectory import GraphCall, Job, Trajectory

KEPT_TRAJECTORIES = 4
KEPT_CALLS = 8


class Session:
    """Runs one trajectory at a time. Several sessions share the engines; no two share memory."""

    def __init__(
        self,
        bind: Callable[[Job], Trajectory],
        bind_call: Callable[[Graph, Mapping[str, int]], GraphCall],
        release: Callable[[], None] = lambda: None,
        *,
        max_trajectories: int = KEPT_TRAJECTORIES,
    ) -> None:
        """`bind` binds the trajectory of a job; `bind_call` binds a single graph for the sizes of its symbols.

        `release` frees what the session owns. The last `max_trajectories` trajectories stay bound.
        """
        self._max_trajectories = max_trajectories
        self._bind = bind
        self._bind_call = bind_call
        self._release = release
        self._calls: dict[tuple[str, tuple[tuple[str, int], ...]], GraphCall] = {}
        self._trajectories: dict[Job, Trajectory] = {}

    def trajectory(self, job: Job) -> Trajectory:
        """The bound trajectory of a job. The last few stay bound; all others are freed if memory runs out."""
        trajectory = self._trajectories.pop(job, None)
        if trajectory is None:
            while len(self._trajectories) >= self._max_trajectories:
                self._drop(next(iter(self._trajectories)))
            try:
                trajectory = self._bind(job)
            except OutOfMemory:
                if not self._trajectories:
                    raise
                for other in list(self._trajectories):
                    self._drop(other)
                trajectory = self._bind(job)
        self._trajectories[job] = trajectory
        return trajectory

    def call(self, graph: Graph, sizes: Mapping[str, int]) -> GraphCall:
        """A single graph, bound for the sizes of its symbols. The last few calls stay bound."""
        key = (graph.name, tuple(sorted(sizes.items())))
        call = self._calls.pop(key, None)
        if call is None:
            while len(self._calls) >= KEPT_CALLS:
                self._calls.pop(next(iter(self._calls))).close()
            call = self._bind_call(graph, sizes)
        self._calls[key] = call
        return call

    def new_call(self, graph: Graph, sizes: Mapping[str, int]) -> GraphCall:
        """A single graph, bound for the sizes of its symbols. The session does not keep it: the caller closes it."""
        return self._bind_call(graph, sizes)

    def close(self) -> None:
        """Free every trajectory, every call and what the session owns."""
        for job in list(self._trajectories):
            self._drop(job)
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        self._release()

    def _drop(self, job: Job) -> None:
        self._trajectories.pop(job).close()
