"""Whether a bundle's engines run on this machine, told before any of them is opened, and which to take."""

from collections.abc import Callable
from enum import StrEnum

from ilf_trt.contract.manifest import EngineFacts, Manifest
from ilf_trt.contract.target import Library
from ilf_trt.errors import EngineError, IlfError, InvalidRequest
from ilf_trt.runtime.gpu.cuda import Gpu

NUMBERS_THAT_BIND = 3  # of a library's version: major.minor.patch; the build number may differ


class EngineKind(StrEnum):
    """What runs the graphs: an engine library that the bundle was compiled for, or ONNX Runtime."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    ONNXRUNTIME = "onnxruntime"

    @classmethod
    def parse(cls, text: str) -> "EngineKind":
        try:
            return cls(text)
        except ValueError as error:
            raise InvalidRequest(f"engine {text!r} is unknown; it is one of {', '.join(cls)}") from error


def library_for(
    manifest: Manifest, gpu: Gpu, wanted: EngineKind | None, version_of: Callable[[Library], str]
) -> Library | None:
    """The library whose engines of the bundle run on `gpu`; None means ONNX Runtime.

    Without a wish: the first of the bundle's targets that fits, or ONNX Runtime when the bundle has no engines.
    `version_of` asks an installed library, and raises MissingDependency. Raises EngineError when none fits, with the
    reason of each.
    """
    if wanted is EngineKind.ONNXRUNTIME:
        return None
    there = tuple(dict.fromkeys(Library(facts.target) for facts in manifest.engines))
    if wanted is not None and Library(wanted) not in there:
        has = f"it has {', '.join(there)}" if there else "it has none"
        raise EngineError(
            f"the bundle has no {wanted} engines, {has}; compile them: ilf-trt compile BUNDLE --target {wanted}"
        )
    if not there:
        return None
    refusals: list[IlfError] = []
    for library in there if wanted is None else (Library(wanted),):
        try:
            _check_all(manifest, gpu, library, version_of(library))
        except IlfError as error:
            refusals.append(error)
        else:
            return library
    if len(refusals) == 1:
        raise refusals[0]
    raise EngineError("none of the bundle's engines runs here: " + " | ".join(map(str, refusals)))


def check(facts: EngineFacts, gpu: Gpu, version: str) -> None:
    """Raise EngineError when an engine was made for another library, GPU or driver than these."""
    target, again = facts.target, f"compile the bundle on this machine: ilf-trt compile BUNDLE --target {facts.target}"
    if _numbers(facts.library_version)[:NUMBERS_THAT_BIND] != _numbers(version)[:NUMBERS_THAT_BIND]:
        raise EngineError(
            f"engine {facts.graph} was built with {target} {facts.library_version}, this machine has {version}; "
            f"install that version, or {again}"
        )
    if str(gpu.architecture) not in facts.gpus:
        rtx = " --gpu " + str(gpu.architecture) if target == Library.TENSORRT_RTX else ""
        raise EngineError(
            f"engine {facts.graph} is for {', '.join(facts.gpus)}, {gpu.name} is {gpu.architecture}; {again}{rtx}"
        )
    if facts.gpu_name and facts.gpu_name != gpu.name and not facts.any_gpu_of_architecture:
        raise EngineError(
            f"engine {facts.graph} is for {facts.gpu_name} alone, this is {gpu.name}; {again}, or compile it "
            "there with --hardware-compat"
        )
    if gpu.driver and _numbers(facts.driver)[:1] > gpu.driver[:1]:
        has = ".".join(map(str, gpu.driver))
        raise EngineError(
            f"engine {facts.graph} was built under driver {facts.driver}, this machine has {has}; update the "
            f"driver, or {again}"
        )


def _check_all(manifest: Manifest, gpu: Gpu, library: Library, version: str) -> None:
    compiled = {facts.graph: facts for facts in manifest.engines if facts.target == library}
    for graph in manifest.graphs:
        if graph.name not in compiled:
            raise EngineError(
                f"the bundle has no {library} engine for graph {graph.name}; compile it anew: ilf-trt compile BUNDLE "
                f"--target {library}"
            )
        check(compiled[graph.name], gpu, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
