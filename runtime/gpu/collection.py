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
    others forgot: pinned memory, or arrays on the GPU. At the end of the last block the collector is as it was before
    the first one; a `gc.disable()` of somebody else within cannot be told from this one.
    """
    global _holders, _was_enabled
    holds = False
    try:
        with _lock:
            _holders += 1
            holds = True  # no call in between, where an interrupt could come
            if _holders == 1:
                _was_enabled = gc.isenabled()
                gc.disable()
        yield
    finally:
        if holds:
            with _lock:
                _holders -= 1
                if not _holders and _was_enabled:
                    _was_enabled = False
                    gc.enable()
