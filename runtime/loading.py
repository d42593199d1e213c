"""Loads the parts of a bundle (text, transformer, decoder): all at once, or one at a time to save memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from queue import LifoQueue
from threading import Lock
from typing import Literal, Protocol

from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.errors import InvalidRequest

from .session import KEPT_TRAJECTORIES, Session

CLOSED = "this pipeline is closed; load the bundle again"

Part = Literal["text", "transformer", "decoder"]

GRAPHS_OF_PART: dict[Part, tuple[str, ...]] = {"text": (TEXT,), "transformer": GRAPHS, "decoder": (DECODE,)}


def part_of(graph: str) -> Part:
    """The part that a graph belongs to."""
    return next(part for part, graphs in GRAPHS_OF_PART.items() if graph in graphs)


class Backend(Protocol):
    """Graphs of a bundle that are loaded on the CPU or on one GPU."""

    on_gpu: bool
    description: str
    max_sessions: int | None

    def session(self, max_trajectories: int = KEPT_TRAJECTORIES) -> Session:
        """A new session with memory of its own; the last `max_trajectories` trajectories stay bound."""

    def close(self) -> None:
        """Free the engines; the sessions must be closed."""


class Loading(Protocol):
    """Lends sessions that can run a part of the bundle."""

    def session(self, part: Part) -> AbstractContextManager[Session]:
        """A session for the graphs of `part`, lent for the time of the `with` block."""

    def close(self) -> None:
        """Free everything, after the generations that still run."""


class Resident:
    """Every graph stays loaded; up to `sessions` threads run at once, each in its own session."""

    def __init__(self, backend: Backend, sessions: int, max_trajectories: int = KEPT_TRAJECTORIES) -> None:
        """In each session, the last `max_trajectories` trajectories stay bound. `close` closes the backend too."""
        self.backend = backend
        self._max_trajectories = max_trajectories
        self._closed = False
        self.sessions = sessions if backend.max_sessions is None else min(sessions, backend.max_sessions)
        self._pool: LifoQueue[Session | None] = LifoQueue()
        for _ in range(self.sessions):
            self._pool.put(None)

    @contextmanager
    def session(self, part: Part) -> Iterator[Session]:
        session = self._pool.get()
        try:
            if self._closed:
                raise InvalidRequest(CLOSED)
            session = session or self.backend.session(self._max_trajectories)
            yield session
        finally:
            self._pool.put(session)

    @contextmanager
    def each_session(self) -> Iterator[Iterator[None]]:
        """Iterate over the sessions to warm them up: at each step, `session` lends another one."""
        sessions = [self._pool.get() for _ in range(self.sessions)]

        def turns() -> Iterator[None]:
            while sessions:
                self._pool.put(sessions.pop())  # the pool lends the last session that came in
                yield

        try:
            yield turns()
        finally:
            for session in sessions:
                self._pool.put(session)

    def close(self) -> None:
        self._closed = True
        sessions = [self._pool.get() for _ in range(self.sessions)]
        for session in sessions:
            if session is not None:
                session.close()
        self.backend.close()
        for _ in sessions:
            self._pool.put(None)  # wakes the threads that wait; they find the pipeline closed


class Sequential:
    """Each part is loaded for a `with` block and freed after it; one thread at a time."""

    def __init__(self, load: Callable[[tuple[str, ...]], Backend]) -> None:
        """`load` loads the graphs with these names."""
        self._load = load
        self._lock = Lock()

    @contextmanager
    def session(self, part: Part) -> Iterator[Session]:
        with self._lock:
            backend = self._load(GRAPHS_OF_PART[part])
            try:
                session = backend.session()
                try:
                    yield session
                finally:
                    session.close()
            finally:
                backend.close()

    def close(self) -> None:
        """Wait for the part that still runs; between two parts nothing is loaded."""
        with self._lock:
            pass
