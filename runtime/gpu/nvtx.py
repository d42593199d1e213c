"""NVTX ranges, which name the runs on a profiler's timeline; they do nothing without the nvtx package."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

DOMAIN = "ilf-trt"


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range that may be entered many times."""
    try:
        import nvtx
    except ImportError:
        return nullcontext()
    return nvtx.annotate(name, domain=DOMAIN)
