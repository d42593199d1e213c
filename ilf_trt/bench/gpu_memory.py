"""The memory of a GPU that one process takes, by what becomes used while it works and the other process waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class GpuMemory:
    """The growth of the whole GPU's used memory over all blocks of `watch`; the processes take turns, so it is ours."""

    def __init__(self, used_mib: Callable[[], float]) -> None:
        self._used_mib = used_mib
        self.taken_mib = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what the block takes; what it gives back counts as much."""
        before_mib = self._used_mib()
        try:
            yield
        finally:
            self.taken_mib += self._used_mib() - before_mib
