"""The engine library itself: loaded, its version checked, asked what it can build for; only inside the worker."""

import re
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from ilf_trt.contract.target import Architecture, Library
from ilf_trt.errors import EngineError, MissingDependency

VERSIONS = {Library.TENSORRT: ((10, 13), (12, 0)), Library.TENSORRT_RTX: ((1, 5), (2, 0))}


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """What stands behind a target on this machine.

    `gpus` are the architectures that the library can build for: TensorRT-RTX's list, or the one of the GPU at hand,
    whose `gpu_name` and `driver` are empty where none is needed.
    """

    version: str
    gpus: tuple[Architecture, ...]
    gpu_name: str
    driver: str

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {**asdict(self), "gpus": [str(gpu) for gpu in self.gpus]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LibraryFacts":
        return cls(**{**data, "gpus": tuple(Architecture.parse(gpu) for gpu in data["gpus"])})


def open_library(library: Library) -> Any:
    """The module of the library; raises MissingDependency when it is absent, too old or too new."""
    install = f"pip install 'ilf-trt[{library}]'"
    try:
        import_module("polygraphy")
        module = import_module(library.module)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingDependency(
            f"--target {library} needs {library.module} and polygraphy ({reason}); {install}"
        ) from error
    oldest, beyond = VERSIONS[library]
    span = " up to, but not with, ".join(".".join(map(str, end)) for end in (oldest, beyond))
    found = re.match(r"(\d+)\.(\d+)", getattr(module, "__version__", ""))
    if found is None:
        raise MissingDependency(f"{library.module} names no version, it must be {span}; {install}")
    version = (int(found[1]), int(found[2]))
    if not oldest <= version < beyond:
        age = "old" if version < oldest else "new"
        raise MissingDependency(f"{library.module} {module.__version__} is too {age}, it must be {span}; {install}")
    return module


def probe(library: Library) -> LibraryFacts:
    """Facts of the library and, for TensorRT, of the GPU at hand.

    Raises MissingDependency without the library or cuda-core, EngineError when TensorRT finds no GPU.
    """
    module = open_library(library)
    if library is Library.TENSORRT_RTX:
        names = sorted(name for name in module.ComputeCapability.__members__ if name.startswith("SM"))
        return LibraryFacts(module.__version__, tuple(sorted(map(Architecture.parse, names))), "", "")
    try:
        from cuda.core import Device, system
    except ImportError as error:
        install = f"pip install 'ilf-trt[{library}]'"
        raise MissingDependency(f"--target {library} needs cuda-core and cuda-bindings ({error}); {install}") from error
    try:
        device = Device()
        capability = device.compute_capability
        driver = ".".join(map(str, _driver_version(system)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"--target tensorrt builds on the GPU that serves, and none can be used here ({reason}); build on that "
            "machine, or ahead of time with --target tensorrt-rtx --gpu sm89"
        ) from error
    return LibraryFacts(
        module.__version__, (Architecture(int(capability.major), int(capability.minor)),), device.name, driver
    )


def _driver_version(system: Any) -> tuple[int, ...]:
    try:
        return system.get_kernel_mode_driver_version()
    except RuntimeError:  # a container that was given a GPU, but not NVML
        return ()
