"""Whether engines run on a machine: told from the manifest, before any of them is opened."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fake_cuda
import pytest

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.manifest import EngineFacts
from ilf_trt.contract.target import Library
from ilf_trt.errors import EngineError, InvalidRequest, MissingDependency
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.engine import EngineKind
from ilf_trt.runtime.gpu.compatibility import check, library_for
from ilf_trt.runtime.gpu.cuda import Gpu
from tests.runtime.conftest import DRIVER, GPU_NAME, Compiled, Machine

FACTS = EngineFacts(
    graph="pre",
    target="tensorrt",
    file="engines/tensorrt/pre.engine",
    report="engines/tensorrt/pre.json",
    library_version="10.13.3.9",
    gpus=("sm90",),
    gpu_name="NVIDIA H200",
    driver="580.65.6",
    any_gpu_of_architecture=False,
    key="",
)
VERSION = "10.13.3.9"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gpu]:
    def made(
        name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0), driver: tuple[int, ...] = (580, 65)
    ) -> Gpu:
        fake_cuda.install(monkeypatch, devices=[fake_cuda.FakeGpu(name=name, capability=capability)], driver=driver)
        return Gpu.open(0)

    return made


def test_the_machine_that_built_an_engine_runs_it(gpu: Callable[..., Gpu]) -> None:
    check(FACTS, gpu(), VERSION)


@pytest.mark.parametrize("version", ["10.13.3.12", "10.13.3"])
def test_another_build_of_one_version_runs_it(version: str, gpu: Callable[..., Gpu]) -> None:
    check(FACTS, gpu(), version)


@pytest.mark.parametrize("version", ["10.13.2.6", "10.14.3.9", "11.13.3.9", ""])
def test_another_version_is_refused(version: str, gpu: Callable[..., Gpu]) -> None:
    with pytest.raises(EngineError, match=r"built with tensorrt 10\.13\.3\.9, this machine has .*ilf-trt compile"):
        check(FACTS, gpu(), version)


def test_another_architecture_is_refused(gpu: Callable[..., Gpu]) -> None:
    with pytest.raises(EngineError, match=r"engine pre is for sm90, NVIDIA L4 is sm89; .*--target tensorrt"):
        check(FACTS, gpu("NVIDIA L4", (8, 9)), VERSION)


def test_an_rtx_engine_names_the_architecture_to_compile_for(gpu: Callable[..., Gpu]) -> None:
    facts = replace(FACTS, target="tensorrt-rtx", gpus=("sm89", "sm120"), gpu_name="", driver="")
    check(facts, gpu("NVIDIA GeForce RTX 5090", (12, 0)), VERSION)
    with pytest.raises(EngineError, match="--target tensorrt-rtx --gpu sm86"):
        check(facts, gpu("NVIDIA RTX A5000", (8, 6)), VERSION)


def test_another_gpu_of_the_architecture_needs_hardware_compatibility(gpu: Callable[..., Gpu]) -> None:
    h100 = gpu("NVIDIA H100 80GB HBM3")
    with pytest.raises(EngineError, match=r"is only for NVIDIA H200, this is NVIDIA H100 .*--hardware-compat"):
        check(FACTS, h100, VERSION)
    check(replace(FACTS, any_gpu_of_architecture=True), h100, VERSION)


@pytest.mark.parametrize("driver", [(580, 1), (590, 0, 1), (600,), ()])
def test_a_driver_of_the_same_branch_or_a_later_runs_it(driver: tuple[int, ...], gpu: Callable[..., Gpu]) -> None:
    check(FACTS, gpu(driver=driver), VERSION)


def test_a_driver_of_an_older_branch_is_refused(gpu: Callable[..., Gpu]) -> None:
    facts = replace(FACTS, driver="590.48.1")
    with pytest.raises(EngineError, match=r"under driver 590\.48\.1, this machine has 580\.65; update the driver"):
        check(facts, gpu(driver=(580, 65)), VERSION)


# --- which engines are taken


def test_a_bundle_without_engines_runs_in_onnx_runtime(dit_bundle: Path, machine: Machine) -> None:
    assert library_for(Bundle.open(dit_bundle).manifest, Gpu.open(0), None, lambda library: "") is None


def test_the_first_target_that_fits_is_taken(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with Pipeline.load(compiled(dit_bundle, "tensorrt-rtx", "tensorrt"), device="cuda") as pipeline:
        assert pipeline.device.endswith("tensorrt-rtx 1.7.1.116")

    def of_another_gpu(facts: EngineFacts) -> EngineFacts:
        return replace(facts, gpu_name=facts.gpu_name and "NVIDIA H200")

    bundle = compiled(dit_bundle, "tensorrt", "tensorrt-rtx", change=of_another_gpu)
    with Pipeline.load(bundle, device="cuda") as pipeline:
        assert pipeline.device.endswith("tensorrt-rtx 1.7.1.116")


@pytest.mark.parametrize(
    ("engine", "name"),
    [("tensorrt", "tensorrt 10.13.3.9"), ("tensorrt-rtx", "tensorrt-rtx 1.7.1.116"), ("onnxruntime", "ONNX Runtime")],
)
def test_an_engine_that_is_asked_for_is_taken(
    engine: str, name: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle, "tensorrt", "tensorrt-rtx"), device="cuda:0", engine=engine) as pipeline:
        assert pipeline.device == f"{GPU_NAME}, sm90, driver {DRIVER}, {name}"


def test_engines_that_do_not_fit_are_no_reason_to_run_slowly(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    bundle = compiled(dit_bundle, change=lambda facts: replace(facts, gpus=("sm100",)))
    with pytest.raises(EngineError, match=r"is for sm100, .* is sm90"):
        Pipeline.load(bundle, device="cuda:0")


def test_every_reason_is_told_when_no_target_fits(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    bundle = compiled(dit_bundle, "tensorrt", "tensorrt-rtx", change=lambda facts: replace(facts, gpus=("sm100",)))
    reasons = r"none .* on this machine: .*--target tensorrt \| .*--target tensorrt-rtx --gpu sm90"
    with pytest.raises(EngineError, match=reasons):
        Pipeline.load(bundle, device="cuda:0")


def test_an_engine_that_the_bundle_lacks_is_refused(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    with pytest.raises(EngineError, match="no tensorrt-rtx engines, it has tensorrt; compile them"):
        Pipeline.load(compiled(dit_bundle), device="cuda:0", engine="tensorrt-rtx")
    with pytest.raises(EngineError, match="no tensorrt engines, it has none; compile them"):
        Pipeline.load(dit_bundle, device="cuda:0", engine="tensorrt")


def test_a_library_that_is_not_installed_is_named_with_its_extra(
    dit_bundle: Path, machine: Machine, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ilf-trt\[tensorrt\]'"):
        Pipeline.load(compiled(dit_bundle), device="cuda:0")


def test_engines_for_some_of_the_graphs_are_refused(dit_bundle: Path, machine: Machine) -> None:
    manifest = replace(Bundle.open(dit_bundle).manifest, engines=(replace(FACTS, gpu_name=""),))
    with pytest.raises(EngineError, match="no tensorrt engine for graph cond"):
        library_for(manifest, Gpu.open(0), EngineKind.TENSORRT, lambda library: VERSION)


def test_the_kinds_are_the_libraries_and_onnx_runtime() -> None:
    assert {*EngineKind} == {*map(str, Library), "onnxruntime"}
    with pytest.raises(InvalidRequest, match="'tvm' is unknown; it is one of tensorrt, tensorrt-rtx, onnxruntime"):
        EngineKind.parse("tvm")
