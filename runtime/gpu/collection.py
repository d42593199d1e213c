"""Holds Python's garbage collection back, where freeing something at a random moment would do harm."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_holders = 0
_was_enabled = False


@contextmanager
def no_collection() -> Iterator[None]:
    """No automatic collection in the block, on any thread; blocks of several threads may overlap.

    What a thread frees while it captures becomes part of the capture or makes it invalid, and a collection frees what
    others forgot: pinned memory, or arrays on the GPU.
    """
    global _holders, _was_enabled
    with _lock:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders and _was_enabled:
                gc.enable()
