"""What a GPU says about its clocks, read through NVML, or through nvidia-smi where NVML cannot be loaded."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

SMI_TIMEOUT_S = 10.0
SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.gr",
    "clocks.max.gr",
    "clocks.mem",
    "clocks.max.mem",
    "enforced.power.limit",
)
SMI_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second in older drivers
# Bits of nvmlClocksEventReasons. Idle, sync boost, display and the limits of the board are no fault of a measurement.
HELD_BY_SETTING = 0x2
SLOWDOWNS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "too warm, slowed by software",
    0x40: "too warm, slowed by hardware",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True)
class GpuState:
    """A GPU at one moment; None for what it does not tell. Only a GPU at work tells what slows it down."""

    name: str
    driver: str
    graphics_mhz: int | None
    graphics_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None
    power_limit_w: float | None
    held: bool | None
    """True if a setting of the user holds the clocks. None if not known: NVML does not tell of `nvidia-smi -lgc`."""
    slowdowns: tuple[str, ...]
    """What keeps the clocks below what was asked for, in words."""


def clock_words(state: GpuState) -> str:
    """`GPU without work: 345 of 1980 MHz, memory 2619 of 2619 MHz, at most 700 W`; what it does not tell is unknown."""

    def of(now: int | None, most: int | None) -> str:
        return f"{'unknown' if now is None else now} of {'unknown' if most is None else most} MHz"

    power = "unknown" if state.power_limit_w is None else f"{state.power_limit_w:.0f}"
    graphics, memory = of(state.graphics_mhz, state.graphics_max_mhz), of(state.memory_mhz, state.memory_max_mhz)
    return f"GPU without work: {graphics}, memory {memory}, at most {power} W"


class GpuProbe:
    """One GPU by its number in CUDA, to be read again and again."""

    def __init__(self, read: Callable[[], GpuState | None]) -> None:
        self._read = read

    @classmethod
    def open(cls, ordinal: int) -> Self:
        """A probe of `cuda:ordinal`; one that reads nothing if neither NVML nor nvidia-smi knows that GPU.

        CUDA and NVML number GPUs differently, so they agree on its UUID; without cuda-core only a single GPU is read.
        """
        uuid = _uuid(ordinal)
        try:
            nvml = import_module("cuda.bindings.nvml")
            nvml.init_v2()
            handle = _handle(nvml, uuid)
        except Exception:  # no package, no driver, an old driver: each has an exception of its own
            return cls(lambda: _read_smi(uuid))
        return cls(lambda: _read_nvml(nvml, handle))

    def read(self) -> GpuState | None:
        """The GPU now; None if it cannot be read."""
        return self._read()


def _uuid(ordinal: int) -> str:
    """Without `GPU-` or `MIG-`; empty without cuda-core or such a GPU."""
    try:
        return str(import_module("cuda.core").Device(ordinal).uuid)
    except Exception:  # as above
        return ""


def _handle(nvml: Any, uuid: str) -> Any:
    """The GPU with this UUID, of a MIG part the whole one, or the only GPU; raises LookupError."""
    if uuid:
        for prefix in ("GPU-", "MIG-"):
            handle = _told(nvml.device_get_handle_by_uuid, f"{prefix}{uuid}")
            if handle is not None:
                whole = _told(nvml.device_get_device_handle_from_mig_device_handle, handle)
                return handle if whole is None else whole
    if nvml.device_get_count_v2() != 1:
        raise LookupError
    return nvml.device_get_handle_by_index_v2(0)


def _read_nvml(nvml: Any, handle: Any) -> GpuState | None:
    name = _told(nvml.device_get_name, handle)
    if name is None:
        return None
    graphics, memory = int(nvml.ClockType.CLOCK_GRAPHICS), int(nvml.ClockType.CLOCK_MEM)
    limit_mw = _told(nvml.device_get_enforced_power_limit, handle)
    return GpuState(
        str(name),
        str(_told(nvml.system_get_driver_version) or ""),
        _told(nvml.device_get_clock_info, handle, graphics),
        _told(nvml.device_get_max_clock_info, handle, graphics),
        _told(nvml.device_get_clock_info, handle, memory),
        _told(nvml.device_get_max_clock_info, handle, memory),
        None if limit_mw is None else limit_mw / 1000,
        *_reasons(_told(nvml.device_get_current_clocks_event_reasons, handle)),
    )


def _told(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None if it cannot."""
    try:
        return ask(*arguments)
    except Exception:  # a field that this GPU or this driver does not have
        return None


def _read_smi(uuid: str) -> GpuState | None:
    for reasons in SMI_REASONS:
        values = _smi_values(uuid, (*SMI_FIELDS, reasons))
        if values is not None:
            name, driver, *numbers, active = values
            *clocks, limit = map(_number, numbers)
            mhz = [None if clock is None else round(clock) for clock in clocks]
            return GpuState(name, driver, mhz[0], mhz[1], mhz[2], mhz[3], limit, *_reasons(_hexadecimal(active)))
    return None


def _smi_values(uuid: str, fields: tuple[str, ...]) -> list[str] | None:
    """One line of nvidia-smi; None if it fails, does not know a field, or tells of several GPUs."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if uuid:
        command += ["--id", f"GPU-{uuid}"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.strip().splitlines()
    if run.returncode or len(lines) != 1:
        return None
    values = [value.strip() for value in lines[0].split(",")]
    return values if len(values) == len(fields) else None


def _reasons(bits: int | None) -> tuple[bool | None, tuple[str, ...]]:
    """Whether a setting holds the clocks, and what slows them down."""
    if bits is None:
        return None, ()
    return bool(bits & HELD_BY_SETTING) or None, tuple(words for bit, words in SLOWDOWNS.items() if bits & bit)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def _hexadecimal(text: str) -> int | None:
    try:
        return int(text, 16)
    except ValueError:
        return None
