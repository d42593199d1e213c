"""The one door to the leaves and to the torch wings: typed functions that import when they are called.

No other file of `ilf_trt` names `export`, `engines` or `runtime`, but for `bench/one_graph.py`, which joins two of
them. A missing package becomes MissingDependency here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .contract.progress import Progress
from .errors import MissingDependency

if TYPE_CHECKING:
    from rich.table import Table

    from ilf_trt.engines.compiler import Compiler as Compiler
    from ilf_trt.engines.report import EngineReport as EngineReport
    from ilf_trt.export.bundle import Exported as Exported
    from ilf_trt.runtime.pipeline import Pipeline as Pipeline
    from ilf_trt.runtime.verify import Difference as Difference

    from .assembly.build_cache import BuildCache
    from .assembly.options import BuildOptions, PipelinePart
    from .assembly.stages import Stages
    from .contract.bundle import Bundle
    from .contract.manifest import Manifest
    from .contract.spec import Precision
    from .contract.target import EngineOptions
    from .train.cost import Cost as Cost
    from .train.data.index import Index as Index
    from .train.loop import Outcome as Outcome
    from .train.recipe import Recipe as Recipe

GENERATE, REPLAY = "ilf_trt.runtime.commands:generate", "ilf_trt.runtime.commands:replay"
VERIFY = "ilf_trt.runtime.commands:verify"
"""The commands of the runtime; the command line loads them by name, so that they start without torch."""


def export_bundle(
    checkpoint: str, folder: Path, options: "BuildOptions", cache: "BuildCache | None", stages: "Stages"
) -> "Exported":
    """Write every file of a bundle into `folder`; raises as `ilf_trt.export.bundle.export_bundle` does."""
    with _needing("building", "build"):
        from ilf_trt.export.bundle import export_bundle as export
    return export(checkpoint, folder, options, cache, stages)


def export_part(
    exported: "Exported",
    folder: Path,
    part: "PipelinePart",
    precision: "Precision",
    cache: "BuildCache | None",
    stages: "Stages",
) -> "Exported":
    """Write a part of the pipeline again, in another precision; raises as `ilf_trt.export.bundle.export_part` does."""
    with _needing("building", "build"):
        from ilf_trt.export.bundle import export_part as export
    return export(exported, folder, part, precision, cache, stages)


def write_rounded(bundle: Path, folder: Path, manifest: "Manifest") -> Path:
    """A float32 bundle in `folder` that computes what the bfloat16 one in `bundle` does."""
    with _needing("building", "build"):
        from ilf_trt.export.rounding import write_rounded as write
    return write(bundle, folder, manifest)


def open_compiler(engines: "EngineOptions", precision: "Precision", cache: "BuildCache | None") -> "Compiler":
    """An engine library on this machine; raises as `Compiler.open` does."""
    from ilf_trt.engines.compiler import Compiler

    return Compiler.open(engines, precision, cache)


def report_table(reports: "tuple[EngineReport, ...]") -> "Table":
    """What is in engines, for a terminal."""
    from ilf_trt.engines.report import report_table as table

    return table(reports)


def show_engines(bundle: "Bundle", *, as_json: bool) -> None:
    """Print the reports of a bundle's engines; raises InvalidRequest when it has none."""
    from ilf_trt.engines.report_view import show_engines as show

    show(bundle, as_json=as_json)


def layers_outside(bundle: "Bundle") -> tuple[str, ...]:
    """The layers of a bundle's engines that run in another precision than asked, as `graph: layers, precision`."""
    from ilf_trt.engines.compiler import read_report

    reports = [read_report(bundle.path / facts.report) for facts in bundle.manifest.engines]
    return tuple(
        f"{report.graph}: {', '.join(kernel.labels)}, {kernel.precision or '?'}"
        for report in reports
        for kernel in report.outside
    )


def check_verifier() -> None:
    """Raise MissingDependency if this machine has no ONNX Runtime, which `verify_bundle` runs the graphs with."""
    from ilf_trt.runtime.onnxruntime_import import check_onnxruntime

    check_onnxruntime()


def import_onnxruntime() -> Any:
    """The module of ONNX Runtime, without its telemetry; raises MissingDependency."""
    from ilf_trt.runtime.onnxruntime_import import import_onnxruntime as load

    return load()


def verify_bundle(bundle: Path, limit: float, built: "Manifest") -> "tuple[Difference, ...]":
    """How far a bundle is from its reference on the CPU; `built` says the precisions that its parts were built in.

    Raises ParityError past `limit`, NonFinite.
    """
    from ilf_trt.runtime.verify import check, verify

    differences, _ = verify(bundle, built=built)
    check(differences, limit)
    return differences


def difference_table(differences: "tuple[Difference, ...]") -> "Table":
    """Differences from the reference, for a terminal."""
    from ilf_trt.runtime.verify import table

    return table(differences)


def load_pipeline(bundle: str | Path, **options: Any) -> "Pipeline":
    """`ilf_trt.runtime.Pipeline.load` with the same options."""
    from ilf_trt.runtime.pipeline import Pipeline

    return Pipeline.load(bundle, **options)


def gpu_used_mib(ordinal: int) -> Callable[[], float]:
    """A call that gives the used memory of the whole GPU `cuda:ordinal` in MiB; raises as `Gpu.open` does."""
    from ilf_trt.runtime.gpu.cuda import Gpu

    gpu = Gpu.open(ordinal)
    return lambda: gpu.used_bytes() / (1 << 20)


def read_recipe(name: str, changes: Sequence[str] = ()) -> "Recipe":
    """Read a recipe file or a recipe of the package, with `SECTION.KEY=VALUE` changes; raises InvalidRequest."""
    from .train.recipe import Recipe

    return Recipe.read(name, changes)


def train_recipe(
    recipe: "Recipe", output: Path, *, resume: str, cpu: bool, stop: Callable[[], bool], progress: Progress
) -> "Outcome":
    """Train the feedback block of a recipe into `output`; raises MissingDependency, and as `train.run` does."""
    with _needing("training", "train"):
        from .train.run import train_recipe
    return train_recipe(recipe, output, resume=resume, cpu=cpu, stop=stop, progress=progress)


def recipe_cost(recipe: "Recipe", *, processes: int) -> "Cost":
    """Count the cost of a recipe over `processes`; raises MissingDependency, and as `train.cost` does."""
    with _needing("a dry run", "train"):
        from .train.cost import cost_of_recipe
    return cost_of_recipe(recipe, processes)


def train_demo(
    output: Path,
    *,
    seed: int,
    base_iterations: int | None,
    feedback_iterations: int | None,
    threads: int,
    progress: Progress,
) -> None:
    """Train the digits demo into `output`; raises MissingDependency, and as `train.demo` does."""
    with _needing("training", "train,demo"):
        from .train.demo import train
    train(
        output,
        seed=seed,
        base_iterations=base_iterations,
        feedback_iterations=feedback_iterations,
        threads=threads,
        progress=progress,
    )


def prepare_data(
    output: Path,
    *,
    kind: Literal["images", "webdataset"],
    path: str,
    vae: str | None,
    text_encoder: str | None,
    size: int,
    text_tokens: int,
    batch: int,
    dtype: Literal["fp16", "bf16", "fp32"],
    sample: bool,
    shard_size: int,
    device: str,
    workers: int,
    max_broken: int,
    seed: int,
    progress: Progress,
) -> "Index":
    """Write prepared data into `output`; raises MissingDependency, and as `train.data.run` does."""
    with _needing("preparing data", "prepare"):
        from .train.data.run import PrepareOptions, prepare_folder
    options = PrepareOptions(
        kind=kind,
        path=path,
        vae=vae,
        text_encoder=text_encoder,
        size=size,
        text_tokens=text_tokens,
        batch=batch,
        dtype=dtype,
        sample=sample,
        shard_size=shard_size,
        device=device,
        workers=workers,
        max_broken=max_broken,
        seed=seed,
    )
    return prepare_folder(options, output, progress=progress)


@contextmanager
def _needing(work: str, extra: str) -> Iterator[None]:
    """Turn a failed import of the block into MissingDependency, which names the extra to install."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingDependency):
            raise
        raise MissingDependency(f"{work} needs {error.name}; pip install 'ilf-trt[{extra}]'") from error
