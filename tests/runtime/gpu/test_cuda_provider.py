"""The CUDA provider of ONNX Runtime: built in, or a plug-in, and what is said if it is missing or cannot start."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import fake_onnxruntime
import numpy as np
import onnxruntime
import pytest

from ilf_trt.errors import EngineError, MissingDependency
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.gpu.cuda_provider import PLUG_IN_MODULE, use_cuda
from tests.runtime.conftest import Machine

SETTINGS = {"user_compute_stream": "7", "use_tf32": "0"}
OLD_NAME = "CudaPluginExecutionProvider"


@pytest.fixture(params=[fake_onnxruntime.CUDA, OLD_NAME])
def plug_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Any:
    """Plain ONNX Runtime and a plug-in of this name."""
    machine.libraries["onnxruntime"] = fake_onnxruntime.install_plug_in(monkeypatch, machine.cuda, name=request.param)
    return machine.libraries["onnxruntime"]


def test_the_built_in_provider_gets_the_gpu_by_its_options(machine: Machine) -> None:
    options = onnxruntime.SessionOptions()
    assert use_cuda(onnxruntime, options, 1, SETTINGS) == (
        fake_onnxruntime.CUDA,
        [(fake_onnxruntime.CUDA, {"device_id": "1", **SETTINGS}), fake_onnxruntime.CPU],
    )
    assert not options.has_providers()


def test_a_plug_in_is_registered_and_gets_the_gpu_by_its_device(plug_in: Any) -> None:
    options = onnxruntime.SessionOptions()
    assert use_cuda(onnxruntime, options, 1, SETTINGS) == (plug_in.plug_in, [])
    assert plug_in.registered == [(plug_in.plug_in, fake_onnxruntime.PLUG_IN_PATH)]
    ((device,), settings) = options.chosen
    assert (device.ep_options, settings) == ({"device_id": "1"}, SETTINGS)


def test_a_bundle_runs_on_a_plug_in_as_on_the_built_in_provider(
    plug_in: Any, dit_bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(dit_bundle, device="cuda:1", engine="onnxruntime") as pipeline:
        by_plug_in = pipeline.generate(class_labels=[3], seed=7).latents
    assert set(plug_in.runs) == {"cond", "pre", "loop_body", "loop_feedback", "post"}
    fake_onnxruntime.install(monkeypatch, machine.cuda)
    monkeypatch.setattr(onnxruntime, "SessionOptions", fake_onnxruntime.PlugInOptions.__base__)
    with Pipeline.load(dit_bundle, device="cuda:1", engine="onnxruntime") as pipeline:
        np.testing.assert_array_equal(pipeline.generate(class_labels=[3], seed=7).latents, by_plug_in)


def test_a_process_registers_the_plug_in_once_from_many_threads(plug_in: Any) -> None:
    together = Barrier(8)

    def use(_: int) -> str:
        together.wait()
        return use_cuda(onnxruntime, onnxruntime.SessionOptions(), 0, SETTINGS)[0]

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(use, range(8))) == {plug_in.plug_in}
    assert len(plug_in.registered) == 1


def test_a_plug_in_that_the_library_or_the_program_registered_is_used(
    plug_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the GPU wheels of ONNX Runtime do that are built with it: there is no module of its own."""
    monkeypatch.setitem(sys.modules, PLUG_IN_MODULE, None)
    plug_in.register("mine", fake_onnxruntime.PLUG_IN_PATH)
    assert use_cuda(onnxruntime, onnxruntime.SessionOptions(), 0, SETTINGS) == (plug_in.plug_in, [])


def test_a_plug_in_that_is_registered_and_finds_no_gpu_is_not_registered_again(
    plug_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"finds 0 GPUs and none with number 0; check nvidia-smi"):
            use_cuda(onnxruntime, onnxruntime.SessionOptions(), 0, SETTINGS)


def test_a_gpu_that_the_plug_in_does_not_find_is_an_error(plug_in: Any) -> None:
    with pytest.raises(EngineError, match=r"finds 2 GPUs and none with number 5; .* CUDA_VISIBLE_DEVICES"):
        use_cuda(onnxruntime, onnxruntime.SessionOptions(), 5, SETTINGS)


def test_a_plug_in_whose_libraries_are_missing_is_one_line_that_names_them(plug_in: Any) -> None:
    plug_in.fail_register("libcublasLt.so.13: cannot open shared object file:\nNo such file or directory")
    with pytest.raises(EngineError) as caught:
        use_cuda(onnxruntime, onnxruntime.SessionOptions(), 0, SETTINGS)
    assert "\n" not in str(caught.value)
    assert "libcublasLt.so.13" in str(caught.value)
    assert str(caught.value).endswith("; install that library of CUDA, and put its folder into LD_LIBRARY_PATH")
    assert use_cuda(onnxruntime, onnxruntime.SessionOptions(), 0, SETTINGS)[0] == plug_in.plug_in


def test_without_cuda_both_packages_leave_before_the_extra_comes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_onnxruntime.install(monkeypatch, machine.cuda, provider=False)
    with pytest.raises(MissingDependency) as caught:
        use_cuda(onnxruntime, onnxruntime.SessionOptions(), 0, SETTINGS)
    assert str(caught.value) == (
        "this ONNX Runtime has no CUDA; run pip uninstall onnxruntime onnxruntime-gpu, then pip install "
        "'ilf-trt[onnxruntime-cuda]'"
    )
