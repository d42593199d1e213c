"""Builds one engine with Polygraphy's loaders, whichever library they drive; only inside the worker."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from time import perf_counter
from typing import Any

from ilf_trt.contract.target import Architecture, Library
from ilf_trt.engines.library import open_library
from ilf_trt.engines.listing import Kernel, kernels_of_inspector, kernels_of_plan, scratch_of_plan
from ilf_trt.engines.profiles import Profile
from ilf_trt.engines.progress import Tell, monitor_of
from ilf_trt.engines.report import EngineReport
from ilf_trt.errors import EngineError

KIB_PER_MIB = 1024
WORDS = 600


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One engine to build; `gpus` as `sm89` for TensorRT-RTX, empty for TensorRT. Paths are absolute."""

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


def build_engine(request: BuildRequest, tell: Tell, cancelled: Callable[[], bool]) -> EngineReport:
    """Write the engine of `request` and say what is in it.

    The network is strongly typed: every precision comes from the graph. TF32 is off, so that fp32 means it. One stream,
    so that a trajectory can be captured. Raises EngineError with the parser's or the builder's own words.
    """
    library = Library(request.library)
    trt = open_library(library)
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    errors = _listen()
    began = perf_counter()
    try:
        network = network_from_onnx_path(
            request.onnx, strongly_typed=hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        )
    except PolygraphyException as error:
        raise EngineError(
            f"{request.graph}: {library} refuses a node: {_said(errors, error)}; export with --precision fp16, or "
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
            f"{request.graph}: {library} built no engine: {_said(errors, error)}; if memory ran out, pass a smaller "
            "--workspace or --batch"
        ) from error
    path = Path(request.engine)
    with path.open("wb") as file:
        file.write(memoryview(plan))
    try:
        kernels, scratch_bytes = _contents(trt, request, path, plan)
    except PolygraphyException as error:
        raise EngineError(
            f"{request.graph}: {library} cannot load the engine that it built: {_said(errors, error)}; if GPU memory "
            "ran out, free some or pass a smaller --batch"
        ) from error
    return EngineReport(
        graph=request.graph,
        precision=request.precision,
        build_s=round(perf_counter() - began, 2),
        builder_peak_mib=_peak_mib(),
        engine_bytes=path.stat().st_size,
        scratch_bytes=scratch_bytes,
        network_layers=dict(layers.most_common()),
        expected=request.expected,
        kernels=kernels,
    )


def _peak_mib() -> float:
    """Most memory that this process held; getrusage would count what its parent held when it started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / KIB_PER_MIB, 1)


def _config(trt: Any, library: Library, request: BuildRequest, tell: Tell, cancelled: Callable[[], bool]) -> Any:
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


def _listen() -> list[str]:
    """Collect what the library reports as an error, through the logger that Polygraphy gives it."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    errors: list[str] = []
    said = G_LOGGER.error

    def hear(message: Any, *args: Any, **kwargs: Any) -> None:
        errors.append(" ".join(str(message).split()))
        said(message, *args, **kwargs)

    G_LOGGER.error = hear
    return errors


def _said(errors: list[str], error: Exception) -> str:
    return (errors[-1] if errors else " ".join(str(error).split()))[:WORDS]


def _contents(trt: Any, request: BuildRequest, path: Path, plan: Any) -> tuple[tuple[Kernel, ...], int]:
    if request.library == Library.TENSORRT_RTX:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return kernels_of_plan(content), scratch_of_plan(content)
    from polygraphy.backend.trt import engine_from_bytes

    engine = engine_from_bytes(plan)  # not from its path: Polygraphy's reader answers TensorRT 11's seek with a number
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None:  # without shapes that are set, the inspector tells no types of an engine whose shapes vary
        for name, (_, best, _) in request.profile.items():
            context.set_input_shape(name, best)
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return kernels_of_inspector(text), int(engine.device_memory_size_v2)
