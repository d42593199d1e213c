"""Signals that end a command: raised where they arrive, and noted, since a callback can lose what is raised in it.

Python prints and drops an exception that is raised in a callback of C, in `__del__` or in an import hook. So
`check_interrupted` looks at the note again: at every progress call, and before a file or a folder takes its place.
Only the command line catches signals; elsewhere the note stays empty.
"""

import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_BASE = 128  # a shell's exit code for a process that a signal ended: 130 for SIGINT, 143 for SIGTERM
SAME_S = 1.0  # timeout(1) and accelerate send one request twice

_first: tuple[int, float] | None = None  # the signal, and when it came


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    A type of its own: CPython ends a process by signal 2 after a plain KeyboardInterrupt has passed through an exec.
    """


def catch_signals() -> None:
    """From now on SIGTERM and SIGINT raise Interrupted in the main thread; a second one ends the process at once."""
    for number in SIGNALS:
        signal.signal(number, _receive)
    atexit.register(_ignore)  # Python ends in 10 ms and more, and takes its handlers down before
    drop = sys.unraisablehook

    def hook(lost: "sys.UnraisableHookArgs", /) -> None:
        if not issubclass(lost.exc_type, Interrupted):
            drop(lost)

    sys.unraisablehook = hook


def check_interrupted() -> None:
    """Raise Interrupted again if a signal came; call it in the main thread, other threads go on."""
    if _first is not None and _in_main_thread():
        raise Interrupted


def interrupted_code() -> int | None:
    """The exit code for the signal that came; None if none came."""
    return None if _first is None else EXIT_BASE + _first[0]


def end_at_once() -> None:
    """From now on a signal ends the process where it stands: the command is over, only Python has to end."""
    for number in SIGNALS:
        signal.signal(number, _leave)


@contextmanager
def hold_first_signal() -> Iterator[list[signal.Signals]]:
    """The signal that asked for a stop, filled while the block runs; a second one goes the way it went before."""
    held: list[signal.Signals] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    came_s = 0.0

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal came_s
        if not held:
            held.append(signal.Signals(number))
            came_s = time.monotonic()
        elif time.monotonic() - came_s > SAME_S:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, hold)
    try:
        yield held
    finally:
        restore()


def _receive(number: int, frame: FrameType | None) -> None:
    global _first
    now_s = time.monotonic()
    if _first is None:
        _first = number, now_s
        raise Interrupted
    if now_s - _first[1] > SAME_S:
        _leave(number, frame)


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_BASE + number)


def _in_main_thread() -> bool:
    import threading  # not at the top: the handlers stand a millisecond earlier

    return threading.current_thread() is threading.main_thread()
