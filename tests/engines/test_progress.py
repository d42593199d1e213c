"""What the builder's progress becomes, and how it is stopped."""

import pytest

from ilf_trt.engines.progress import monitor_of


class Module:
    """An engine library as far as the monitor needs one."""

    class IProgressMonitor:
        def __init__(self) -> None:
            self.made = True


def test_phases_within_phases_are_told_apart() -> None:
    steps: list[tuple[str, int, int]] = []
    monitor = monitor_of(Module, lambda *step: steps.append(step), lambda: False)
    monitor.phase_start("outer", None, 2)
    monitor.phase_start("inner", "outer", 3)
    assert monitor.step_complete("inner", 0)
    monitor.phase_finish("inner")
    assert monitor.step_complete("outer", 0)
    monitor.phase_finish("outer")
    assert steps == [
        ("outer", 0, 2),
        ("inner", 0, 3),
        ("inner", 1, 3),
        ("inner", 3, 3),
        ("outer", 1, 2),
        ("outer", 2, 2),
    ]


def test_the_base_of_the_library_is_initialised() -> None:
    assert monitor_of(Module, lambda *step: None, lambda: False).made


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_step_goes_on_until_the_build_is_cancelled(cancelled: bool) -> None:
    monitor = monitor_of(Module, lambda *step: None, lambda: cancelled)
    monitor.phase_start("outer", None, 2)
    assert monitor.step_complete("outer", 0) is not cancelled


def test_a_phase_that_nobody_announced_is_told_all_the_same() -> None:
    steps: list[tuple[str, int, int]] = []
    monitor = monitor_of(Module, lambda *step: steps.append(step), lambda: False)
    assert monitor.step_complete("sudden", 4)
    monitor.phase_finish("sudden")
    assert steps == [("sudden", 5, 5), ("sudden", 1, 1)]
