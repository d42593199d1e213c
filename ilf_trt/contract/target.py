"""What engines are built for: an engine library, GPU architectures, and how hard the builder may try."""

import re
from dataclasses import dataclass
from enum import StrEnum

from ilf_trt.errors import InvalidRequest

from .spec import Precision

GIB = 1 << 30
FP8_FROM = 89
BF16_FROM = 80


class Library(StrEnum):
    """An engine library: TensorRT builds on the GPU that serves, TensorRT-RTX ahead of time and without one.

    The extra that installs it for the newest CUDA bears the same name; `driver.py` has the others.
    """

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def module(self) -> str:
        """The Python module of the library."""
        return self.value.replace("-", "_")


@dataclass(frozen=True, slots=True, order=True)
class Architecture:
    """A GPU architecture by its compute capability: 9.0 is Hopper."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> "Architecture":
        """`"sm89"`, `"89"` or `"8.9"` -> Architecture(8, 9); raises InvalidRequest."""
        found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
        if found is None:
            raise InvalidRequest(f"GPU {text!r} is not an architecture; give sm89, sm120 …")
        return cls(int(found[1]), int(found[2]))

    @property
    def number(self) -> int:
        """90 for sm90."""
        return self.major * 10 + self.minor

    def __str__(self) -> str:
        return f"sm{self.number}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything that changes what engines a build makes.

    `gpus` is for TensorRT-RTX; TensorRT takes the GPU at hand. `workspace_bytes` None leaves the limit to the library.
    """

    library: Library
    gpus: tuple[Architecture, ...] = ()
    builder_level: int | None = None
    workspace_bytes: int | None = None
    any_gpu_of_architecture: bool = False
    timing_cache: bool = True

    def check(self) -> None:
        """Raise InvalidRequest for options that contradict one another, before anything is loaded."""
        rtx = self.library is Library.TENSORRT_RTX
        if rtx and not self.gpus:
            raise InvalidRequest(f"--target {self.library} builds ahead of time; say for which GPUs: --gpu sm89,sm120")
        if not rtx and self.gpus:
            raise InvalidRequest(
                f"--target {self.library} builds for the GPU of this machine, it cannot build for "
                f"{', '.join(map(str, self.gpus))} elsewhere; leave --gpu out, or pass --target tensorrt-rtx"
            )
        if rtx and self.any_gpu_of_architecture:
            raise InvalidRequest("--hardware-compat is for --target tensorrt; tensorrt-rtx runs on every GPU of --gpu")
        if len(set(self.gpus)) != len(self.gpus):
            raise InvalidRequest(f"--gpu names one architecture twice: {', '.join(map(str, self.gpus))}")
        if self.builder_level is not None and not 0 <= self.builder_level <= 5:
            raise InvalidRequest(f"--builder-level is {self.builder_level}, it must be 0 to 5")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise InvalidRequest(f"--workspace is {self.workspace_bytes / GIB:g} GiB, it must be positive")


def check_precision(precision: Precision, gpus: tuple[Architecture, ...]) -> None:
    """Raise InvalidRequest when a GPU has no matrix units for the precision."""
    needed = {Precision.FP8: FP8_FROM, Precision.BF16: BF16_FROM}.get(precision, 0)
    for gpu in gpus:
        if gpu.number < needed:
            raise InvalidRequest(f"{gpu} has no {precision} units, they begin with sm{needed}; build --precision fp16")
