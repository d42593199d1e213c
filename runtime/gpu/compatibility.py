"""Decides whether a bundle's engines run on this machine, and which of them, before any engine is opened."""

from collections.abc import Callable

from ilf_trt.contract.manifest import EngineFacts, Manifest
from ilf_trt.contract.target import Library
from ilf_trt.errors import EngineError, IlfError
from ilf_trt.runtime.engine import EngineKind

from .cuda import Gpu

NUMBERS_THAT_BIND = 3  # of a library's version: major.minor.patch; the build number may differ


def library_for(
    manifest: Manifest, gpu: Gpu, kind: EngineKind | None, version_of: Callable[[Library], str]
) -> Library | None:
    """The library whose engines of the bundle run on `gpu`; None means ONNX Runtime.

    Without `kind`, the first of the bundle's targets that fits wins; a bundle without engines runs in ONNX Runtime.
    `version_of` returns the version of an installed library, or raises MissingDependency. If no engine fits, this
    function raises EngineError with every reason.
    """
    if kind is EngineKind.ONNXRUNTIME:
        return None
    libraries = tuple(dict.fromkeys(Library(facts.target) for facts in manifest.engines))
    if kind is not None and Library(kind) not in libraries:
        raise EngineError(
            f"the bundle has no {kind} engines, it has {', '.join(libraries) or 'none'}; compile them: ilf-trt compile "
            f"BUNDLE --target {kind}"
        )
    if not libraries:
        return None
    refusals: list[IlfError] = []
    for library in libraries if kind is None else (Library(kind),):
        try:
            _check_all(manifest, gpu, library, version_of(library))
        except IlfError as error:
            refusals.append(error)
        else:
            return library
    if len(refusals) == 1:
        raise refusals[0]
    raise EngineError("none of the bundle's engines runs on this machine: " + " | ".join(map(str, refusals)))


def check(facts: EngineFacts, gpu: Gpu, version: str) -> None:
    """Raise EngineError if the engine was built for another library, GPU or driver than these."""
    target, fix = facts.target, f"compile the bundle on this machine: ilf-trt compile BUNDLE --target {facts.target}"
    if _numbers(facts.library_version)[:NUMBERS_THAT_BIND] != _numbers(version)[:NUMBERS_THAT_BIND]:
        raise EngineError(
            f"engine {facts.graph} was built with {target} {facts.library_version}, this machine has {version}; "
            f"install that version, or {fix}"
        )
    if str(gpu.architecture) not in facts.gpus:
        rtx = " --gpu " + str(gpu.architecture) if target == Library.TENSORRT_RTX else ""
        raise EngineError(
            f"engine {facts.graph} is for {', '.join(facts.gpus)}, {gpu.name} is {gpu.architecture}; {fix}{rtx}"
        )
    if facts.gpu_name and facts.gpu_name != gpu.name and not facts.any_gpu_of_architecture:
        raise EngineError(
            f"engine {facts.graph} is only for {facts.gpu_name}, this is {gpu.name}; {fix}, or compile it on "
            f"{facts.gpu_name} with --hardware-compat"
        )
    if gpu.driver and _numbers(facts.driver)[:1] > gpu.driver[:1]:
        driver = ".".join(map(str, gpu.driver))
        raise EngineError(
            f"engine {facts.graph} was built under driver {facts.driver}, this machine has {driver}; update the "
            f"driver, or {fix}"
        )


def _check_all(manifest: Manifest, gpu: Gpu, library: Library, version: str) -> None:
    compiled = {facts.graph: facts for facts in manifest.engines if facts.target == library}
    for graph in manifest.graphs:
        if graph.name not in compiled:
            raise EngineError(
                f"the bundle has no {library} engine for graph {graph.name}; compile it again: ilf-trt compile BUNDLE "
                f"--target {library}"
            )
        check(compiled[graph.name], gpu, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
