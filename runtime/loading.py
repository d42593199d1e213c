"""Loads the parts of a bundle (text, transformer, decoder): all at once, or one at a time to save memory."""

import os
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Condition, Event, Lock, get_ident
from time import monotonic
from typing import Literal, Protocol

from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT
from ilf_trt.errors import Cancelled, InvalidRequest, TimedOut

from .session import KEPT_TRAJECTORIES, Session

CLOSED = "this pipeline is closed; load the bundle again"
NESTED = "a generation is called inside of another, such as from its progress; call it after, or from another thread"
SLICE_S = 0.05  # how late a waiting request sees that it is cancelled

Part = Literal["text", "transformer", "decoder"]

GRAPHS_OF_PART: dict[Part, tuple[str, ...]] = {"text": (TEXT,), "transformer": GRAPHS, "decoder": (DECODE,)}


def part_of(graph: str) -> Part:
    """The part that a graph belongs to."""
    return next(part for part, graphs in GRAPHS_OF_PART.items() if graph in graphs)


class Wait:
    """How long a request waits for its turn: until `timeout` seconds have passed, or `cancel` is set."""

    def __init__(self, timeout: float | None = None, cancel: Event | None = None) -> None:
        self._timeout, self._cancel = timeout, cancel
        self._end = None if timeout is None else monotonic() + timeout

    def check(self) -> None:
        """Raise Cancelled or TimedOut when the wait is over."""
        self.check_cancel()
        if self._end is not None and monotonic() >= self._end:
            raise TimedOut(
                f"no session was free within {self._timeout} s; load the pipeline with more sessions, or wait longer"
            )

    def check_cancel(self) -> None:
        """Raise Cancelled when `cancel` is set."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("the generation was cancelled before it began")

    def slice_s(self) -> float | None:
        """Seconds until the next check."""
        left = None if self._end is None else max(self._end - monotonic(), 0.001)
        return left if self._cancel is None else min(SLICE_S, SLICE_S if left is None else left)


FOREVER = Wait()


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

    def session(self, part: Part, wait: Wait = FOREVER) -> AbstractContextManager[Session]:
        """A session for the graphs of `part`, lent for the time of the `with` block.

        Raises InvalidRequest once it is closed, in a fork, and inside of another session of the same thread; TimedOut
        and Cancelled as `wait` says.
        """

    def check_open(self) -> None:
        """Raise InvalidRequest in a fork of the process that loaded the bundle."""

    def close(self, timeout: float | None = None) -> None:
        """Free everything, after the generations that still run; raises TimedOut when that takes too long."""


class Turns:
    """Who may run: up to `most` at once, the others wait; nobody once it is closed.

    A thread that already runs gets no second turn, since it would wait for itself. Everything is bound to the process
    that made it: a fork has a copy of the turns without the threads that would give them back.
    """

    def __init__(self, most: int) -> None:
        self._most, self._process = most, os.getpid()
        self._changed = Condition()
        self._running: set[int] = set()
        self._closed = False

    @contextmanager
    def turn(self, wait: Wait) -> Iterator[None]:
        """Wait for a turn and hold it; raises InvalidRequest, TimedOut, Cancelled."""
        self.check_process()
        thread = get_ident()
        with self._changed:
            if thread in self._running:
                raise InvalidRequest(NESTED)
            while not self._closed and len(self._running) >= self._most:
                wait.check()
                self._changed.wait(wait.slice_s())
            wait.check_cancel()
            if self._closed:
                raise InvalidRequest(CLOSED)
            self._running.add(thread)
        try:
            yield
        finally:
            with self._changed:
                self._running.discard(thread)
                self._changed.notify_all()

    def close(self, timeout: float | None) -> bool:
        """Let nobody in any more and wait for who runs; whether all ended within `timeout` seconds.

        Raises InvalidRequest in a thread that runs itself.
        """
        end = None if timeout is None else monotonic() + timeout
        with self._changed:
            if get_ident() in self._running:
                raise InvalidRequest("close is called inside of a generation, such as from its progress; call it after")
            self._closed = True
            self._changed.notify_all()
            while self._running:
                left = None if end is None else end - monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    @property
    def is_foreign(self) -> bool:
        """Whether this is a fork of the process that made the turns: there is nobody to wait for."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raise InvalidRequest in a process that was forked after loading."""
        if self.is_foreign:
            raise InvalidRequest(
                f"this pipeline was loaded in process {self._process} and cannot be used in its fork {os.getpid()}; "
                "load it in the process that uses it, or start processes by spawn"
            )


class Resident:
    """Every graph stays loaded; up to `sessions` threads run at once, each in its own session."""

    def __init__(self, backend: Backend, sessions: int, max_trajectories: int = KEPT_TRAJECTORIES) -> None:
        """In each session, the last `max_trajectories` trajectories stay bound. `close` closes the backend too."""
        self.backend = backend
        self._max_trajectories = max_trajectories
        self.sessions = sessions if backend.max_sessions is None else min(sessions, backend.max_sessions)
        self._turns = Turns(self.sessions)
        self._idle: list[Session] = []  # the last one in is the first one out; a turn has one, or makes one
        self._made = 0
        self._lock = Lock()
        self._warming = Lock()
        self._freed = False

    @contextmanager
    def session(self, part: Part, wait: Wait = FOREVER) -> Iterator[Session]:
        with self._turns.turn(wait):
            session = self._take()
            try:
                yield session
            finally:
                with self._lock:
                    self._idle.append(session)

    def warm(self, run: Callable[[], object]) -> None:
        """Call `run`, which takes a session, until every session that can be had at once has run it.

        One warm-up goes on at a time; each session waits its turn like a request, so that nobody holds several.
        """
        self._turns.check_process()
        with self._warming:
            warmed: set[int] = set()
            for _ in range(self.sessions):
                with self._turns.turn(FOREVER):
                    session = self._take(warmed)
                    with self._lock:
                        self._idle.append(session)
                    warmed.add(id(session))
                run()

    def close(self, timeout: float | None = None) -> None:
        if self._turns.is_foreign:
            return
        if not self._turns.close(timeout):
            raise TimedOut(f"a generation still runs after {timeout} s; call close again to free the pipeline")
        with self._lock:
            if self._freed:
                return
            self._freed = True
        for session in self._idle:
            session.close()
        self._idle.clear()
        self.backend.close()

    def check_open(self) -> None:
        self._turns.check_process()

    def _take(self, warmed: Container[int] = ()) -> Session:
        """A session for the holder of a turn: an idle one that is not among `warmed`, a new one, or any idle one."""
        with self._lock:
            for session in reversed(self._idle):
                if id(session) not in warmed:
                    self._idle.remove(session)
                    return session
            if self._made >= self.sessions:
                return self._idle.pop()
            self._made += 1
        try:
            return self.backend.session(self._max_trajectories)
        except BaseException:
            with self._lock:
                self._made -= 1
            raise


class Sequential:
    """Each part is loaded for a `with` block and freed after it; one thread at a time."""

    def __init__(self, load: Callable[[tuple[str, ...]], Backend]) -> None:
        """`load` loads the graphs with these names."""
        self._load = load
        self._turns = Turns(1)

    @contextmanager
    def session(self, part: Part, wait: Wait = FOREVER) -> Iterator[Session]:
        with self._turns.turn(wait):
            backend = self._load(GRAPHS_OF_PART[part])
            try:
                session = backend.session()
                try:
                    yield session
                finally:
                    session.close()
            finally:
                backend.close()

    def close(self, timeout: float | None = None) -> None:
        """Wait for the part that still runs; between two parts nothing is loaded."""
        if not self._turns.is_foreign:
            self._turns.close(timeout)

    def check_open(self) -> None:
        self._turns.check_process()
