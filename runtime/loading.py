"""Loads the parts of a bundle (text, transformer, decoder): all at once, or one at a time to save memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Literal, Protocol

from ilf_trt.contract.ports import DECODE, GRAPHS, TEXT

from .lending import FOREVER, Lending, Place, Wait
from .session import KEPT_TRAJECTORIES, Session

Part = Literal["text", "transformer", "decoder"]
Sessions = Callable[[Part], AbstractContextManager[Session]]
"""Gives the session of one generation for the graphs of a part, for the time of a `with` block."""

GRAPHS_OF_PART: dict[Part, tuple[str, ...]] = {"text": (TEXT,), "transformer": GRAPHS, "decoder": (DECODE,)}


def part_of(graph: str) -> Part:
    """The part that a graph belongs to."""
    return next(part for part, graphs in GRAPHS_OF_PART.items() if graph in graphs)


class Backend(Protocol):
    """Graphs of a bundle that are loaded on the CPU or on one GPU; `library` is the engine library with its version."""

    on_gpu: bool
    description: str
    max_sessions: int | None

    @property
    def device_name(self) -> str: ...

    @property
    def library(self) -> str: ...

    def session(self, max_trajectories: int = KEPT_TRAJECTORIES) -> Session:
        """A new session with memory of its own; the last `max_trajectories` trajectories stay bound."""

    def close(self) -> None:
        """Free the engines; the sessions must be closed."""


class Loading(Protocol):
    """Lends sessions that can run the parts of a bundle."""

    @property
    def runs_on(self) -> tuple[str, str]:
        """The device and the library of the backend; both are empty before a backend was loaded."""

    def lend(self, wait: Wait = FOREVER) -> AbstractContextManager[Sessions]:
        """The sessions of one generation, lent for the time of the `with` block.

        Raises InvalidRequest once it is closed, in a fork, and in a thread that has borrowed; TimedOut and Cancelled as
        `wait` says.
        """

    def lend_each(self) -> Iterator[AbstractContextManager[Sessions]]:
        """Each session that stays loaded, to lend one after another; nothing if none stays."""

    def check_open(self) -> None:
        """Raise InvalidRequest as `lend` does."""

    def close(self, timeout: float | None = None) -> None:
        """Free everything after the generations that still run; raises TimedOut if they do not end in time."""


class Resident:
    """Every graph stays loaded; up to `sessions` threads run at once, each in its own session."""

    def __init__(self, backend: Backend, sessions: int, max_trajectories: int = KEPT_TRAJECTORIES) -> None:
        """In each session, the last `max_trajectories` trajectories stay bound. `close` closes the backend too."""
        self.backend = backend
        self.sessions = sessions if backend.max_sessions is None else min(sessions, backend.max_sessions)
        self._max_trajectories = max_trajectories
        self._lending = Lending(self.sessions, self._free)
        self.check_open, self.close = self._lending.check_open, self._lending.close

    @property
    def runs_on(self) -> tuple[str, str]:
        return self.backend.device_name, self.backend.library

    def lend(self, wait: Wait = FOREVER) -> AbstractContextManager[Sessions]:
        return self._lend(wait, None)

    def lend_each(self) -> Iterator[AbstractContextManager[Sessions]]:
        return (self._lend(FOREVER, place) for place in self._lending.places)

    @contextmanager
    def _lend(self, wait: Wait, place: Place | None) -> Iterator[Sessions]:
        with self._lending.lend(wait, place) as lent:
            session = lent.session = lent.session or self.backend.session(self._max_trajectories)
            yield lambda _: nullcontext(session)

    def _free(self) -> None:
        for place in self._lending.places:
            if place.session is not None:
                place.session.close()
                place.session = None
        self.backend.close()


class Sequential:
    """Each part is loaded for a `with` block and freed after it; one generation at a time."""

    def __init__(self, load: Callable[[tuple[str, ...]], Backend]) -> None:
        """`load` loads the graphs with these names."""
        self._load = load
        self.runs_on = ("", "")
        self._lending = Lending(1, lambda: None)
        self.check_open, self.close = self._lending.check_open, self._lending.close

    @contextmanager
    def lend(self, wait: Wait = FOREVER) -> Iterator[Sessions]:
        with self._lending.lend(wait):
            yield self._session

    def lend_each(self) -> Iterator[AbstractContextManager[Sessions]]:
        return iter(())

    @contextmanager
    def _session(self, part: Part) -> Iterator[Session]:
        with closing(self._load(GRAPHS_OF_PART[part])) as backend, closing(backend.session()) as session:
            self.runs_on = backend.device_name, backend.library
            yield session
