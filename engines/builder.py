"""Builds one engine with Polygraphy's loaders, in TensorRT or TensorRT-RTX; runs only inside the worker."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from time import perf_counter
from typing import Any

from ilf_trt.contract.progress import Progress
from ilf_trt.contract.target import Architecture, Library
from ilf_trt.errors import EngineError, one_line
from ilf_trt.process_memory import peak_mib

from .library import open_library
from .listing import Kernel, kernels_of_inspector, kernels_of_plan, scratch_of_plan
from .profiles import Profile
from .progress import monitor_of
from .report import EngineReport

REASON_CHARS = 600


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One engine to build. Paths are absolute; `gpus` has names such as `sm89` for TensorRT-RTX, none for TensorRT."""

    library: str
    graph: str
    onnx: str
    engine: str
    precision: str
    expected: tuple[str, ...]
    profile: Profile
    gpus: tuple[str, ...]
    builder_level: int | None
    workspace_bytes: int | None
    any_gpu_of_architecture: bool
    timing_cache: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "BuildRequest":
        profile = {name: tuple(tuple(shape) for shape in shapes) for name, shapes in data["profile"].items()}
        return cls(**{**data, "expected": tuple(data["expected"]), "gpus": tuple(data["gpus"]), "profile": profile})


def build_engine(request: BuildRequest, tell: Progress, cancelled: Callable[[], bool]) -> EngineReport:
    """Write the engine of `request` and return its report.

    The network is strongly typed, so the graph decides every precision. TF32 is off, so that fp32 products are fp32.
    The engine uses one stream, so that CUDA can capture a trajectory. Raises EngineError with the reason of the parser
    or of the builder.
    """
    library = Library(request.library)
    trt = open_library(library)
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    errors = _collect_errors()
    begin_s = perf_counter()
    try:
        network = network_from_onnx_path(
            request.onnx, strongly_typed=hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        )
    except PolygraphyException as error:
        raise EngineError(
            f"{request.graph}: {library} refuses a node: {_reason(errors, error)}; export with --precision fp16, or "
            "report the node"
        ) from error
    layers = Counter(network[1].get_layer(index).type.name for index in range(network[1].num_layers))
    try:
        plan = engine_bytes_from_network(
            network, _config(trt, library, request, tell, cancelled), save_timing_cache=request.timing_cache
        )
    except PolygraphyException as error:
        if cancelled():
            raise EngineError(f"{request.graph}: the build was cancelled") from error
        raise EngineError(
            f"{request.graph}: {library} could not build the engine: {_reason(errors, error)}; if memory ran out, pass "
            "a smaller --workspace or --batch"
        ) from error
    path = Path(request.engine)
    with path.open("wb") as file:
        file.write(memoryview(plan))
    try:
        kernels, scratch_bytes = _contents(trt, request, path, plan)
    except PolygraphyException as error:
        raise EngineError(
            f"{request.graph}: {library} cannot load the engine that it built: {_reason(errors, error)}; if GPU memory "
            "ran out, free some or pass a smaller --batch"
        ) from error
    return EngineReport(
        graph=request.graph,
        precision=request.precision,
        build_s=round(perf_counter() - begin_s, 2),
        builder_peak_mib=round(peak_mib(), 1),
        engine_bytes=path.stat().st_size,
        scratch_bytes=scratch_bytes,
        network_layers=dict(layers.most_common()),
        expected=request.expected,
        kernels=kernels,
    )


def _config(trt: Any, library: Library, request: BuildRequest, tell: Progress, cancelled: Callable[[], bool]) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, (low, best, high) in request.profile.items():
        profile.add(name, low, best, high)
    options: dict[str, Any] = {
        "profiles": [profile],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "max_aux_streams": 0,
        "progress_monitor": monitor_of(trt, tell, cancelled),
        "builder_optimization_level": request.builder_level,
        "load_timing_cache": request.timing_cache
        if request.timing_cache and Path(request.timing_cache).is_file()
        else None,
    }
    if request.workspace_bytes is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request.workspace_bytes}
    if request.any_gpu_of_architecture:
        options["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    if library is Library.TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [(gpu.major, gpu.minor) for gpu in map(Architecture.parse, request.gpus)]
        create = CreateConfigRTX(compute_capabilities=capabilities, **options)
    else:
        create = CreateConfig(**options)

    def without_tf32(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        config.clear_flag(trt.BuilderFlag.TF32)
        return config

    return without_tf32


def _collect_errors() -> list[str]:
    """The list to which Polygraphy's logger adds every error of the library from now on."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    errors: list[str] = []
    log_error = G_LOGGER.error

    def error(message: Any, *args: Any, **kwargs: Any) -> None:
        errors.append(one_line(str(message), REASON_CHARS))
        log_error(message, *args, **kwargs)

    G_LOGGER.error = error
    return errors


def _reason(errors: list[str], error: Exception) -> str:
    return errors[-1] if errors else one_line(error, REASON_CHARS)


def _contents(trt: Any, request: BuildRequest, path: Path, plan: Any) -> tuple[tuple[Kernel, ...], int]:
    if request.library == Library.TENSORRT_RTX:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return kernels_of_plan(content), scratch_of_plan(content)
    from polygraphy.backend.trt import engine_from_bytes

    engine = engine_from_bytes(plan)  # not from its path: Polygraphy's reader breaks with TensorRT 11
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None:  # without fixed shapes, the inspector reports no types for an engine with dynamic shapes
        for name, (_, best, _) in request.profile.items():
            context.set_input_shape(name, best)
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return kernels_of_inspector(text), int(engine.device_memory_size_v2)
