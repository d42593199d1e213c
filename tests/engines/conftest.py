"""Engines that the tests share, built once a session by the real TensorRT-RTX, and libraries that fail as asked."""

import os
import shutil
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import psutil
import pytest
import torch

from ilf_trt import load_ilf, save_ilf
from ilf_trt.assembly.conductor import BuildResult, build, compile_bundle
from ilf_trt.assembly.options import BuildOptions
from ilf_trt.contract.document import as_type
from ilf_trt.contract.spec import BatchRange, Precision
from ilf_trt.contract.target import Architecture, EngineOptions, Library
from ilf_trt.engines.builder import BuildRequest
from ilf_trt.engines.job import ask
from ilf_trt.engines.library import LibraryFacts
from ilf_trt.engines.profiles import Profile
from ilf_trt.engines.report import EngineReport
from tests.conftest import TEXT_TOKENS, small_dit, small_pixart, write_checkpoint

SHIMS = Path(__file__).parent / "shims"
ADA = Architecture(8, 9)
BLACKWELL = Architecture(12, 0)
RTX = EngineOptions(Library.TENSORRT_RTX, (ADA,))

BLOCKS = 3
LOOP = (1, 1)
STEPS = {"steps": 2, "feedback": "all", "verify": False}
DYNAMIC = BatchRange(1, 2, 4)
FIXED = BatchRange(1, 1, 1)

# Stands before the real library on the worker's path, and gives the builder another way to end.
FAILING = """
from tensorrt_rtx_bindings import *
from tensorrt_rtx_bindings import Builder as _Builder, __version__

class Builder(_Builder):
    def build_serialized_network(self, network, config):
        {body}
"""

PRODUCT = "g ({kind}[N,64] x, {kind}[64,64] w) => ({kind}[N,64] y) {{ [product] y = MatMul(x, w) }}"
VARYING: Profile = {"x": ((1, 64), (4, 64), (8, 64))}


@dataclass
class ProgressRecord:
    """The progress calls of a build, or of a builder."""

    calls: list[tuple[str, int, int, str]] = field(default_factory=list)

    def tell(self, what: str, done: int, total: int, detail: str = "", /) -> None:
        self.calls.append((what, done, total, detail))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(what for what, *_ in self.calls))


@dataclass(frozen=True)
class Built:
    """A build with engines, its own cache beside it, and what it was built from."""

    result: BuildResult
    progress: ProgressRecord
    checkpoint: Path
    cache: Path
    options: BuildOptions

    @property
    def path(self) -> Path:
        return self.result.bundle.path

    @property
    def reports(self) -> dict[str, EngineReport]:
        return {report.graph: report for report in self.result.reports}

    def plan(self, graph: str) -> bytes:
        """The engine of a graph, as TensorRT-RTX wrote it."""
        return (self.path / f"engines/tensorrt-rtx/{graph}.engine").read_bytes()


def build_with_engines(checkpoint: Path, **options: Any) -> Built:
    """A build that is not verified, for sm89 unless `options` say otherwise; builds of one checkpoint share a cache."""
    cache = checkpoint.parent / "cache"
    progress = ProgressRecord()
    settings = BuildOptions(**{**STEPS, "engines": RTX, "cache": cache, **options})
    output = checkpoint.parent / f"{settings.precision}.ilf"
    result = build(str(checkpoint), output, settings, progress=progress.tell)
    return Built(result, progress, checkpoint, cache, settings)


def retrained(checkpoint: Path, folder: Path) -> Path:
    """The same frozen backbone under a feedback block and scales of another training."""
    model = load_ilf(checkpoint)
    with torch.no_grad():
        for parameter in model.feedback.parameters():
            parameter.add_(torch.full_like(parameter, 0.01))
    save_ilf(model, folder)
    shutil.copytree(checkpoint / "scheduler", folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def thin_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one block before the loop, one in it, one after."""
    return write_checkpoint(tmp_path_factory.mktemp("thin_dit") / "checkpoint", small_dit(num_layers=BLOCKS), LOOP)


@pytest.fixture(scope="session")
def dit_fp16(thin_dit: Path) -> Built:
    """FP16, dynamic batch, for two architectures at once."""
    both = EngineOptions(Library.TENSORRT_RTX, (ADA, BLACKWELL))
    return build_with_engines(thin_dit, precision=Precision.FP16, batch=DYNAMIC, engines=both)


@pytest.fixture(scope="session")
def dit_fp8(thin_dit: Path) -> Built:
    """FP8 but for the attentions' outputs, dynamic batch, in the cache of dit_fp16."""
    return build_with_engines(thin_dit, precision=Precision.FP8, batch=DYNAMIC, fp8_exclude=("*.to_out.0",))


@pytest.fixture(scope="session")
def pixart_bf16(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """BF16, a fixed batch, masked text whose keys and values are computed once a picture."""
    folder = tmp_path_factory.mktemp("thin_pixart") / "checkpoint"
    checkpoint = write_checkpoint(folder, small_pixart(sized=False, num_layers=BLOCKS), LOOP)
    return build_with_engines(
        checkpoint, precision=Precision.BF16, batch=FIXED, text_tokens=TEXT_TOKENS, hoist_text=True
    )


@pytest.fixture(scope="session")
def dit_fp32(dit_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """Engines for a bundle that was built without."""
    return compile_bundle(dit_build.bundle.path, tmp_path_factory.mktemp("dit_fp32") / "dit.ilf", RTX)


def graph_request(folder: Path, text: str, **changes: Any) -> BuildRequest:
    """A request for the engine of one ONNX graph, given as text; for sm89 and by TensorRT-RTX unless said otherwise."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "made.up": 1]> {text}')
    onnx.save(model, folder / "graph.onnx")
    request = BuildRequest(
        library=Library.TENSORRT_RTX.value,
        graph="graph",
        onnx=str(folder / "graph.onnx"),
        engine=str(folder / "graph.engine"),
        precision="fp32",
        expected=(),
        profile={},
        gpus=(str(ADA),),
        builder_level=None,
        workspace_bytes=None,
        any_gpu_of_architecture=False,
        timing_cache=None,
    )
    return replace(request, **changes)


def build_graph(folder: Path, text: str, progress: ProgressRecord | None = None, **changes: Any) -> EngineReport:
    """The report of the engine at `folder`/graph.engine."""
    request = graph_request(folder, text, **changes)
    tell = (progress or ProgressRecord()).tell
    return as_type(ask(Library(request.library), {"do": "build", "engine": request.as_json()}, tell), EngineReport)


def workers() -> list[psutil.Process]:
    """The builders of engines that this process started and that still live."""
    alive = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # nor is a zombie alive
            if "ilf_trt.engines.worker" in child.cmdline():
                alive.append(child)
    return alive


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give the worker a TensorRT-RTX whose builder does as the statements say."""

    def write(statements: str) -> None:
        place = tmp_path / "library" / "tensorrt_rtx"
        place.mkdir(parents=True)
        body = textwrap.indent(textwrap.dedent(statements), " " * 8).strip()
        (place / "__init__.py").write_text(FAILING.format(body=body))
        monkeypatch.setenv("PYTHONPATH", str(place.parent), prepend=os.pathsep)

    return write


class Worker:
    """Answers like the worker, at once; counts what it was asked to build."""

    def __init__(self) -> None:
        self.facts = LibraryFacts("1.7.1", (ADA, BLACKWELL), "", "")
        self.built: list[str] = []

    def ask(self, library: Library, request: dict[str, Any], tell: object = None) -> dict[str, Any]:
        if request["do"] == "probe":
            return self.facts.as_json()
        build = BuildRequest.from_json(request["engine"])
        assert Path(build.engine).is_absolute()
        assert Path(build.onnx).is_absolute()
        self.built.append(build.graph)
        Path(build.engine).write_bytes(f"{build.graph} {len(self.built)}".encode())
        size = Path(build.engine).stat().st_size
        return EngineReport(build.graph, build.precision, 0.1, 1.0, size, 0, {}, build.expected, ()).as_json()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    standing = Worker()
    monkeypatch.setattr("ilf_trt.engines.compiler.ask", standing.ask)
    return standing
