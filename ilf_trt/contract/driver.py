"""Which NVIDIA driver a release of CUDA needs, and which extras of this package bring which release."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ilf_trt.errors import DeviceError

CUDA_EXTRAS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "cuda")
# What CUDA and the engine libraries say about a driver that is older than they are, or whose two parts do not match.
REFUSED = (
    "driver version is insufficient",
    "driver is older than the CUDA runtime",
    "InsufficientDriver",
    "INSUFFICIENT_DRIVER",
    "initialization failure with error: 35",
    "COMPAT_NOT_SUPPORTED_ON_DEVICE",
    "CompatNotSupportedOnDevice",
)
MISMATCH = ("SYSTEM_DRIVER_MISMATCH", "SystemDriverMismatch", "initialization failure with error: 803")


@dataclass(frozen=True, slots=True)
class CudaRelease:
    """A major release of CUDA: its oldest driver for Linux, and how it calls each of CUDA_EXTRAS.

    The oldest driver runs all minor releases: https://docs.nvidia.com/deploy/cuda-compatibility/
    """

    major: int
    oldest_driver: tuple[int, ...]
    extras: Mapping[str, str]

    def __str__(self) -> str:
        return f"CUDA {self.major}"


CUDA_12 = CudaRelease(
    12,
    (525, 60, 13),
    {
        "tensorrt": "tensorrt-cu12",
        "tensorrt-rtx": "tensorrt-rtx-cu12",
        "onnxruntime-cuda": "onnxruntime-cuda12",
        "cuda": "cuda12",
    },
)
CUDA_13 = CudaRelease(13, (580, 65, 6), {extra: extra for extra in CUDA_EXTRAS})
RELEASES = (CUDA_12, CUDA_13)


def installed_release() -> CudaRelease:
    """The release that the installed cuda-bindings are for; the newest if they are missing or for none of RELEASES."""
    try:
        major = version("cuda-bindings").partition(".")[0]
    except PackageNotFoundError:
        return RELEASES[-1]
    return next((release for release in RELEASES if str(release.major) == major), RELEASES[-1])


def extra_to_install(extra: str) -> str:
    """One of CUDA_EXTRAS for the installed release, as pip takes it: `'ilf-trt[tensorrt-cu12]'` with CUDA 12."""
    return f"'ilf-trt[{installed_release().extras[extra]}]'"


def driver_version(system: Any) -> tuple[int, ...]:
    """The version by the module `cuda.core.system`; () if it is unknown."""
    try:
        return tuple(system.get_kernel_mode_driver_version())
    except RuntimeError:  # a machine without a driver, or a container that has a GPU, but not NVML
        return ()


def cuda_of_driver() -> int:
    """The major release of CUDA that the driver supports; 0 if it does not say."""
    try:
        return int(import_module("cuda.bindings.driver").cuDriverGetVersion()[1]) // 1000
    except (ImportError, RuntimeError):
        return 0


def check_driver(what: str, driver: tuple[int, ...], cuda: int, extra: str = "") -> None:
    """Raise DeviceError if the driver is too old for the installed packages; `what` begins the message.

    `driver` is its version, `(580, 65, 6)`, or () if that is unknown. `cuda` is the major release of CUDA that it
    supports, or 0 if that is unknown; it decides, because NVIDIA's forward compatibility adds a newer release to an old
    driver. `extra` is the one of CUDA_EXTRAS that the caller needs, or "" if it may be any.
    """
    release = installed_release()
    if cuda < release.major if cuda else () < driver < release.oldest_driver:
        version_text = _dotted(driver) if driver else f"for CUDA {cuda}"
        raise DeviceError(f"{what}: driver {version_text} is too old for {release}; {_update(release, driver, extra)}")


def driver_advice(error: str, extra: str = "") -> str:
    """What to do if `error`, of CUDA or a library that uses it, is about the driver; else ""."""
    mismatch = any(words in error for words in MISMATCH)
    if not mismatch and not any(words in error for words in REFUSED):
        return ""
    advice = _update(installed_release(), (), extra)
    return f"if the driver was updated, start the machine again; if not, {advice}" if mismatch else advice


def _update(release: CudaRelease, driver: tuple[int, ...], extra: str) -> str:
    """`driver` is () if it is unknown."""
    advice = f"update the driver to {_dotted(release.oldest_driver)} or later"
    older = [one for one in RELEASES if one.major < release.major and (not driver or one.oldest_driver <= driver)]
    if not older:
        return advice
    names = [older[-1].extras[one] for one in ((extra,) if extra else CUDA_EXTRAS[:-1])]
    choice = " or ".join(f"'ilf-trt[{name}]'" for name in names)
    return f"{advice}, or use {older[-1]}: pip install {choice} in a new environment"


def _dotted(driver: tuple[int, ...]) -> str:
    return ".".join(map(str, driver))
