"""What a machine without a usable GPU says, and engines that cannot be opened: one readable line each."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import fake_cuda
import fake_tensorrt
import numpy as np
import onnx
import pytest

from ilf_trt.contract.bundle import write_manifest
from ilf_trt.contract.manifest import Manifest
from ilf_trt.errors import DeviceError, DeviceLost, EngineError, MissingDependency, OutOfMemory, PortMismatch
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.gpu.cuda import Gpu
from ilf_trt.runtime.gpu.errors import STICKY, device_error
from tests.conftest import FAILED, Run
from tests.runtime.conftest import Compiled, Machine


def test_a_gpu_tells_its_name_architecture_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    gpu = Gpu.open(0)
    assert gpu.description == "NVIDIA H100 80GB HBM3, sm90, driver 580.65.6"


def test_in_a_container_without_nvml_the_driver_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, nvml=False)
    assert Gpu.open(0).driver == ()


def test_the_second_gpu_is_cuda_1(dit_bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, devices=[fake_cuda.FakeGpu(), fake_cuda.FakeGpu(name="second")])
    assert Gpu.open(1).name == "second"


def test_a_driver_that_is_too_old_is_told_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, driver=(535, 183, 1))
    with pytest.raises(
        DeviceError, match=r"driver 535\.183\.1 is too old for CUDA 13; update .*'ilf-trt\[tensorrt-cu12\]'"
    ):
        Gpu.open(0)


@pytest.mark.parametrize(
    ("devices", "driver", "device", "words"),
    [
        ((), None, "cuda:0", ("device 'cuda:0' cannot be used", "driver", "nvidia-smi")),
        ((), (580, 1), "cuda:0", ("device 'cuda:0'", "nvidia-smi")),
        (
            (fake_cuda.FakeGpu(),),
            (580, 1),
            "cuda:1",
            ("'cuda:1' does not exist, this machine has 1 GPU; pass cuda:0",),
        ),
        ((fake_cuda.FakeGpu(busy=True),), (580, 1), "cuda:0", ("another process holds the GPU", "compute mode")),
    ],
    ids=["no driver", "no GPU", "ordinal out of range", "another process holds it"],
)
def test_without_a_usable_gpu_there_is_one_readable_line(
    devices: tuple[fake_cuda.FakeGpu, ...],
    driver: tuple[int, ...] | None,
    device: str,
    words: tuple[str, ...],
    dit_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    tmp_path: Path,
) -> None:
    fake_cuda.install(monkeypatch, devices=devices, driver=driver)
    output = tmp_path / "x.npy"
    run("generate", dit_bundle, "--labels", "3", "--latents", output, "--device", device).refused(*words)
    run("verify", dit_bundle, "--device", device).refused(*words)
    assert not output.exists()


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: " + "This error indicates that the versions differ. " * 9,
        "cudaErrorInsufficientDriver: This indicates that the installed NVIDIA CUDA driver is older than the runtime",
    ],
)
def test_a_driver_that_cuda_refuses_is_told_with_the_extras_of_another_cuda(reason: str) -> None:
    error = device_error("device 'cuda:0' cannot be used", reason, "check nvidia-smi")
    assert type(error) is DeviceError
    assert reason.partition(":")[0] in str(error)
    assert "update the driver to 580.65.6 or later" in str(error)
    assert "pip install 'ilf-trt[tensorrt-cu12]'" in str(error)
    assert "check nvidia-smi" not in str(error)


def test_without_cuda_core_the_extra_is_named(dit_bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    run("verify", dit_bundle, "--device", "cuda").refused("cuda-core", "pip install 'ilf-trt[cuda]'")


@pytest.mark.parametrize("device", ["cuda:x", "gpu", "cuda:-1"])
def test_an_unknown_device_is_refused(device: str, dit_bundle: Path, run: Run) -> None:
    run("verify", dit_bundle, "--device", device).refused("it is cpu, cuda or cuda:N")


# --- engines that cannot be opened


def rewritten(manifest: Path) -> None:
    """A manifest that knows of files as they are now."""
    write_manifest(manifest.parent, Manifest.from_json(json.loads(manifest.read_text())))


@pytest.mark.parametrize("graph", ["cond", "post"])
@pytest.mark.parametrize("kept", [0, 1, 40])
def test_a_truncated_plan_is_refused_and_nothing_stays_open(
    graph: str, kept: int, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    bundle = compiled(dit_bundle)
    plan = bundle / "engines" / "tensorrt" / f"{graph}.engine"
    content = plan.read_bytes()[:kept]
    plan.unlink()
    plan.write_bytes(content)
    path = bundle / "manifest.json"
    rewritten(path)
    with pytest.raises(EngineError, match=f"{graph}.*compile the bundle again"):
        Pipeline.load(bundle, device="cuda:0")
    assert machine.cuda.live() == []


def test_an_engine_with_other_ports_is_refused(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    bundle = compiled(dit_bundle)
    engines = bundle / "engines" / "tensorrt"
    (engines / "pre.engine").unlink()
    (engines / "pre.engine").write_bytes((engines / "post.engine").read_bytes())
    rewritten(bundle / "manifest.json")
    with pytest.raises(PortMismatch, match=r"pre: port .* the manifest says .*compile the bundle again"):
        Pipeline.load(bundle, device="cuda:0")


@pytest.mark.parametrize("after", range(4))
def test_memory_that_runs_out_while_loading_frees_what_was_loaded(
    after: int, pixart_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    machine.cuda.fail("allocate", after=after)
    with suppress(OutOfMemory):
        Pipeline.load(compiled(pixart_bundle), device="cuda:0").close()
    assert machine.cuda.live() == []


def test_onnx_runtime_without_cuda_says_what_to_install(
    dit_bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependency, match=r"pip install 'ilf-trt\[onnxruntime-cuda\]'"):
        Pipeline.load(dit_bundle, device="cuda:0")


def test_memory_that_runs_out_inside_the_library_is_told_from_a_damaged_engine(
    dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    machine.cuda.fail("deserialize", after=2)
    with pytest.raises(OutOfMemory, match=r"loop_body: tensorrt refused .*OutOfMemory"):
        Pipeline.load(compiled(dit_bundle), device="cuda:0")
    assert machine.cuda.live() == []


@pytest.mark.parametrize(
    ("message", "error"), [("no kernel for node", EngineError), ("CUDA failure 2: out of memory", OutOfMemory)]
)
def test_what_onnx_runtime_refuses_to_load_or_run_is_told_in_its_words(
    message: str, error: type[Exception], dit_bundle: Path, machine: Machine
) -> None:
    machine.libraries["onnxruntime"].fail_load(message)
    with pytest.raises(error, match=message):
        Pipeline.load(dit_bundle, device="cuda:0")
    assert machine.cuda.live() == []
    with Pipeline.load(dit_bundle, device="cuda:0") as pipeline:
        machine.libraries["onnxruntime"].fail_run(message)
        with pytest.raises(error, match=message):
            pipeline.generate(class_labels=[3])
        pipeline.generate(class_labels=[3])


def test_onnx_runtime_that_falls_back_to_the_cpu_is_refused(dit_bundle: Path, machine: Machine) -> None:
    machine.libraries["onnxruntime"].cannot_start()
    with pytest.raises(EngineError, match=r"could not start CUDA; pip install 'ilf-trt\[onnxruntime-cuda\]'"):
        Pipeline.load(dit_bundle, device="cuda:0")


# --- the commands


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx", "onnxruntime"])
def test_verify_holds_every_graph_on_the_gpu_against_the_reference(
    engine: str, pixart_bundle: Path, machine: Machine, compiled: Compiled, run: Run
) -> None:
    bundle = compiled(pixart_bundle, "tensorrt", "tensorrt-rtx")
    ran = run("verify", bundle, "--device", "cuda:0", "--engine", engine)
    assert (ran.code, ran.err) == (0, "")
    assert "loop_feedback feedback" in ran.out
    assert "trajectory" in ran.out


def test_verify_finds_an_engine_that_computes_something_else(
    dit_bundle: Path, machine: Machine, compiled: Compiled, run: Run
) -> None:
    bundle = compiled(dit_bundle)
    engines = bundle / "engines" / "tensorrt"
    other = json.loads((engines / "pre.engine").read_bytes()[16:])
    graph = bundle / "graphs" / "pre.onnx"
    model = onnx.load(graph)
    for node in model.graph.node:
        if node.op_type == "Add":
            node.op_type = "Sub"
    changed = graph.with_name("changed.onnx")
    onnx.save(model, changed)
    fake_tensorrt.write_plan(
        engines / "changed.engine",
        changed,
        profile=other["profile"],
        scratch_bytes=other["scratch_bytes"],
        name="pre",
    )
    (engines / "changed.engine").replace(engines / "pre.engine")
    rewritten(bundle / "manifest.json")
    ran = run("verify", bundle, "--device", "cuda:0")
    assert ran.code == FAILED
    assert "pre hidden differs from the reference" in ran.err


def test_generate_on_the_gpu_writes_what_the_cpu_writes(
    dit_bundle: Path, machine: Machine, compiled: Compiled, run: Run, tmp_path: Path
) -> None:
    places = {device: tmp_path / f"{device[:4]}.npy" for device in ("cpu", "cuda:0")}
    for device, place in places.items():
        bundle = compiled(dit_bundle) if device == "cuda:0" else dit_bundle
        ran = run("generate", bundle, "--labels", "3,8", "--latents", place, "--device", device)
        assert (ran.code, ran.err) == (0, "")
    on_cpu, on_gpu = (np.load(place) for place in places.values())
    assert np.allclose(on_gpu, on_cpu, rtol=0, atol=1e-6 * np.abs(on_cpu).max())


def test_generate_prints_the_graphs_times_when_asked(
    dit_bundle: Path, machine: Machine, compiled: Compiled, run: Run, tmp_path: Path
) -> None:
    bundle = compiled(dit_bundle)
    command = ("generate", bundle, "--labels", "3", "--latents", tmp_path / "x.npy", "--device", "cuda:0")
    assert "loop_body" not in run(*command).out
    assert "loop_body" in run(*command, "--profile").out


# --- errors


@pytest.mark.parametrize("name", STICKY)
def test_errors_that_outlast_the_call_are_told_from_others(name: str) -> None:
    assert isinstance(device_error("the run failed", f"{name}: words"), DeviceLost)


@pytest.mark.parametrize(
    "reason", ["CUDA_ERROR_OUT_OF_MEMORY: words", "[defaultAllocator] Cuda failure: out of memory"]
)
def test_full_memory_is_told_from_others(reason: str) -> None:
    assert isinstance(device_error("the run failed", reason), OutOfMemory)


def test_any_other_error_is_the_devices() -> None:
    assert type(device_error("the run failed", "CUDA_ERROR_INVALID_VALUE: words")) is DeviceError
