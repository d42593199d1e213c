"""A machine with GPUs and engine libraries that are stand-ins, and bundles with engines for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fake_cuda
import fake_onnxruntime
import fake_tensorrt
import pytest

from ilf_trt.contract.bundle import ENGINE_FOLDER, Bundle, write_manifest
from ilf_trt.contract.manifest import EngineFacts
from ilf_trt.engines.profiles import profile_of

GPU_NAME = fake_cuda.FakeGpu().name
DRIVER = "580.65.6"
VERSIONS = {"tensorrt": "10.13.3.9", "tensorrt-rtx": "1.7.1.116"}
SCRATCH_BYTES = {"cond": 1024, "pre": 4096, "loop_body": 8192, "loop_feedback": 2048, "post": 4096}


@dataclass
class Machine:
    """The GPUs, and the libraries that are installed beside them."""

    cuda: fake_cuda.FakeCuda
    libraries: dict[str, Any] = field(default_factory=dict)

    @property
    def tensorrt(self) -> Any:
        return self.libraries["tensorrt"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two H100, TensorRT, TensorRT-RTX and ONNX Runtime with CUDA; no test may break a rule or leave anything open."""
    cuda = fake_cuda.install(monkeypatch, devices=[fake_cuda.FakeGpu()] * 2)
    made = Machine(cuda)
    for target, version in VERSIONS.items():
        made.libraries[target] = fake_tensorrt.install(
            monkeypatch, cuda, module=target.replace("-", "_"), version=version
        )
    made.libraries["onnxruntime"] = fake_onnxruntime.install(monkeypatch, cuda)
    yield made
    assert cuda.broken == []
    assert cuda.live() == []


Compiled = Callable[..., Path]


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    """A copy of a bundle with engines for the machine; `change` alters what the manifest says of each."""

    def copy(bundle: Path, *targets: str, change: Callable[[EngineFacts], EngineFacts] = lambda facts: facts) -> Path:
        folder = tmp_path / f"{bundle.stem}-{'-'.join(targets)}.ilf"
        opened = Bundle.open(bundle)
        folder.mkdir()
        opened.copy(folder)
        engines = [
            change(_engine(folder, opened, graph.name, target))
            for target in targets or ("tensorrt",)
            for graph in opened.manifest.graphs
        ]
        write_manifest(folder, replace(opened.manifest, engines=tuple(engines)))
        return folder

    return copy


def _engine(folder: Path, bundle: Bundle, graph: str, target: str) -> EngineFacts:
    manifest = bundle.manifest
    border = next(each for each in manifest.graphs if each.name == graph)
    engine = folder / ENGINE_FOLDER / target / f"{graph}.engine"
    engine.parent.mkdir(parents=True, exist_ok=True)
    fake_tensorrt.write_plan(
        engine,
        bundle.graph(graph).path,
        profile=profile_of(border, manifest.batch, manifest.spec, times=len(manifest.plan.times)),
        scratch_bytes=SCRATCH_BYTES[graph],
        name=graph,
        version=VERSIONS[target],
    )
    report = engine.with_suffix(".json")
    report.write_text("{}")
    return EngineFacts(
        graph=graph,
        target=target,
        file=engine.relative_to(folder).as_posix(),
        report=report.relative_to(folder).as_posix(),
        library_version=VERSIONS[target],
        gpus=("sm90",),
        gpu_name=GPU_NAME if target == "tensorrt" else "",
        driver=DRIVER if target == "tensorrt" else "",
        any_gpu_of_architecture=False,
        key="",
    )
