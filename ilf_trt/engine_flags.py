"""The command line's flags about engines, which `build` and `compile` share."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from platformdirs import user_cache_path

from ilf_trt.errors import InvalidRequest
from ilf_trt.target import GIB, Architecture, EngineOptions, Library

CacheFolder = Annotated[
    Path | None,
    Parameter(
        name="--cache-dir",
        env_var="ILF_TRT_CACHE",
        help="Folder of the build cache; by default the user's cache folder.",
    ),
]


def cache_folder(given: Path | None) -> Path:
    """The build cache's folder."""
    return user_cache_path("ilf-trt") if given is None else given


@Parameter(name="*")
@dataclass(frozen=True)
class EngineFlags:
    """Flags as they are typed; `options` makes of them what the builder takes."""

    target: Annotated[
        Library | None, Parameter(help="Engine library: tensorrt for the GPU at hand, tensorrt-rtx for those of --gpu.")
    ] = None
    gpu: Annotated[str | None, Parameter(help="Architectures that tensorrt-rtx builds for: sm89,sm120.")] = None
    builder_level: Annotated[
        int | None,
        Parameter(help="How long the builder may search for faster kernels, 0 to 5; by default the library's."),
    ] = None
    workspace: Annotated[
        float | None, Parameter(help="Most GPU memory that a kernel may work in, GiB; by default all of it.")
    ] = None
    hardware_compat: Annotated[
        bool, Parameter(negative=(), help="Let other cards of the same architecture run the engines (H100 and H200).")
    ] = False
    timing_cache: Annotated[bool, Parameter(help="Keep what TensorRT timed on this GPU for the next build.")] = True
    strip_graphs: Annotated[
        bool, Parameter(negative=(), help="Leave the ONNX graphs out of the bundle; the CPU can then no longer run it.")
    ] = False
    cache: Annotated[bool, Parameter(help="Take graphs and engines that were made before from the build cache.")] = True
    cache_dir: CacheFolder = None

    def options(self) -> EngineOptions | None:
        """None without a target; raises InvalidRequest."""
        if self.target is None:
            for flag, given in (
                ("--gpu", self.gpu),
                ("--builder-level", self.builder_level),
                ("--workspace", self.workspace),
            ):
                if given is not None:
                    raise InvalidRequest(
                        f"{flag} is about engines: pass --target tensorrt or --target tensorrt-rtx too"
                    )
            if self.hardware_compat:
                raise InvalidRequest("--hardware-compat is about engines: pass --target tensorrt too")
            return None
        if self.workspace is not None and not math.isfinite(self.workspace):
            raise InvalidRequest(f"--workspace is {self.workspace} GiB, it must be finite")
        options = EngineOptions(
            library=self.target,
            gpus=tuple(Architecture.parse(part) for part in self.gpu.split(",")) if self.gpu else (),
            builder_level=self.builder_level,
            workspace_bytes=None if self.workspace is None else int(self.workspace * GIB),
            any_gpu_of_architecture=self.hardware_compat,
            timing_cache=self.timing_cache,
        )
        options.check()
        return options

    def cache_folder(self) -> Path | None:
        """None with --no-cache."""
        return cache_folder(self.cache_dir) if self.cache else None
