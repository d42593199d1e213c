"""Loads an engine library, checks its version and lists its targets; runs only inside the worker."""

import re
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from ilf_trt.contract.target import Architecture, Library
from ilf_trt.errors import EngineError, MissingDependency, one_line

VERSIONS = {Library.TENSORRT: ((10, 13), (12, 0)), Library.TENSORRT_RTX: ((1, 5), (2, 0))}


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """The library and the GPU behind a target on this machine.

    `gpus` are the architectures that the library can build for. For TensorRT-RTX this is the library's list, and
    `gpu_name` and `driver` are empty. For TensorRT it is the architecture of this machine's GPU.
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
    """The module of the library; raises MissingDependency if it is missing, too old or too new."""
    install = f"pip install 'ilf-trt[{library}]'"
    try:
        import_module("polygraphy")
        module = import_module(library.module)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"--target {library} needs {library.module} and polygraphy ({one_line(error)}); {install}"
        ) from error
    oldest, beyond = VERSIONS[library]
    span = " up to, but without, ".join(".".join(map(str, end)) for end in (oldest, beyond))
    match = re.match(r"(\d+)\.(\d+)", getattr(module, "__version__", ""))
    if match is None:
        raise MissingDependency(f"{library.module} has no version, it must be {span}; {install}")
    version = (int(match[1]), int(match[2]))
    if not oldest <= version < beyond:
        age = "old" if version < oldest else "new"
        raise MissingDependency(f"{library.module} {module.__version__} is too {age}, it must be {span}; {install}")
    return module


def probe(library: Library) -> LibraryFacts:
    """Facts of the library and, for TensorRT, of this machine's GPU.

    Raises MissingDependency without the library or cuda-core, EngineError if TensorRT finds no GPU.
    """
    module = open_library(library)
    if library is Library.TENSORRT_RTX:
        names = sorted(name for name in module.ComputeCapability.__members__ if name.startswith("SM"))
        return LibraryFacts(module.__version__, tuple(sorted(map(Architecture.parse, names))), "", "")
    try:
        from cuda.core import Device, system
    except ImportError as error:
        install = f"pip install 'ilf-trt[{library}]'"
        raise MissingDependency(
            f"--target {library} needs cuda-core and cuda-bindings ({one_line(error)}); {install}"
        ) from error
    try:
        device = Device()
        capability = device.compute_capability
        driver = ".".join(map(str, _driver_version(system)))
    except Exception as error:
        raise EngineError(
            "--target tensorrt builds on the GPU that will run the engines, and this machine has no usable GPU "
            f"({one_line(error)}); build on a machine with that GPU, or pass --target tensorrt-rtx --gpu sm89"
        ) from error
    return LibraryFacts(
        module.__version__, (Architecture(int(capability.major), int(capability.minor)),), device.name, driver
    )


def _driver_version(system: Any) -> tuple[int, ...]:
    try:
        return system.get_kernel_mode_driver_version()
    except RuntimeError:  # a container that has a GPU, but not NVML
        return ()
