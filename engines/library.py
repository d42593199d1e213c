"""Loads an engine library, checks its version and lists its targets; runs only inside the worker."""

import re
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from ilf_trt.contract.driver import check_driver, cuda_of_driver, driver_advice, driver_version, extra_to_install
from ilf_trt.contract.target import Architecture, Library
from ilf_trt.errors import DeviceError, EngineError, MissingDependency, one_line

NAME_CHARS = 100  # of an error of CUDA; its explanation would push the advice out of the message
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
    install = f"pip install {extra_to_install(library)}"
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

    Raises MissingDependency without the library or cuda-core. For TensorRT, raises DeviceError if the driver does not
    fit the installed packages, EngineError if there is no GPU.
    """
    module = open_library(library)
    if library is Library.TENSORRT_RTX:
        names = sorted(name for name in module.ComputeCapability.__members__ if name.startswith("SM"))
        return LibraryFacts(module.__version__, tuple(sorted(map(Architecture.parse, names))), "", "")
    try:
        from cuda.core import Device, system
    except ImportError as error:
        raise MissingDependency(
            f"--target {library} needs cuda-core and cuda-bindings ({one_line(error)}); pip install "
            + extra_to_install(library)
        ) from error
    driver = driver_version(system)
    check_driver(f"--target {library}", driver, cuda_of_driver(), library)
    try:
        device = Device()
        capability = device.compute_capability
    except Exception as error:
        if advice := driver_advice(str(error), library):
            raise DeviceError(f"--target {library}: {one_line(error, NAME_CHARS)}; {advice}") from error
        raise EngineError(
            "--target tensorrt builds on the GPU that will run the engines, and this machine has no usable GPU "
            f"({one_line(error)}); build on a machine with that GPU, or pass --target tensorrt-rtx --gpu sm89"
        ) from error
    architecture = Architecture(int(capability.major), int(capability.minor))
    return LibraryFacts(module.__version__, (architecture,), device.name, ".".join(map(str, driver)))
