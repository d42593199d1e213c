"""The border to libraries of others: what they raise becomes an error of this package, and they stay quiet."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ilf_trt.errors import CheckpointError, IlfError, one_line

REASON_CHARS = 160
LOGGERS = ("diffusers", "transformers")
PANIC = "PanicException"  # of a library in Rust; no Exception, and every such library has a class of its own


@contextmanager
def foreign(what: str, advice: str) -> Iterator[None]:
    """Raise CheckpointError "`what`: …; `advice`" for any exception of the block that is not of this package.

    The log of diffusers and transformers and all warnings are silenced meanwhile. What ends a process, such as
    KeyboardInterrupt, passes.
    """
    try:
        with quieted(LOGGERS, logging.CRITICAL):
            yield
    except IlfError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = one_line(error, REASON_CHARS)
        if isinstance(error, LookupError | AttributeError | ArithmeticError | MemoryError | NotImplementedError):
            reason = f"{type(error).__name__} {reason}"  # whose text alone is often no more than a name
        raise CheckpointError(f"{what}: {reason}; {advice}") from error


@contextmanager
def quieted(names: Iterable[str], level: int) -> Iterator[None]:
    """Silence warnings, and what the loggers of these names say below `level`."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
