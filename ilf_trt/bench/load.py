"""A load of requests on a target: closed clients, or an open stream that does not wait for a slow target."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.errors import IlfError, InvalidRequest, told

if TYPE_CHECKING:
    from ilf_trt.runtime.pipeline import Pipeline

MOST_CLIENTS = 1024
MOST_RATE = 10_000.0
MOST_REQUESTS = 1_000_000
MOST_SECONDS = 86_400.0
OPEN_CLIENTS = 256
"""Requests that a stream without `clients` has under way at most; later ones wait in the client."""
WARM_UPS = 8
LOOK_S = 0.05  # how late the main thread sees that the time is over, or that it is asked to stop


@dataclass(frozen=True, slots=True)
class Served:
    """What a target tells about one answer.

    `service_ms` is the time of its own work, without any wait; None if it does not say.
    """

    service_ms: float | None = None
    pictures: int = 1


class Target(Protocol):
    """What gets the load: called with a seed in many threads at once; an IlfError that it raises is a failure."""

    def __call__(self, seed: int, /) -> Served | None: ...


class Clock:
    """Seconds from any origin, and a sleep that ends early when `stop` is set. Tests replace it."""

    def now_s(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float, stop: Event) -> None:
        stop.wait(seconds)


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    With `rate`, an open stream: Poisson arrivals at `rate` requests a second, at most `clients` under way, the others
    wait in the client, and their wait counts. Without, `clients` clients, each of which sends its next request when its
    last one is answered. The load ends after `requests` requests or when `max_seconds` are over, whichever comes first.
    """

    clients: int
    rate: float | None
    requests: int
    max_seconds: float
    warm_ups: int
    seed: int

    @classmethod
    def of(
        cls,
        clients: int | None = None,
        rate: float | None = None,
        *,
        requests: int | None = None,
        max_seconds: float | None = None,
        warm_ups: int = WARM_UPS,
        seed: int = 0,
    ) -> "Load":
        """A load from what the user gave, None for what the user left out; raises InvalidRequest.

        One of `clients` and `rate` is needed, and one of `requests` and `max_seconds`.
        """
        if clients is None and rate is None:
            raise InvalidRequest("a load needs --clients or --rate; pass one of them, such as --clients 4")
        if requests is None and max_seconds is None:
            raise InvalidRequest("a load needs an end; pass --max-seconds or --requests")
        _check_whole("--clients", clients, 1, MOST_CLIENTS)
        _check_whole("--requests", requests, 1, MOST_REQUESTS)
        _check_whole("warm_ups", warm_ups, 0, MOST_REQUESTS)
        _check_positive("--rate", rate, MOST_RATE, "requests a second")
        _check_positive("--max-seconds", max_seconds, MOST_SECONDS, "seconds")
        return cls(
            clients if clients is not None else OPEN_CLIENTS,
            rate,
            requests if requests is not None else MOST_REQUESTS,
            max_seconds if max_seconds is not None else MOST_SECONDS,
            warm_ups,
            seed,
        )

    def arrivals_s(self) -> Iterator[float]:
        """Intended starts of an open stream, in seconds from its begin: exponential gaps, the same for a seed."""
        assert self.rate is not None
        random, at_s = Random(self.seed), 0.0
        while True:
            at_s += random.expovariate(self.rate)
            yield at_s


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that was sent; all times in seconds from the begin of the load.

    `intended_s` is when it was due, `sent_s` when a client was free to send it, `ended_s` when the answer or the
    failure came. `failure` is the class of its IlfError, empty for an answer.
    """

    number: int
    intended_s: float
    sent_s: float
    ended_s: float
    served: Served = field(default_factory=Served)
    failure: str = ""

    @property
    def latency_ms(self) -> float:
        """From the intended start, so that a request which could not be sent in time is not the faster for it."""
        return (self.ended_s - self.intended_s) * 1000

    @property
    def client_queue_ms(self) -> float:
        """The wait in the client, because all its clients were busy."""
        return (self.sent_s - self.intended_s) * 1000

    @property
    def target_queue_ms(self) -> float | None:
        """From sending to the answer, less the target's own work; None if the target does not tell that."""
        service_ms = self.served.service_ms
        return None if service_ms is None else (self.ended_s - self.sent_s) * 1000 - service_ms


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What happened: the requests in the order in which they were due, and those that nobody answered.

    `unanswered` were due, but still waited when the time was over or the user stopped it. `span_s` is the time in which
    requests were due, `duration_s` that until the last answer. `finished` is False after a stop by the user.
    """

    samples: tuple[Sample, ...]
    unanswered: int
    warm_ups: int
    span_s: float
    duration_s: float
    finished: bool


def pipeline_target(pipeline: "Pipeline", request: Mapping[str, Any]) -> Target:
    """A pipeline in this process; `request` is what `Pipeline.generate` takes, without a seed."""

    def serve(seed: int, /) -> Served:
        result = pipeline.generate(**request, seed=seed)
        return Served(result.timings.total_ms, len(result.latents))

    return serve


def run_load(
    load: Load,
    target: Target,
    *,
    stop: Callable[[], bool] = lambda: False,
    turn_away: Callable[[], None] = lambda: None,
    progress: Progress = no_progress,
    clock: Clock | None = None,
) -> LoadRun:
    """Send a load and wait for its answers.

    The first `load.warm_ups` requests are answered before it begins and are no samples; the first that fails among them
    is raised. Later IlfErrors are failures of their request. Any other exception ends the load and is raised.

    `stop` is asked every 50 ms whether to end early. `turn_away` is called once when the time is over or `stop` says
    so: it makes the target refuse what still waits there, such as `Pipeline.close`. What then fails is unanswered.
    """
    return _Sending(load, target, clock or Clock(), stop, turn_away, progress).run()


@dataclass(frozen=True, slots=True)
class _Ticket:
    """The right to send one request at `intended_s`."""

    number: int
    intended_s: float


class _Sending:
    """A load while it runs.

    Each thread takes the next arrival, sleeps until it is due, and sends it. So a stream needs no queue: an arrival
    that is past its time when a thread takes it has waited in the client.
    """

    def __init__(
        self,
        load: Load,
        target: Target,
        clock: Clock,
        stop: Callable[[], bool],
        turn_away: Callable[[], None],
        progress: Progress,
    ) -> None:
        self._load, self._target, self._clock = load, target, clock
        self._asked_to_stop, self._turn_away, self._progress = stop, turn_away, progress
        self._lock, self._stop = Lock(), Event()
        self._origin_s, self._stopped_s = 0.0, math.inf
        self._interrupted = False
        self._arrivals = None if load.rate is None else load.arrivals_s()
        self._warmed = self._taken = self._unanswered = 0
        self._samples: list[Sample] = []
        self._error: BaseException | None = None

    def run(self) -> LoadRun:
        load = self._load
        self._run_threads(self._warm_up, min(load.warm_ups, load.clients), math.inf)
        if not self._stop.is_set():
            self._run_threads(self._send, min(load.clients, load.requests), load.max_seconds)
            self._count_unsent()
        samples = tuple(sorted(self._samples, key=lambda sample: (sample.intended_s, sample.number)))
        duration_s = max((sample.ended_s for sample in samples), default=0.0)
        span_s = min(self._stopped_s, load.max_seconds)
        if self._taken == load.requests and samples:
            span_s = samples[-1].intended_s
        return LoadRun(
            samples,
            self._unanswered,
            self._warmed,
            duration_s if self._arrivals is None else span_s,
            duration_s,
            not self._interrupted,
        )

    def _run_threads(self, work: Callable[[], None], count: int, limit_s: float) -> None:
        """`work` in `count` threads that begin together, until all have ended; raises what one of them raised."""
        begin = Event()

        def wait_and_work() -> None:
            begin.wait()
            try:
                work()
            except BaseException as error:
                self._error = self._error or error
                self._stop.set()

        threads = [Thread(target=wait_and_work, name=f"client {number}", daemon=True) for number in range(count)]
        try:
            for thread in threads:
                thread.start()
            self._origin_s = self._clock.now_s()
            begin.set()
            self._watch(threads, limit_s)
        except BaseException:
            self._stop.set()
            begin.set()
            raise
        if self._error is not None:
            raise self._error

    def _watch(self, threads: list[Thread], limit_s: float) -> None:
        """Wait for the threads; end the load when its time is over or when asked to, and turn away who waits then."""
        turned_away = False
        for thread in threads:
            while thread.is_alive():
                thread.join(LOOK_S)
                if self._asked_to_stop() and not self._stop.is_set():
                    self._interrupted = True
                    self._end_at(self._now_s())
                elif self._now_s() >= limit_s:
                    self._end_at(limit_s)
                if self._stop.is_set() and not turned_away and thread.is_alive():
                    turned_away = True
                    self._turn_away()
                self._tell()

    def _tell(self) -> None:
        load, answered = self._load, len(self._samples)
        if load.requests < MOST_REQUESTS:
            self._progress("load", answered, load.requests)
        else:
            seconds = min(self._now_s(), load.max_seconds)
            self._progress("load", int(seconds), math.ceil(load.max_seconds), f"{answered} answered")

    def _warm_up(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                if self._warmed == self._load.warm_ups:
                    return
                number, self._warmed = self._warmed, self._warmed + 1
            try:
                self._target(number)
            except IlfError:
                if not self._stop.is_set():
                    raise

    def _send(self) -> None:
        while (ticket := self._take()) is not None:
            wait_s = ticket.intended_s - self._now_s()
            if wait_s > 0:
                self._clock.sleep(wait_s, self._stop)
            sent_s = max(self._now_s(), ticket.intended_s)
            if self._stop.is_set():
                with self._lock:
                    self._unanswered += ticket.intended_s < self._stopped_s
                return
            served, failure = Served(), ""
            try:
                served = self._target(ticket.number) or served
            except IlfError as error:
                failure = type(error).__name__
            sample = Sample(ticket.number, ticket.intended_s, sent_s, self._now_s(), served, failure)
            with self._lock:
                if failure and self._stop.is_set():
                    self._unanswered += 1
                else:
                    self._samples.append(sample)

    def _take(self) -> _Ticket | None:
        """The next request; None when there is none before the end."""
        with self._lock:
            now_s, load = self._now_s(), self._load
            if now_s >= load.max_seconds:
                self._end_at(load.max_seconds)
            if self._stop.is_set() or self._taken == load.requests:
                return None
            intended_s = now_s if self._arrivals is None else next(self._arrivals)
            if intended_s >= load.max_seconds:
                return None
            self._taken += 1
            return _Ticket(self._taken - 1, intended_s)

    def _count_unsent(self) -> None:
        """Count the arrivals that were due before the end, and that no thread has taken."""
        if self._arrivals is None or not self._stop.is_set():
            return
        while self._taken < self._load.requests and next(self._arrivals) < self._stopped_s:
            self._taken += 1
            self._unanswered += 1

    def _end_at(self, seconds: float) -> None:
        if not self._stop.is_set():
            self._stopped_s = seconds
            self._stop.set()

    def _now_s(self) -> float:
        return self._clock.now_s() - self._origin_s


def _check_whole(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise InvalidRequest(f"{name} is {told(value)}, it must be a whole number from {least} to {most}")


def _check_positive(name: str, value: float | None, most: float, unit: str) -> None:
    if value is not None and not 0 < value <= most:  # NaN too
        raise InvalidRequest(f"{name} is {told(value)}, it must be a number of {unit} above 0, at most {most:g}")
