"""The lock of an output folder: one process at a time writes into it."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ilf_trt.errors import InvalidRequest

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, *, doing: str) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; `doing` is a verb for messages, such as "trains in".

    Raises InvalidRequest if another process holds it. A file system that knows no locks is no error: the log says so.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(handle, folder, doing)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, doing: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidRequest(f"another process {doing} {folder}; wait for it, or give another --output") from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s); let one process at a time write there", folder, error.strerror)
