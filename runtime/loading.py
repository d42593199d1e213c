"""The stages of a bundle: text, loop and decode, loaded all at once, or one after another where memory is short."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from queue import LifoQueue
from threading import Lock
from typing import Protocol

from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.gpu.device import Device
from ilf_trt.runtime.host import Host
from ilf_trt.runtime.session import KEPT_TRAJECTORIES, Session

CLOSED = "this pipeline is closed; load the bundle again"
GRAPHS_OF = {"text": (TEXT,), "loop": GRAPHS, "decode": (DECODE,)}

Place = Host | Device


class Stages(Protocol):
    """Lends sessions that can run a stage."""

    def session(self, stage: str) -> AbstractContextManager[tuple[Place, Session]]:
        """A session, for the time of a block, that runs the graphs of `stage`, and where they are loaded."""

    def close(self) -> None:
        """Free everything, after what still runs."""


class AllAtOnce:
    """Every graph is loaded once; up to `sessions` threads run them, each in memory of its own."""

    def __init__(self, place: Place, sessions: int, kept: int = KEPT_TRAJECTORIES) -> None:
        """Each session keeps the last `kept` trajectories bound."""
        self.place = place
        self._kept = kept
        self._closed = False
        self.sessions = sessions if place.max_sessions is None else min(sessions, place.max_sessions)
        self._pool: LifoQueue[Session | None] = LifoQueue()
        for _ in range(self.sessions):
            self._pool.put(None)

    @contextmanager
    def session(self, stage: str) -> Iterator[tuple[Place, Session]]:
        held = self._pool.get()
        try:
            if self._closed:
                raise InvalidRequest(CLOSED)
            held = held or self.place.session(self._kept)
            yield self.place, held
        finally:
            self._pool.put(held)

    @contextmanager
    def one_by_one(self) -> Iterator[Iterator[None]]:
        """Every session in turn becomes the one that is lent next, for warming up."""
        cold = [self._pool.get() for _ in range(self.sessions)]

        def turns() -> Iterator[None]:
            while cold:
                self._pool.put(cold.pop())  # the last one in is the first one out
                yield

        try:
            yield turns()
        finally:
            for session in cold:
                self._pool.put(session)

    def close(self) -> None:
        self._closed = True
        held = [self._pool.get() for _ in range(self.sessions)]
        for session in held:
            if session is not None:
                session.close()
        self.place.close()
        for _ in held:
            self._pool.put(None)  # for threads that wait: they find the pipeline closed


class OneAfterAnother:
    """A stage is loaded when it is asked for and freed when it is done; one thread at a time."""

    def __init__(self, load: Callable[[tuple[str, ...]], Place]) -> None:
        """`load` opens some graphs."""
        self._load = load
        self._lock = Lock()

    @contextmanager
    def session(self, stage: str) -> Iterator[tuple[Place, Session]]:
        with self._lock:
            place = self._load(GRAPHS_OF[stage])
            try:
                session = place.session()
                try:
                    yield place, session
                finally:
                    session.close()
            finally:
                place.close()

    def close(self) -> None:
        """Nothing is loaded between two stages."""
        with self._lock:
            pass
