"""The entry of the command line: catches signals before it loads anything, and turns every end into an exit code.

This file and what it imports are light, so that a signal finds its handler a few milliseconds after Python runs.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from . import interrupts
from .errors import IlfError, one_line, shown

FAILED = 2
INTERRUPTED = 130
TRACEBACK = "ILF_TRT_TRACEBACK"
"""With this set in the environment, the traceback of an error is printed before its line."""

BOLD_RED, PLAIN = "\x1b[1;31m", "\x1b[0m"


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 2 for an error of one line; 130 or 143 after a signal.

    Without `tokens` the process belongs to the command: it catches signals, and repairs standard streams.
    """
    code = INTERRUPTED
    try:
        if tokens is None:
            interrupts.catch_signals()
        code = _run(tokens)
        if tokens is None and interrupts.interrupted_code() is None:
            interrupts.end_at_once()
    except KeyboardInterrupt:  # a signal between two lines of this file; it raises once
        pass
    interrupted = interrupts.interrupted_code()
    if interrupted is not None:  # also one that a callback lost, or that came out as another error
        if tokens is None:
            from .files import drop_drafts

            drop_drafts()
        _say("interrupted; nothing half-written was left behind")
        code = interrupted
    if tokens is None:
        interrupts.end_at_once()
        _drop_unwritten()
    return code


def _run(tokens: Sequence[str] | None) -> int:
    try:
        if tokens is None:
            _repair_streams()
        from .commands.app import run

        run(tokens)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # rich's way of saying so
            return 0
        return left.code if isinstance(left.code, int) else FAILED if left.code else 0
    except KeyboardInterrupt:
        if interrupts.interrupted_code() is None:
            _say("interrupted; nothing half-written was left behind")
        return INTERRUPTED
    except BrokenPipeError as error:
        return 0 if _reader_left() else _fail(error)
    except BaseException as error:  # pyo3's panics are no Exception
        return _fail(error)
    return 0


def _fail(error: BaseException) -> int:
    if os.environ.get(TRACEBACK):
        import traceback

        with suppress(OSError, ValueError):
            traceback.print_exception(error)
    if interrupts.interrupted_code() is None:
        _say(f"error: {_message(error)}")
    return FAILED


def _message(error: BaseException) -> str:
    if isinstance(error, IlfError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{shown(str(error.filename))}: " if error.filename else ""
        return f"{where}{shown(error.strerror)}"
    if isinstance(error, MemoryError):
        return f"out of memory ({one_line(error)}); use a smaller batch or size, or a machine with more memory"
    return (
        f"{type(error).__name__}: {one_line(error)}; this is a fault of ilf-trt, please report it with the traceback "
        f"that {TRACEBACK}=1 prints"
    )


def _say(line: str) -> None:
    """One line on standard error; if nobody can read it, the exit code says enough."""
    stream = sys.stderr
    with suppress(OSError, ValueError, AttributeError):
        colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        stream.write(f"{BOLD_RED}{line}{PLAIN}\n" if colour else f"{line}\n")
        stream.flush()


def _repair_streams() -> None:
    """Let nothing but the terminal have the numbers 0 to 2, and escape what it cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
        elif number:
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _reader_left() -> bool:
    """Whether it is standard output that nobody reads any more, as after `| head`."""
    import select

    poll = select.poll()
    with suppress(OSError, ValueError):  # a stream without a number
        poll.register(sys.stdout.fileno(), 0)  # the end of the other side is told in any case
        return bool(poll.poll(0))
    return False


def _drop_unwritten() -> None:
    """Empty the standard streams, so that Python does not fail to at its end and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
