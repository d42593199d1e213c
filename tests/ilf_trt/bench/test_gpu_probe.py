"""A GPU is read through NVML, else through nvidia-smi, and what it does not tell is None."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilf_trt.bench.gpu_probe import GpuProbe, GpuState, clock_words

UUID = "11111111-2222-3333-4444-555555555555"
MHZ = {"now": {0: 1755, 2: 2619}, "max": {0: 1980, 2: 2619}}


class NotSupported(Exception):
    """What NVML raises, which is no RuntimeError."""


class FakeNvml:
    """One GPU with UUID and an event mask; `missing` are the calls that it does not support."""

    ClockType = SimpleNamespace(CLOCK_GRAPHICS=0, CLOCK_MEM=2)

    def __init__(self, *, uuids: tuple[str, ...] = (f"GPU-{UUID}",), reasons: int = 0, missing: tuple[str, ...] = ()):
        self.uuids, self.reasons, self.missing = uuids, reasons, missing

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in object.__getattribute__(self, "missing"):

            def refuse(*_: Any) -> Any:
                raise NotSupported(name)

            return refuse
        return value

    def init_v2(self) -> None: ...

    def device_get_count_v2(self) -> int:
        return len(self.uuids)

    def device_get_handle_by_uuid(self, uuid: str) -> int:
        if uuid not in self.uuids:
            raise NotSupported(uuid)
        return 100 + self.uuids.index(uuid)

    def device_get_handle_by_index_v2(self, index: int) -> int:
        return 100 + index

    def device_get_device_handle_from_mig_device_handle(self, handle: int) -> int:
        if not self.uuids[handle - 100].startswith("MIG-"):
            raise NotSupported(handle)
        return 900

    def device_get_name(self, handle: int) -> str:
        return f"GPU at {handle}"

    def system_get_driver_version(self) -> str:
        return "580.65.06"

    def device_get_clock_info(self, handle: int, kind: int) -> int:
        return MHZ["now"][kind]

    def device_get_max_clock_info(self, handle: int, kind: int) -> int:
        return MHZ["max"][kind]

    def device_get_enforced_power_limit(self, handle: int) -> int:
        return 700_000

    def device_get_current_clocks_event_reasons(self, handle: int) -> int:
        return self.reasons


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a fake NVML and a cuda.core whose `cuda:0` has UUID, or none, in place of the real ones."""

    def install(fake: FakeNvml | None, uuid: str | None = UUID) -> None:
        import cuda.bindings

        def device(ordinal: int) -> Any:
            if uuid is None:
                raise RuntimeError("no driver")
            return SimpleNamespace(uuid=uuid)

        monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=device))
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvml", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(cuda.bindings, "nvml", fake, raising=False)

    return install


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a program nvidia-smi on the path; gives the file of its arguments."""

    def install(script: str) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path / "arguments"

    return install


def test_clocks_are_told_in_one_line() -> None:
    state = GpuState("NVIDIA H200", "580.65.6", 345, 1980, 2619, 3201, 700.0, None, ())
    words = "GPU without work: 345 of 1980 MHz, memory 2619 of 3201 MHz, at most 700 W"
    assert clock_words(state) == words
    unknown = replace(state, graphics_mhz=None, power_limit_w=None)
    assert clock_words(unknown) == words.replace("345", "unknown").replace("700", "unknown")


def test_nvml_tells_clocks_power_and_driver(nvml: Callable[..., None]) -> None:
    nvml(FakeNvml(uuids=("GPU-other", f"GPU-{UUID}")))
    assert GpuProbe.open(0).read() == GpuState(
        "GPU at 101", "580.65.06", 1755, 1980, 2619, 2619, 700.0, held=None, slowdowns=()
    )


@pytest.mark.parametrize(
    ("reasons", "held", "slowdowns"),
    [
        (0x0, None, ()),
        (0x1, None, ()),  # idle
        (0x2, True, ()),
        (0x4, None, ("power cap",)),
        (0x68, None, ("hardware slowdown", "too warm, slowed by software", "too warm, slowed by hardware")),
        (0x82, True, ("power brake",)),
    ],
)
def test_the_mask_says_what_holds_the_clocks(
    nvml: Callable[..., None], reasons: int, held: bool | None, slowdowns: tuple[str, ...]
) -> None:
    nvml(FakeNvml(reasons=reasons))
    state = GpuProbe.open(0).read()
    assert state is not None
    assert (state.held, state.slowdowns) == (held, slowdowns)


def test_a_field_that_a_gpu_lacks_is_none(nvml: Callable[..., None]) -> None:
    nvml(FakeNvml(missing=("device_get_enforced_power_limit", "device_get_current_clocks_event_reasons"), reasons=0x4))
    state = GpuProbe.open(0).read()
    assert state is not None
    assert (state.power_limit_w, state.held, state.slowdowns) == (None, None, ())
    assert state.graphics_mhz == 1755


def test_of_a_part_of_a_gpu_the_whole_one_is_read(nvml: Callable[..., None]) -> None:
    nvml(FakeNvml(uuids=(f"MIG-{UUID}", "GPU-other")))
    state = GpuProbe.open(0).read()
    assert state is not None
    assert state.name == "GPU at 900"


def test_the_only_gpu_needs_no_uuid_and_of_several_none_is_guessed(nvml: Callable[..., None], smi: Any) -> None:
    smi("exit 9")
    nvml(FakeNvml(), uuid=None)
    assert GpuProbe.open(0).read() is not None
    nvml(FakeNvml(uuids=("GPU-a", "GPU-b")), uuid=None)
    assert GpuProbe.open(0).read() is None


LINE = "NVIDIA H200, 580.65.06, 1755, 1980, 2619, 2619, 700.00, 0x0000000000000044"
STATE = GpuState(
    "NVIDIA H200", "580.65.06", 1755, 1980, 2619, 2619, 700.0, None, ("power cap", "too warm, slowed by hardware")
)


def test_without_nvml_nvidia_smi_is_asked_for_the_same_gpu(nvml: Callable[..., None], smi: Any) -> None:
    nvml(None)
    arguments = smi(f'echo "{LINE}"')
    assert GpuProbe.open(0).read() == STATE
    assert f"--id GPU-{UUID}" in arguments.read_text()


def test_an_older_nvidia_smi_has_another_name_for_the_mask(nvml: Callable[..., None], smi: Any) -> None:
    nvml(None)
    smi(f'case "$1" in *clocks_event_reasons*) echo "Field is not valid"; exit 2;; esac\necho "{LINE}"')
    assert GpuProbe.open(0).read() == STATE


@pytest.mark.parametrize(
    "script", ["exit 9", f'echo "{LINE}"; echo "{LINE}"', "echo No devices were found", "printf '\\377,\\377'"]
)
def test_an_answer_that_is_not_of_one_gpu_is_none(nvml: Callable[..., None], smi: Any, script: str) -> None:
    nvml(None, uuid=None)
    smi(script)
    assert GpuProbe.open(0).read() is None


def test_a_value_that_nvidia_smi_does_not_have_is_none(nvml: Callable[..., None], smi: Any) -> None:
    nvml(None)
    smi('echo "A, 580, [N/A], [N/A], 1, 2, [Not Supported], [N/A]"')
    assert GpuProbe.open(0).read() == GpuState("A", "580", None, None, 1, 2, None, None, ())


def test_an_nvidia_smi_that_hangs_is_none(nvml: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, timeout: float, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    nvml(None)
    monkeypatch.setattr(subprocess, "run", hang)
    assert GpuProbe.open(0).read() is None


def test_without_a_gpu_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert GpuProbe.open(99).read() is None


def test_every_name_of_the_fake_is_one_of_the_real_library() -> None:
    real = import_module("cuda.bindings.nvml")
    for name in (name for name in vars(FakeNvml) if name.startswith(("init", "device_", "system_"))):
        assert callable(getattr(real, name))
    assert (int(real.ClockType.CLOCK_GRAPHICS), int(real.ClockType.CLOCK_MEM)) == (0, 2)
    masks = real.ClocksEventReasons
    assert int(masks.EVENT_REASON_APPLICATIONS_CLOCKS_SETTING) == 0x2
    assert int(masks.EVENT_REASON_SW_POWER_CAP) == 0x4
    assert int(masks.THROTTLE_REASON_HW_SLOWDOWN) == 0x8
    assert int(masks.EVENT_REASON_SW_THERMAL_SLOWDOWN) == 0x20
    assert int(masks.THROTTLE_REASON_HW_THERMAL_SLOWDOWN) == 0x40
    assert int(masks.THROTTLE_REASON_HW_POWER_BRAKE_SLOWDOWN) == 0x80
