"""The one door to the leaves and to the torch wings: typed functions that import when they are called.

No other file of `ilf_trt` names `export`, `engines` or `runtime`. A missing package becomes MissingDependency here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilf_trt.errors import MissingDependency

if TYPE_CHECKING:
    from rich.table import Table

    from ilf_trt.assembly.build_cache import BuildCache
    from ilf_trt.assembly.options import BuildOptions
    from ilf_trt.assembly.stages import Stages
    from ilf_trt.contract.bundle import Bundle
    from ilf_trt.contract.manifest import Manifest
    from ilf_trt.contract.spec import Precision
    from ilf_trt.contract.target import EngineOptions
    from ilf_trt.engines.compiler import Compiler as Compiler
    from ilf_trt.engines.report import EngineReport as EngineReport
    from ilf_trt.export.bundle import Exported as Exported
    from ilf_trt.runtime.pipeline import Pipeline as Pipeline
    from ilf_trt.runtime.verify import Difference as Difference

GENERATE, VERIFY = "ilf_trt.runtime.commands:generate", "ilf_trt.runtime.commands:verify"
"""The commands of the runtime; the command line loads them by name, so that they start without torch."""


def export_bundle(checkpoint: str, folder: Path, options: "BuildOptions", stages: "Stages") -> "Exported":
    """Write every file of a bundle into `folder`; raises as `ilf_trt.export.bundle.export_bundle` does."""
    with _needing("building", "build"):
        from ilf_trt.export.bundle import export_bundle as export
    return export(checkpoint, folder, options, stages)


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


def verified(bundle: Path, limit: float) -> "tuple[Difference, ...]":
    """How far a bundle is from its reference on the CPU; raises ParityError past `limit`."""
    from ilf_trt.runtime.verify import check, verify

    differences, _ = verify(bundle)
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


@contextmanager
def _needing(work: str, extra: str) -> Iterator[None]:
    """Turn a failed import of the block into MissingDependency, which names the extra to install."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingDependency):
            raise
        raise MissingDependency(f"{work} needs {error.name}; pip install 'ilf-trt[{extra}]'") from error
