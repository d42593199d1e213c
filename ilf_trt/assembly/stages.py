"""The stages of a build: each is told as it begins, and timed until the next one begins."""

from time import perf_counter

from ilf_trt.contract.progress import Progress


class Stages:
    """A clock over named stages; `seconds` by stage."""

    def __init__(self, total: int, progress: Progress) -> None:
        """`total` is the number of stages, as far as it is known."""
        self.seconds: dict[str, float] = {}
        self._total, self._progress = total, progress
        self._began = perf_counter()
        self._current = ""

    def enter(self, stage: str) -> None:
        """End the current stage and begin `stage`."""
        self.end()
        self._began, self._current = perf_counter(), stage
        self._tell("")

    def detail(self, what: str, done: int, total: int, detail: str = "", /) -> None:
        """Progress within the current stage; a `Progress` for whoever does the work."""
        self._tell(f"{what} {done}/{total} {detail}".rstrip())

    def end(self) -> None:
        """End the current stage, if there is one."""
        if self._current:
            self.seconds[self._current] = perf_counter() - self._began
            self._current = ""

    def _tell(self, detail: str) -> None:
        done = len(self.seconds)
        self._progress(self._current, done, max(self._total, done + 1), detail)
