"""NVTX ranges, which name the runs on a profiler's timeline; without the nvtx package they are nothing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

DOMAIN = "ilf-trt"


def range_of(name: str) -> AbstractContextManager[Any]:
    """A range to enter as often as one likes."""
    try:
        import nvtx
    except ImportError:
        return nullcontext()
    return nvtx.annotate(name, domain=DOMAIN)
