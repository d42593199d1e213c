"""Reports every step of a generation to its caller, and ends the generation if the caller cancels it."""

from threading import Event

from ilf_trt.contract.progress import Progress
from ilf_trt.errors import Cancelled


class StepWatch:
    """Call it after every step. It calls `progress("step", done, total)` and raises Cancelled once `cancel` is set."""

    def __init__(self, steps: int, progress: Progress | None, cancel: Event | None) -> None:
        self._steps, self._progress, self._cancel = steps, progress, cancel
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("step", self._done, self._steps)
        self.check()

    def check(self) -> None:
        """Raise Cancelled once `cancel` is set."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled after {self._done} of {self._steps} steps")
