"""A load counts what a target did, and what it kept waiting, on a clock that nobody waits for."""

import math
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from threading import Event, Lock
from typing import Any

import numpy as np
import pytest

from ilf_trt.bench.load import MOST_RATE, Load, LoadRun, Sample, Served, Target, pipeline_target, run_load
from ilf_trt.errors import InvalidRequest, NonFinite, TimedOut
from ilf_trt.interrupts import hold_first_signal
from ilf_trt.runtime.pipeline import Pipeline
from tests.ilf_trt.bench.virtual_clock import VirtualClock

WORK_S = 0.001
STALL_S = 1.0
EXACT = 1e-9  # seconds; the sums of a virtual clock round


class Worker:
    """A target that works `seconds(number)` on a virtual clock, one request at a time or many."""

    def __init__(self, clock: VirtualClock, seconds: Any) -> None:
        self.clock, self.seconds = clock, seconds
        self.seeds: list[int] = []
        self.under_way: list[int] = []
        self._count, self._lock = 0, Lock()

    def __call__(self, seed: int, /) -> Served:
        with self._lock:
            self.seeds.append(seed)
            self._count += 1
            self.under_way.append(self._count)
        work_s = self.seconds(seed)
        self.clock.pass_time(work_s)
        with self._lock:
            self._count -= 1
        return Served(work_s * 1000)


def run_on(clock: VirtualClock, load: Load, target: Target, **rest: Any) -> LoadRun:
    return run_load(load, target, clock=clock, **rest)


def test_a_closed_loop_keeps_exactly_its_clients_busy() -> None:
    clock = VirtualClock()
    times_s = [Random(seed).uniform(0.1, 2.0) for seed in range(1000)]
    worker = Worker(clock, times_s.__getitem__)
    run = run_on(clock, Load.of(4, max_seconds=60.0, warm_ups=0), worker)
    assert max(worker.under_way) == 4
    for at_s in np.linspace(0.05, 59.95, 400):
        assert sum(sample.sent_s < at_s < sample.ended_s for sample in run.samples) == 4
    assert all(sample.sent_s < 60.0 for sample in run.samples)
    assert run.duration_s > 60.0  # the last answers are waited for
    assert run.finished


def test_a_closed_client_sends_when_its_last_request_is_answered() -> None:
    clock = VirtualClock()
    run = run_on(clock, Load.of(1, requests=5, warm_ups=0), Worker(clock, lambda seed: 0.5 + seed))
    assert [sample.number for sample in run.samples] == [0, 1, 2, 3, 4]
    for last, following in zip(run.samples, run.samples[1:], strict=False):
        assert following.intended_s == last.ended_s
    assert run.duration_s == pytest.approx(5 * 0.5 + 10)


@pytest.mark.parametrize("clients", [1, 3])
def test_a_stall_shows_in_the_latency_of_every_request_that_was_due_in_it(clients: int) -> None:
    """Coordinated omission: at 100 a second, one stall of a second is one slow request for a client that waits."""
    clock, load = VirtualClock(), Load.of(clients, 100.0, max_seconds=5.0, warm_ups=0, seed=3)
    due_s = [at_s for at_s in islice(load.arrivals_s(), 1000) if at_s < 5.0]
    stalled = len(due_s) // 2
    until_s = due_s[stalled] + STALL_S

    def seconds(number: int) -> float:
        begin_s = clock.now_s() - 1000.0
        return max(until_s - begin_s, 0.0) + WORK_S if due_s[stalled] - EXACT <= begin_s else WORK_S

    run = run_on(clock, load, Worker(clock, seconds))
    assert [sample.intended_s for sample in run.samples] == due_s
    free_s = [0.0] * clients
    for sample in run.samples:  # a queue by hand: the first client that is free takes the next arrival
        sent_s = max(sample.intended_s, min(free_s))
        ended_s = (until_s if due_s[stalled] <= sent_s + EXACT and sent_s < until_s else sent_s) + WORK_S
        free_s[free_s.index(min(free_s))] = ended_s
        assert sample.latency_ms == pytest.approx((ended_s - sample.intended_s) * 1000, abs=1e-3)
    latencies = [sample.latency_ms for sample in run.samples]
    served = [(sample.ended_s - sample.sent_s) * 1000 for sample in run.samples]
    p90, p99 = np.quantile(latencies, (0.9, 0.99))
    assert p90 > 400
    assert p99 > 900
    assert np.quantile(served, 0.99) == pytest.approx(WORK_S * 1000)  # what a client that waits would report


def test_a_stream_does_not_wait_for_answers() -> None:
    clock, load = VirtualClock(), Load.of(rate=50.0, requests=100, warm_ups=0)
    run = run_on(clock, load, Worker(clock, lambda seed: 3.0))
    assert all(sample.client_queue_ms == pytest.approx(0, abs=EXACT) for sample in run.samples)
    assert all(sample.latency_ms == pytest.approx(3000) for sample in run.samples)


def test_a_stream_with_clients_keeps_the_others_in_the_client() -> None:
    clock, load = VirtualClock(), Load.of(2, 100.0, requests=40, warm_ups=0)
    worker = Worker(clock, lambda seed: 1.0)
    run = run_on(clock, load, worker)
    assert max(worker.under_way) == 2
    assert run.samples[-1].client_queue_ms > 15_000  # 40 requests, two a second
    assert all(sample.target_queue_ms == pytest.approx(0, abs=1e-6) for sample in run.samples)


def test_arrivals_have_the_gaps_of_a_poisson_stream() -> None:
    load = Load.of(rate=20.0, requests=1, seed=5)
    gaps_s = np.diff([0.0, *islice(load.arrivals_s(), 20_000)])
    assert gaps_s.mean() == pytest.approx(1 / 20, rel=0.03)  # 1/sqrt(20,000) is 0.7 %
    assert gaps_s.std() == pytest.approx(1 / 20, rel=0.05)
    assert np.quantile(gaps_s, 0.5) == pytest.approx(math.log(2) / 20, rel=0.05)
    assert list(islice(load.arrivals_s(), 5)) == list(islice(Load.of(rate=20.0, requests=9, seed=5).arrivals_s(), 5))
    assert list(islice(load.arrivals_s(), 5)) != list(islice(Load.of(rate=20.0, requests=1, seed=6).arrivals_s(), 5))


def test_failures_are_counted_and_the_load_goes_on() -> None:
    clock = VirtualClock()

    def seconds(seed: int) -> float:
        if seed % 5 == 0:
            raise TimedOut("no session was free within 1 s")
        if seed % 7 == 0:
            raise NonFinite("loop_body gave NaN")
        return 0.1

    run = run_on(clock, Load.of(3, requests=70, warm_ups=0), Worker(clock, seconds))
    assert Counter(sample.failure for sample in run.samples) == {"": 48, "TimedOut": 14, "NonFinite": 8}
    assert run.unanswered == 0
    assert run.finished


def test_another_exception_ends_the_load() -> None:
    def broken(seed: int, /) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_on(VirtualClock(), Load.of(2, requests=70, warm_ups=0), broken)


def test_warm_ups_come_before_and_are_no_samples() -> None:
    clock = VirtualClock()
    worker = Worker(clock, lambda seed: 1.0)
    run = run_on(clock, Load.of(2, requests=6, warm_ups=4), worker)
    assert sorted(worker.seeds[:4]) == [0, 1, 2, 3]
    assert sorted(worker.seeds[4:]) == list(range(6))
    assert (run.warm_ups, len(run.samples), run.duration_s) == (4, 6, pytest.approx(3.0))


def test_a_warm_up_that_fails_ends_the_load_with_its_error() -> None:
    def refuse(seed: int, /) -> None:
        raise InvalidRequest("label 10 is too large")

    with pytest.raises(InvalidRequest, match="label 10"):
        run_on(VirtualClock(), Load.of(2, requests=70), refuse)


def test_a_stream_that_the_target_cannot_follow_counts_what_it_left() -> None:
    clock, load = VirtualClock(), Load.of(2, 10.0, max_seconds=20.0, warm_ups=0)
    due = sum(at_s < 20.0 for at_s in islice(load.arrivals_s(), 1000))
    run = run_on(clock, load, Worker(clock, lambda seed: 1.0))
    assert len(run.samples) + run.unanswered == due
    assert run.unanswered > due // 2
    assert (run.span_s, run.finished) == (20.0, True)


def test_a_signal_ends_the_load_and_keeps_what_was_measured() -> None:
    clock = VirtualClock()

    def seconds(seed: int) -> float:
        if seed == 30:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    with hold_first_signal() as held:
        run = run_on(
            clock, Load.of(2, max_seconds=86_000.0, warm_ups=0), Worker(clock, seconds), stop=lambda: bool(held)
        )
    assert held == [signal.SIGINT]
    assert not run.finished
    assert len(run.samples) >= 30
    assert run.duration_s < 86_000


def test_what_waits_at_the_target_is_turned_away_at_the_end() -> None:
    closed, all_wait = Event(), Event()
    waiting: list[int] = []

    def wait(seed: int, /) -> None:
        waiting.append(seed)
        if len(waiting) == 3:
            all_wait.set()
        assert closed.wait(10)
        if seed:
            raise InvalidRequest("this pipeline is closed")

    run = run_on(
        VirtualClock(), Load.of(3, max_seconds=60.0, warm_ups=0), wait, stop=all_wait.is_set, turn_away=closed.set
    )
    assert [sample.number for sample in run.samples] == [0]
    assert (run.unanswered, run.finished) == (2, False)


def test_a_latency_is_the_sum_of_its_parts() -> None:
    sample = Sample(7, intended_s=1.0, sent_s=1.25, ended_s=4.0, served=Served(service_ms=2000.0))
    assert (sample.client_queue_ms, sample.target_queue_ms, sample.latency_ms) == (250.0, 750.0, 3000.0)
    assert Sample(7, 1.0, 1.25, 4.0).target_queue_ms is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clients": 0}, "--clients is 0"),
        ({"clients": -3}, "--clients is -3"),
        ({"clients": True}, "--clients is True"),
        ({"clients": 10**6}, "--clients is 1000000"),
        ({"rate": 0.0}, "--rate is 0"),
        ({"rate": -1.0}, "--rate is -1"),
        ({"rate": math.nan}, "--rate is nan"),
        ({"rate": math.inf}, "--rate is inf"),
        ({"rate": MOST_RATE * 2}, "--rate is 20000"),
        ({}, "--clients or --rate"),
        ({"clients": 1, "requests": 0}, "--requests is 0"),
        ({"clients": 1, "max_seconds": math.nan}, "--max-seconds is nan"),
        ({"clients": 1, "max_seconds": 0.0}, "--max-seconds is 0"),
        ({"clients": 1, "max_seconds": None}, "--max-seconds or --requests"),
    ],
)
def test_a_load_that_cannot_be_is_refused_in_one_line(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as refused:
        Load.of(**{"max_seconds": 10.0, **wrong})
    assert "\n" not in str(refused.value)


def test_a_pipeline_is_a_target_that_tells_its_own_work(dit_bundle: Path) -> None:
    with Pipeline.load(dit_bundle, threads=1, sessions=1) as pipeline:
        target = pipeline_target(pipeline, {"class_labels": [1, 2], "steps": 2})
        run = run_load(Load.of(2, requests=6, warm_ups=2), target)
    assert [sample.served.pictures for sample in run.samples] == [2] * 6
    for sample in run.samples:
        assert sample.served.service_ms is not None
        assert sample.target_queue_ms is not None
        assert sample.served.service_ms > 0
        assert sample.target_queue_ms > 0
    # One session for two clients: some request waits while the other client's is served.
    waits_ms = [sample.target_queue_ms or 0 for sample in run.samples]
    assert max(waits_ms) > min(sample.served.service_ms or 0 for sample in run.samples) / 2
