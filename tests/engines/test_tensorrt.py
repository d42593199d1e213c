"""The target of TensorRT, played by TensorRT-RTX's builder behind TensorRT's name and without a GPU; see `shims`."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ilf_trt.assembly.conductor import BuildResult, compile_bundle
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.ports import GRAPHS
from ilf_trt.contract.target import GIB, Architecture, EngineOptions, Library
from ilf_trt.engines.job import ask
from ilf_trt.engines.library import LibraryFacts
from ilf_trt.errors import DeviceError, EngineError, MissingDependency
from tests.engines.conftest import PRODUCT, SHIMS, VARYING, Built, build_graph

TENSORRT = EngineOptions(Library.TENSORRT)
SCRATCH_BYTES = 4096  # of every engine of the shim


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the shims on the worker's path, and say what they play."""

    def play(**variables: str) -> None:
        monkeypatch.setenv("PYTHONPATH", str(SHIMS), prepend=os.pathsep)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return play


def probe() -> LibraryFacts:
    return LibraryFacts.from_json(ask(Library.TENSORRT, {"do": "probe", "library": "tensorrt"}))


@pytest.fixture(scope="module")
def compiled(dit_fp16: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, Path]:
    """FP16 engines of every graph, with every option set, and their cache."""
    folder = tmp_path_factory.mktemp("tensorrt")
    options = replace(TENSORRT, builder_level=2, workspace_bytes=GIB, any_gpu_of_architecture=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SHIMS), prepend=os.pathsep)
        return compile_bundle(dit_fp16.path, folder / "dit.ilf", options, cache=folder / "cache"), folder / "cache"


# --- a whole bundle


def test_every_graph_has_an_engine_for_the_gpu_at_hand(compiled: tuple[BuildResult, Path], dit_fp16: Built) -> None:
    manifest = Bundle.open(compiled[0].bundle.path).manifest
    engines = [facts for facts in manifest.engines if facts.target == "tensorrt"]
    assert [facts.graph for facts in engines] == list(GRAPHS)
    for facts in engines:
        assert facts.file == f"engines/tensorrt/{facts.graph}.engine"
        assert (facts.library_version, facts.gpus, facts.gpu_name) == ("11.4.0.106", ("sm89",), "NVIDIA Test GPU")
        assert (facts.driver, facts.any_gpu_of_architecture) == ("580.65.6", True)
    others = [facts for facts in manifest.engines if facts.target == "tensorrt-rtx"]
    assert tuple(others) == dit_fp16.result.bundle.manifest.engines


def test_the_inspector_tells_the_kernels_and_their_precision(
    compiled: tuple[BuildResult, Path], dit_fp16: Built
) -> None:
    for report in compiled[0].reports:
        same = dit_fp16.reports[report.graph]
        assert report.by_kind == same.by_kind
        assert [kernel.layers for kernel in report.kernels if kernel.layers] == [
            kernel.layers or (f"{kernel.name}_myl0_1",) for kernel in same.kernels
        ]
        assert report.outside == ()
        assert report.scratch_bytes == SCRATCH_BYTES


def test_timings_are_kept_for_the_next_build(compiled: tuple[BuildResult, Path]) -> None:
    (timings,) = (compiled[1] / "timing").glob("*.cache")
    assert timings.stat().st_size > 0


def test_a_second_build_takes_every_engine_from_the_cache(
    compiled: tuple[BuildResult, Path], dit_fp16: Built, tmp_path: Path, tensorrt: Callable[..., None]
) -> None:
    tensorrt()
    options = replace(TENSORRT, builder_level=2, workspace_bytes=GIB, any_gpu_of_architecture=True)
    again = compile_bundle(dit_fp16.path, tmp_path / "again.ilf", options, cache=compiled[1])
    assert again.reused == tuple(f"engine {name}" for name in GRAPHS)
    assert again.reports == compiled[0].reports


# --- one engine


def test_types_are_told_of_shapes_that_are_fixed(tmp_path: Path, tensorrt: Callable[..., None]) -> None:
    tensorrt()
    text = PRODUCT.format(kind="bfloat16").replace("N", "4")
    report = build_graph(tmp_path, text, library="tensorrt", gpus=(), precision="bf16")
    assert report.by_kind == {("matmul", "bf16"): 1}


def test_timings_of_one_build_are_given_to_the_next(tmp_path: Path, tensorrt: Callable[..., None]) -> None:
    notes, timings = tmp_path / "notes", tmp_path / "timings.cache"
    tensorrt(TENSORRT_NOTES=str(notes))
    options = {"library": "tensorrt", "gpus": (), "profile": VARYING, "timing_cache": str(timings)}
    build_graph(tmp_path, PRODUCT.format(kind="float"), **options)
    assert notes.read_text().split()[0] == "0"
    notes.write_text("")
    size = timings.stat().st_size
    build_graph(tmp_path, PRODUCT.format(kind="float"), **options)
    assert notes.read_text().split()[0] == str(size)


@pytest.mark.parametrize("version", ["10.13.3", "10.16.1.11", "11.0.0", "11.9.9"])
def test_a_version_within_the_range_builds(version: str, tmp_path: Path, tensorrt: Callable[..., None]) -> None:
    tensorrt(TENSORRT_VERSION=version)
    report = build_graph(tmp_path, PRODUCT.format(kind="float16"), library="tensorrt", gpus=(), profile=VARYING)
    assert report.by_kind == {("matmul", "fp16"): 1}


def test_an_inspector_that_says_nothing_costs_the_list_and_not_the_engine(
    tmp_path: Path, tensorrt: Callable[..., None]
) -> None:
    tensorrt(TENSORRT_TELLS_NOTHING="1")
    report = build_graph(tmp_path, PRODUCT.format(kind="float"), library="tensorrt", gpus=(), profile=VARYING)
    assert report.kernels == ()
    assert report.engine_bytes > 0


def test_an_engine_that_cannot_be_loaded_where_it_was_built_is_an_engine_error(
    tmp_path: Path, tensorrt: Callable[..., None]
) -> None:
    tensorrt(TENSORRT_LOADS_NOTHING="1")
    with pytest.raises(EngineError, match=r"tensorrt cannot load the engine that it built: .*--batch$") as caught:
        build_graph(tmp_path, PRODUCT.format(kind="float"), library="tensorrt", gpus=(), profile=VARYING)
    assert "\n" not in str(caught.value)


# --- what is asked of the machine


def test_the_gpu_and_its_driver_are_asked_for(tensorrt: Callable[..., None]) -> None:
    tensorrt()
    assert probe() == LibraryFacts("11.4.0.106", (Architecture(8, 9),), "NVIDIA Test GPU", "580.65.6")


def test_without_nvml_the_driver_is_unknown(tensorrt: Callable[..., None]) -> None:
    tensorrt(CUDA_CORE_FAILS="no NVML")
    assert probe().driver == ""


@pytest.mark.parametrize(("version", "age"), [("10.12.0", "old"), ("8.6.1", "old"), ("12.0.0", "new"), ("9.9", "old")])
def test_a_version_outside_the_range_is_refused(version: str, age: str, tensorrt: Callable[..., None]) -> None:
    tensorrt(TENSORRT_VERSION=version)
    with pytest.raises(
        MissingDependency, match=rf"^tensorrt {version} is too {age}, it must be 10\.13 up to"
    ) as caught:
        probe()
    assert "12.0; pip install 'ilf-trt[tensorrt]'" in str(caught.value)


def test_a_module_that_names_no_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()  # what an uninstalled package may leave behind
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingDependency, match=r"tensorrt has no version, .*pip install 'ilf-trt\[tensorrt\]'"):
        probe()


def test_without_tensorrt_the_line_to_install_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot\\nopen shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingDependency) as caught:
        probe()
    assert str(caught.value) == (
        "--target tensorrt needs tensorrt and polygraphy (libnvinfer.so.11: cannot open shared object file); "
        "pip install 'ilf-trt[tensorrt]'"
    )


def test_without_cuda_core_the_line_to_install_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{SHIMS}", prepend=os.pathsep)
    with pytest.raises(MissingDependency, match=r"needs cuda-core and cuda-bindings .*'ilf-trt\[tensorrt\]'"):
        probe()


def test_without_a_gpu_it_is_said_where_to_build(tensorrt: Callable[..., None]) -> None:
    tensorrt(CUDA_CORE_FAILS="no GPU")
    with pytest.raises(
        EngineError, match=r"builds on the GPU that will run the engines, and this machine has no usable GPU"
    ) as caught:
        probe()
    assert "no CUDA-capable device is detected" in str(caught.value)
    assert "--target tensorrt-rtx --gpu" in str(caught.value)


def test_a_driver_that_is_too_old_is_refused_with_the_extra_of_its_cuda(tensorrt: Callable[..., None]) -> None:
    tensorrt(CUDA_DRIVER="535.104.5")
    with pytest.raises(DeviceError, match=r"^--target tensorrt: driver 535\.104\.5 is too old for CUDA 13; .*-cu12\]'"):
        probe()


def test_a_driver_that_cuda_refuses_is_told_with_the_extra_of_another_cuda(tensorrt: Callable[..., None]) -> None:
    tensorrt(CUDA_CORE_FAILS="mismatch")
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH; if .*tensorrt-cu12"):
        probe()
