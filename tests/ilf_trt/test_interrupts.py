"""A signal is noted where it arrives, so that code which swallows the exception cannot swallow the request."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ilf_trt import interrupts
from ilf_trt.cli import main
from ilf_trt.commands.progress_bar import progress_bar
from ilf_trt.files import whole_file, whole_folder
from ilf_trt.interrupts import Interrupted, check_interrupted, hold_first_signal, interrupted_code

CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Signals are caught as in a command; gives what reaches the hook for exceptions that nobody can catch."""
    lost: list[Any] = []
    handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    monkeypatch.setattr(interrupts, "_first", None)
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    interrupts.catch_signals()
    yield lost
    atexit.unregister(interrupts._ignore)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes that the process would have ended with."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def from_c(number: signal.Signals) -> None:
    """In a callback that C calls: ctypes prints what is raised there, and drops it."""

    def compare(*_: object) -> int:
        signal.raise_signal(number)
        return 0

    two = (ctypes.c_int * 2)(2, 1)
    ctypes.CDLL(None).qsort(two, 2, ctypes.sizeof(ctypes.c_int), CALLBACK(compare))


def from_a_finalizer(number: signal.Signals) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(number)

    Finalized()


def from_a_broad_except(number: signal.Signals) -> None:
    with suppress(BaseException):
        signal.raise_signal(number)


SWALLOWED = [from_c, from_a_finalizer, from_a_broad_except]


@contextmanager
def told(place: Path) -> Iterator[None]:
    with progress_bar() as tell:
        yield
        tell("step", 1, 2)


@contextmanager
def checked(place: Path) -> Iterator[None]:
    yield
    check_interrupted()


@contextmanager
def filed(place: Path) -> Iterator[None]:
    with whole_file(place) as draft:
        draft.write_text("new")
        yield


@contextmanager
def foldered(place: Path) -> Iterator[None]:
    with whole_folder(place, replace=False):
        yield


@pytest.mark.parametrize(("sent", "code"), CODES)
def test_a_signal_raises_where_it_arrives(caught: list[Any], sent: signal.Signals, code: int) -> None:
    check_interrupted()
    assert interrupted_code() is None
    with pytest.raises(Interrupted):
        signal.raise_signal(sent)
    assert interrupted_code() == code


@pytest.mark.parametrize("swallow", SWALLOWED)
@pytest.mark.parametrize("work", [checked, told, filed, foldered])
@pytest.mark.parametrize(("sent", "code"), CODES)
def test_a_signal_that_was_swallowed_is_raised_again_before_anything_takes_its_place(
    caught: list[Any],
    tmp_path: Path,
    swallow: Callable[[signal.Signals], None],
    work: Callable[[Path], Any],
    sent: signal.Signals,
    code: int,
) -> None:
    with pytest.raises(Interrupted), work(tmp_path / "result"):
        swallow(sent)
    assert interrupted_code() == code
    assert list(tmp_path.iterdir()) == []
    assert caught == []  # nobody reads of an exception that was no fault


def test_another_exception_of_a_finalizer_is_told_as_before(caught: list[Any]) -> None:
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("a fault")

    Faulty()
    assert [str(each.exc_value) for each in caught] == ["a fault"]


def test_other_threads_go_on_after_a_signal(caught: list[Any]) -> None:
    from_a_broad_except(signal.SIGTERM)
    ran: list[str] = []

    def work() -> None:
        check_interrupted()
        ran.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == ["done"]


def test_a_signal_that_is_sent_twice_at_once_is_one(caught: list[Any], exits: list[int]) -> None:
    from_a_broad_except(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert (interrupted_code(), exits) == (143, [])


def test_a_second_signal_later_ends_the_process(
    caught: list[Any], exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_a_broad_except(signal.SIGTERM)
    monkeypatch.setattr(interrupts, "SAME_S", 0.0)
    time.sleep(1e-3)
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]


@pytest.mark.parametrize(("sent", "code"), CODES)
def test_a_signal_after_the_command_ends_the_process(
    caught: list[Any], exits: list[int], sent: signal.Signals, code: int
) -> None:
    interrupts.end_at_once()
    signal.raise_signal(sent)
    assert (interrupted_code(), exits) == (None, [code])


def test_the_first_signal_is_held_and_a_later_one_goes_its_way(
    caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with hold_first_signal() as held:
        assert held == []
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the same request, sent twice
        assert held == [signal.SIGTERM]
        assert interrupted_code() is None
        monkeypatch.setattr(interrupts, "SAME_S", 0.0)
        time.sleep(1e-3)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert held == [signal.SIGTERM]
    assert interrupted_code() == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_a_program_calls_leaves_its_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    assert main(["plan", "--blocks", "2", "--steps", "1", "--feedback", "none"]) == 0
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    assert interrupted_code() is None
