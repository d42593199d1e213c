"""Progress of the engine builder, handed on as it comes; refusing a step is what stops it."""

from collections.abc import Callable
from typing import Any

Tell = Callable[[str, int, int], None]


def monitor_of(module: Any, tell: Tell, cancelled: Callable[[], bool]) -> Any:
    """An IProgressMonitor of `module` that tells (phase, done, total) and lets the builder go on until `cancelled`.

    The builder calls it from its own threads.
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
