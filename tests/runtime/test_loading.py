"""Turns and sessions: whatever threads, forks and cancellations do, every call ends and the pipeline stays usable."""

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.errors import Cancelled, IlfError, InvalidRequest, TimedOut
from ilf_trt.runtime.loading import Resident, Sequential, Turns, Wait
from ilf_trt.runtime.pipeline import Pipeline, processors

TIMEOUT_S = 20.0
LABELS = {"class_labels": [3]}


class FakeSession:
    """A session that notices when two threads are in it at once, or when it is used after its end."""

    def __init__(self) -> None:
        self.inside, self.closed, self.runs = 0, False, 0

    def work(self, seconds: float) -> None:
        assert not self.closed
        assert not self.inside
        self.inside += 1
        time.sleep(seconds)
        self.inside -= 1
        self.runs += 1

    def close(self) -> None:
        assert not self.inside
        assert not self.closed
        self.closed = True


class FakeBackend:
    on_gpu, description, max_sessions = False, "fake", None

    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []
        self.closed = 0

    def session(self, max_trajectories: int = 4) -> Any:
        self.sessions.append(FakeSession())
        return self.sessions[-1]

    def close(self) -> None:
        assert all(session.closed for session in self.sessions)
        self.closed += 1


def use(loading: Any, seconds: float = 0.0, wait: Wait | None = None) -> None:
    with loading.session("transformer", wait or Wait()) as session:
        session.work(seconds)


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except IlfError as error:
        return type(error).__name__
    return "done"


@pytest.mark.fuzz
@given(seed=st.integers(0, 1 << 30), sessions=st.integers(1, 3))
def test_any_mix_of_threads_ends(seed: int, sessions: int) -> None:
    backend = FakeBackend()
    loading = Resident(backend, sessions)
    dice = random.Random(seed)

    def one(choice: int) -> str:
        cancel = threading.Event()
        if choice % 5 == 0:
            return outcome(lambda: loading.warm(lambda: use(loading)))
        if choice % 5 == 1:
            cancel.set()
            return outcome(lambda: use(loading, 0, Wait(None, cancel)))
        if choice % 5 == 2:
            return outcome(lambda: use(loading, 0.001, Wait(0.0005)))
        if choice == 13:
            return outcome(loading.close)
        return outcome(lambda: use(loading, 0.0002))

    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(one, dice.randrange(15)) for _ in range(12)]
        outcomes = {future.result(TIMEOUT_S) for future in futures}
    assert outcomes <= {"done", "Cancelled", "TimedOut", "InvalidRequest"}
    loading.close()
    assert backend.closed == 1
    assert len(backend.sessions) <= sessions
    assert outcome(lambda: use(loading)) == "InvalidRequest"


def test_two_warm_ups_at_once_warm_every_session(dit_bundle: Path) -> None:
    backend = FakeBackend()
    loading = Resident(backend, 3)
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(loading.warm, lambda: use(loading, 0.002)) for _ in range(2)]:
            future.result(TIMEOUT_S)
    assert [session.runs >= 1 for session in backend.sessions] == [True] * 3
    with Pipeline.load(dit_bundle, threads=1, sessions=2, check_hashes=False) as pipeline:
        with ThreadPoolExecutor(2) as threads:
            for future in [threads.submit(pipeline.warm_up, 1) for _ in range(2)]:
                future.result(TIMEOUT_S)
        pipeline.generate(**LABELS)


def test_a_cancelled_request_does_not_queue() -> None:
    turns, cancel = Turns(1), threading.Event()
    with ThreadPoolExecutor(1) as threads, turns.turn(Wait()):
        waiting = threads.submit(outcome, lambda: turns.turn(Wait(None, cancel)).__enter__())
        time.sleep(0.02)
        begin = time.monotonic()
        cancel.set()
        assert waiting.result(TIMEOUT_S) == "Cancelled"
        assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize("loading", [Resident(FakeBackend(), 1), Sequential(lambda _: FakeBackend())])
def test_close_turns_away_who_waits_and_waits_for_who_runs(loading: Any) -> None:
    running, go = threading.Event(), threading.Event()

    def run() -> None:
        with loading.session("transformer"):
            running.set()
            go.wait(TIMEOUT_S)

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(outcome, run)
        assert running.wait(TIMEOUT_S)
        second = threads.submit(outcome, lambda: use(loading))
        assert outcome(lambda: use(loading, 0, Wait(0.01))) == "TimedOut"
        closing = threads.submit(outcome, loading.close)
        assert second.result(TIMEOUT_S) == "InvalidRequest"
        assert not closing.done()
        go.set()
        assert (first.result(TIMEOUT_S), closing.result(TIMEOUT_S)) == ("done", "done")


def test_a_close_ends_after_its_time() -> None:
    loading = Resident(FakeBackend(), 1)
    with ThreadPoolExecutor(1) as threads, loading.session("transformer"):
        assert threads.submit(outcome, lambda: loading.close(0.01)).result(TIMEOUT_S) == "TimedOut"
    loading.close()


def test_inside_of_a_generation_there_is_neither_another_nor_a_close(dit_bundle: Path) -> None:
    with Pipeline.load(dit_bundle, threads=1, sessions=1, check_hashes=False) as pipeline:
        for call in (lambda: pipeline.generate(**LABELS), pipeline.close, lambda: pipeline.warm_up(1)):
            with pytest.raises(InvalidRequest, match="inside of"):
                pipeline.generate(**LABELS, progress=lambda *_, call=call: call())
        pipeline.generate(**LABELS)


def test_a_fork_is_refused_and_ends(dit_bundle: Path) -> None:
    with Pipeline.load(dit_bundle, threads=1, sessions=1, check_hashes=False) as pipeline:
        pipeline.generate(**LABELS)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            told = [outcome(lambda: pipeline.generate(**LABELS)), outcome(lambda: pipeline.warm_up(1))]
            told.append(outcome(pipeline.close))
            os.write(writer, " ".join(told).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            assert answer.read() == "InvalidRequest InvalidRequest done"
        assert os.waitpid(child, 0)[1] == 0
        pipeline.generate(**LABELS)


def test_a_set_cancel_runs_no_step(dit_bundle: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with Pipeline.load(dit_bundle, threads=1, sessions=1, check_hashes=False) as pipeline:
        with pytest.raises(Cancelled, match="before it began"):
            pipeline.generate(**LABELS, cancel=cancel)
        with pytest.raises(TimedOut, match="no session was free within 0"):
            _busy(pipeline)


def _busy(pipeline: Pipeline) -> None:
    """A request that cannot wait, while another runs."""
    running, go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        running.set()
        go.wait(TIMEOUT_S)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(lambda: pipeline.generate(**LABELS, progress=hold))
        try:
            assert running.wait(TIMEOUT_S)
            pipeline.generate(**LABELS, timeout=0)
        finally:
            go.set()
            first.result(TIMEOUT_S)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 99_999},
        {"threads": processors() + 1},
        {"threads": -1},
        {"threads": True},
        {"threads": "4"},
        {"sessions": 0},
        {"sessions": "4"},
        {"sessions": 1e9},
        {"sessions": 1 << 40},
        {"kept": 0},
        {"kept": None},
        {"max_memory": 0},
        {"max_memory": "8"},
        {"device": None},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_a_pipeline_is_not_loaded_with_nonsense(options: dict[str, Any], dit_bundle: Path) -> None:
    with pytest.raises(InvalidRequest):
        Pipeline.load(dit_bundle, check_hashes=False, **options)


@pytest.mark.parametrize("options", [{"timeout": -1}, {"timeout": "1"}, {"timeout": float("nan")}, {"cancel": True}])
def test_a_wait_that_is_none_is_refused(options: dict[str, Any], dit_bundle: Path) -> None:
    with Pipeline.load(dit_bundle, threads=1, check_hashes=False) as pipeline, pytest.raises(InvalidRequest):
        pipeline.generate(**LABELS, **options)
