"""Reports the progress of an engine builder, and stops the builder after a cancel."""

from collections.abc import Callable
from typing import Any

from ilf_trt.contract.progress import Progress


def monitor_of(module: Any, tell: Progress, cancelled: Callable[[], bool]) -> Any:
    """An IProgressMonitor of `module` that calls `tell(phase, done, total)`; the builder goes on until `cancelled()`.

    The builder calls the monitor from its own threads.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            tell(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 1)
            tell(phase_name, steps, steps)

    return Monitor()
