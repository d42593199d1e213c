"""What disturbed a measurement, in words."""

from collections.abc import Sequence

from .gpu_probe import GpuState
from .result import Noise
from .statistics import quartile_spread

MOST_SPREAD = 0.10
MOST_LOAD = 0.5
STEADY_SHARE = 0.01  # clocks that move by less are steady
PERFORMANCE = "performance"


def noise_of(
    base_times_ms: Sequence[float],
    load_before: float,
    load_after: float,
    clocks: Sequence[GpuState] = (),
    *,
    governor: str = "",
) -> Noise:
    """How steady the machine was.

    `base_times_ms` are all times of the base line's row. The loads are `machine_load()` before the first run and after
    the last. `clocks` are states of the GPU, each read while a row ran; none on a CPU, where `governor()` counts.
    """
    base_spread = quartile_spread(base_times_ms) if base_times_ms else 0.0
    reasons = []
    if not base_times_ms:
        reasons.append("the base line gave no times")
    if base_spread > MOST_SPREAD:
        reasons.append(f"equal runs of the base line differ by {base_spread:.0%} between their quartiles")
    if load_before > MOST_LOAD:
        reasons.append(f"other programs ran: {load_before:.2f} a core before the start")
    if clocks:
        reasons += _of_gpu(clocks)
    elif governor not in ("", PERFORMANCE):
        reasons.append(f"the CPU's frequency governor is {governor}, so its clock may move; set it to {PERFORMANCE}")
    return Noise(base_spread, load_before, load_after, tuple(reasons))


def _of_gpu(clocks: Sequence[GpuState]) -> list[str]:
    reasons = []
    slowdowns = dict.fromkeys(words for state in clocks for words in state.slowdowns)
    if slowdowns:
        reasons.append(f"the GPU slowed itself down: {', '.join(slowdowns)}")
    mhz = [state.graphics_mhz for state in clocks if state.graphics_mhz is not None]
    if mhz and max(mhz) - min(mhz) > STEADY_SHARE * max(mhz):
        reasons.append(f"the GPU's clock moved between {min(mhz)} and {max(mhz)} MHz; lock it (nvidia-smi -lgc)")
    elif len(mhz) < 2 and not any(state.held for state in clocks):
        reasons.append("the GPU's clock is not known to be locked")
    return reasons
