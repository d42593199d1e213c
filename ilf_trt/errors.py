"""The one tree of errors that this package raises on purpose.

IlfError
├── InvalidRequest        an argument, label, seed or shape that cannot be served
├── Cancelled             a generation that its caller ended before it began or between two steps
├── TimedOut              a wait that took longer than its caller allowed
├── UnsupportedBackbone   a model class, or an option of it, that has no adapter
├── UnsupportedScheduler  a scheduler, or an option of it, that is not linear and deterministic
├── CheckpointError       an ILF checkpoint or its base that is missing, damaged or of another model
├── DataError             training data that is missing, damaged or in too large a part broken
│   └── BrokenSample      one sample that cannot be read; training counts it and takes the next
├── BundleError           a bundle that is missing, damaged, half-written or too new
├── PortMismatch          a tensor whose name, shape or dtype differs from the graph's port
├── ParityError           a graph that differs from the reference by more than its limit
├── EngineError           the engine library refused to load or to run a graph
├── NonFinite             a latent, a prediction or a picture that holds NaN or infinity
├── BenchmarkFailed       a benchmark of which some rows gave nothing
├── DeviceError           no GPU, no driver, or CUDA refused something
│   ├── OutOfMemory       the GPU has no room left; what was loaded before still works
│   └── DeviceLost        CUDA refuses everything in this process from now on
└── MissingDependency     an optional package that the asked command needs
"""

import reprlib

LINE_CHARS = 300
MESSAGE_CHARS = 400
VALUE_CHARS = 60

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, VALUE_CHARS, VALUE_CHARS, VALUE_CHARS


def one_line(error: BaseException | str, limit: int = LINE_CHARS) -> str:
    """What a foreign exception says, on one line of at most `limit` characters; its type if it says nothing."""
    text = (isinstance(error, OSError) and error.strerror) or _text_of(error)
    return shown(text, limit) or type(error).__name__


def shown(text: str, limit: int = LINE_CHARS) -> str:
    """Text of others, fit for a terminal and a log: one line of at most `limit` characters, without control characters.

    What does not fit is left out of the middle, since a message ends with what to do.
    """
    if len(text) > limit:
        head = (limit - 1) * 2 // 3
        text = f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"
    line = " ".join(text.split())
    line = line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def told(value: object, limit: int = VALUE_CHARS) -> str:
    """A caller's value inside a message: its repr on one line of at most `limit` characters, its type if it has none.

    A repr may raise: Python has none for an integer of more than 4,300 digits.
    """
    try:
        return shown(_SHORT.repr(value), limit)
    except Exception:
        return shown(f"of type {type(value).__name__}", limit)


def _text_of(error: BaseException | str) -> str:
    try:
        return str(error)
    except Exception:
        return ""


class IlfError(Exception):
    """Root of the tree; the message says what, got and expected, and what to do next, on one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shown(str(message), MESSAGE_CHARS))


class InvalidRequest(IlfError, ValueError):
    """An argument that cannot be served."""


class Cancelled(IlfError):
    """A generation that its caller ended between two steps."""


class TimedOut(IlfError):
    """A wait that took longer than its caller allowed."""


class UnsupportedBackbone(IlfError):
    """A model class, or an option of it, that has no adapter."""


class UnsupportedScheduler(IlfError):
    """A scheduler, or an option of it, that is not linear and deterministic."""


class CheckpointError(IlfError):
    """An ILF checkpoint or its base that is missing, damaged or of another model."""


class DataError(IlfError):
    """Training data that is missing, damaged or in too large a part broken."""


class BrokenSample(DataError):
    """One sample that cannot be read: its `key`, and the `reason`."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class BundleError(IlfError):
    """A bundle that is missing, damaged, half-written or too new."""


class PortMismatch(IlfError, ValueError):
    """A tensor whose name, shape or dtype differs from the graph's port."""


class ParityError(IlfError):
    """A graph that differs from the reference by more than its limit."""

    def __init__(self, message: str = "", *, graph: str = "") -> None:
        """`graph` is the name of the graph to blame, if the raiser knows it."""
        super().__init__(message)
        self.graph = graph


class EngineError(IlfError):
    """The engine library refused to load or to run a graph."""


class NonFinite(IlfError):
    """A latent, a prediction or a picture that holds NaN or infinity."""

    def __init__(self, message: str = "", *, graph: str = "") -> None:
        """`graph` is the name of the graph to blame, if the raiser knows it."""
        super().__init__(message)
        self.graph = graph


class DeviceError(IlfError):
    """No GPU, no driver, or CUDA refused something."""


class OutOfMemory(DeviceError):
    """The GPU has no room left; what was loaded before still works."""


class DeviceLost(DeviceError):
    """An error after which CUDA refuses everything in this process."""


class MissingDependency(IlfError, ImportError):
    """An optional package that the asked command needs."""


class BenchmarkFailed(IlfError):
    """A benchmark of which some rows gave nothing; the others are measured, and written."""
