"""Lends the places of a pipeline to threads, in the order in which they ask, until the pipeline closes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from threading import Condition, Event, RLock, get_ident
from time import monotonic

from ilf_trt.errors import Cancelled, InvalidRequest, TimedOut

from .session import Session

CLOSED = "this pipeline is closed; load the bundle again"
NESTED = "a generation is called inside of another, such as from its progress; call it after, or from another thread"
LOOK_S = 0.02  # how late a waiting request sees that it is cancelled: an Event wakes nobody but who waits for it
LOOK_AGAIN_S = 1.0  # an interrupt may have ended the thread that was to wake this one


class Wait:
    """How long a request waits for its place: until `timeout` seconds have passed, or `cancel` is set."""

    def __init__(self, timeout: float | None = None, cancel: Event | None = None) -> None:
        self._timeout, self._cancel = timeout, cancel
        self._end = None if timeout is None else monotonic() + timeout

    def check_time(self, what: str) -> None:
        """Raise TimedOut, which says `what`, when the time has passed."""
        if self._end is not None and monotonic() >= self._end:
            raise TimedOut(f"{what} within {self._timeout:g} s")

    def check_cancel(self) -> None:
        """Raise Cancelled when `cancel` is set."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("the generation was cancelled before it began")

    @property
    def slice_s(self) -> float:
        """Seconds until the next check."""
        longest = LOOK_AGAIN_S if self._cancel is None else LOOK_S
        return longest if self._end is None else min(longest, max(self._end - monotonic(), 0.0))


FOREVER = Wait()


class Place:
    """Room for one generation at a time; its `session` stays from one loan to the next."""

    __slots__ = ("back", "loan", "session")

    def __init__(self) -> None:
        self.session: Session | None = None
        self.loan: Loan | None = None
        self.back = 0  # the place that came back last has the highest number

    @property
    def free(self) -> bool:
        return self.loan is None or self.loan.over


class Loan:
    """One thread that has a place or waits for one: for `wanted`, or for any if that is None."""

    __slots__ = ("over", "thread", "wanted", "woken")

    def __init__(self, wanted: Place | None, woken: Condition) -> None:
        self.thread = get_ident()
        self.wanted, self.woken = wanted, woken
        self.over = False


class Lending:
    """Some places and the queue for them; the last who gives a place back after `close` frees everything.

    A thread has at most one place, and nobody holds a place while waiting for another, so there is no deadlock. The
    first in the queue is served first, so nobody starves. A fork has a copy without the threads that would give the
    places back: it is refused before it touches the lock.
    """

    def __init__(self, places: int, free: Callable[[], None]) -> None:
        """`free` is called once, by one thread, when the lending is closed and no place is lent."""
        self.places = tuple(Place() for _ in range(places))
        self._free = free
        self._process = os.getpid()
        self._lock = RLock()  # a signal handler may close the pipeline while its thread is in here
        self._ended = Condition(self._lock)
        self._queue: list[Loan] = []
        self._numbers = count(1)
        self._closing = self._freed = False
        self._freeing: int | None = None

    @contextmanager
    def lend(self, wait: Wait = FOREVER, place: Place | None = None) -> Iterator[Place]:
        """`place`, or any, for the time of the `with` block. Raises InvalidRequest, TimedOut, Cancelled."""
        self.check_open()
        loan = Loan(place, Condition(self._lock))
        try:
            yield self._take(loan, wait)
        finally:
            loan.over = True  # before any call: an interrupt comes between calls, and would keep the place for ever
            self._give_back(loan)

    def check_open(self) -> None:
        """Raise InvalidRequest when closed, in a fork, and in a thread that has a place."""
        if self._is_foreign():
            raise InvalidRequest(
                f"this pipeline was loaded in process {self._process} and cannot be used in its fork {os.getpid()}; "
                "load it in the process that uses it, or start processes by spawn"
            )
        if self._closing:
            raise InvalidRequest(CLOSED)
        if self._has_place(get_ident()):
            raise InvalidRequest(NESTED)

    def close(self, timeout: float | None = None) -> None:
        """Turn away who waits, and wait until everything is freed, which the last who has a place does.

        Does not wait in a thread that has a place: it may be the last. Raises TimedOut. In a fork there is nothing to
        free.
        """
        if self._is_foreign():
            return
        wait, me = Wait(timeout), get_ident()
        self._closing = True
        while True:
            self._free_if_last()
            with self._lock:
                for loan in self._queue:
                    loan.woken.notify()
                if self._freed or self._freeing == me or self._has_place(me):
                    return
                wait.check_time("the generations that run did not end")
                self._ended.wait(wait.slice_s)

    def _take(self, loan: Loan, wait: Wait) -> Place:
        wait.check_cancel()
        with self._lock:
            self._queue.append(loan)
        while True:
            with self._lock:
                if self._closing:
                    raise InvalidRequest(CLOSED)
                self._hand_out()
                place = self._place_of(loan)
                if place is not None:
                    return place
                wait.check_time("no session was free")
                loan.woken.wait(wait.slice_s)
            wait.check_cancel()  # without the lock: it is the caller's code

    def _give_back(self, loan: Loan) -> None:
        if self._is_foreign():
            return
        with self._lock:
            place = self._place_of(loan)
            if place is not None:
                place.back, place.loan = next(self._numbers), None
            self._hand_out()
        self._free_if_last()

    def _hand_out(self) -> None:
        """Give the free places to the first in the queue who take them; the place that came back last goes first."""
        free = sorted((place for place in self.places if place.free), key=lambda place: place.back)
        waiting = []
        for loan in self._queue:
            if loan.over or self._place_of(loan) is not None:
                continue  # an interrupt came before it left the queue
            if self._closing or not free or (loan.wanted is not None and loan.wanted not in free):
                waiting.append(loan)
                continue
            place = loan.wanted or free[-1]
            free.remove(place)
            place.loan = loan
            loan.woken.notify()
        self._queue = waiting

    def _free_if_last(self) -> None:
        """Free everything if it is closed, nobody has a place, and no other thread does it."""
        me = get_ident()
        try:
            with self._lock:
                if not self._closing or self._is_lent() or self._freeing is not None:
                    return
                self._freeing = me
            self._free()
        finally:
            if self._freeing == me:
                with self._lock:
                    self._freed = True
                    self._ended.notify_all()

    def _place_of(self, loan: Loan) -> Place | None:
        return next((place for place in self.places if place.loan is loan), None)

    def _has_place(self, thread: int) -> bool:
        loans = [place.loan for place in self.places]
        return any(loan is not None and not loan.over and loan.thread == thread for loan in loans)

    def _is_lent(self) -> bool:
        return not all(place.free for place in self.places)

    def _is_foreign(self) -> bool:
        return os.getpid() != self._process
