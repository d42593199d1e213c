"""A noisy machine is said to be noisy, each reason in words; a quiet one has none."""

from dataclasses import replace

import pytest

from ilf_trt.bench.gpu_probe import GpuState
from ilf_trt.bench.noise import noise_of
from ilf_trt.bench.result import Noise

QUIET_MS = [100.0, 101.0, 99.0, 100.0, 102.0]
GPU = GpuState("GPU", "580", 1755, 1980, 2619, 2619, 700.0, None, ())


def test_a_quiet_machine_has_no_reasons() -> None:
    for noise in (
        noise_of(QUIET_MS, 0.5, 3.0),  # the load after is what the benchmark itself did
        noise_of(QUIET_MS, 0.0, 0.9, governor="performance"),
        noise_of(QUIET_MS, 0.0, 0.9, [GPU, replace(GPU, graphics_mhz=1740)]),
        noise_of(QUIET_MS, 0.0, 0.9, [replace(GPU, held=True)]),
    ):
        assert noise.reasons == ()
    assert noise_of(QUIET_MS, 0.25, 0.75).base_spread == pytest.approx(0.01)
    assert (noise.load_before, noise.load_after) == (0.0, 0.9)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (noise_of([100, 130, 100, 130], 0, 0), "26% between their quartiles"),
        (noise_of([], 0, 0), "no times"),
        (noise_of(QUIET_MS, 0.75, 0), "0.75 a core"),
        (noise_of(QUIET_MS, 0, 0, governor="powersave"), "governor is powersave"),
        (noise_of(QUIET_MS, 0, 0, [GPU], governor="powersave"), "not known to be locked"),
        (noise_of(QUIET_MS, 0, 0, [replace(GPU, graphics_mhz=None)] * 2), "not known to be locked"),
        (noise_of(QUIET_MS, 0, 0, [GPU, replace(GPU, graphics_mhz=1500)]), "between 1500 and 1755 MHz"),
        (noise_of(QUIET_MS, 0, 0, [GPU, replace(GPU, slowdowns=("power cap",))]), "slowed itself down: power cap"),
    ],
)
def test_each_disturbance_is_one_reason(noise: Noise, words: str) -> None:
    (reason,) = noise.reasons
    assert words in reason
