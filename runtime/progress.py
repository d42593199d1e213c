"""Watches a generation from step to step, for its caller."""

from threading import Event

from ilf_trt.contract.progress import Progress
from ilf_trt.errors import Cancelled


class Watching:
    """Tells of every step that is done, and ends a generation that its caller wants no more."""

    def __init__(self, steps: int, progress: Progress | None, cancel: Event | None) -> None:
        self._steps, self._progress, self._cancel = steps, progress, cancel
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("step", self._done, self._steps)
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled after {self._done} of {self._steps} steps")
