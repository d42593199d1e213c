"""A single graph on a GPU: what it computes, what it frees, and bfloat16 at its ports. The GPU is a stand-in."""

import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ilf_trt.contract.ports import ITEM_BYTES, Graph, Port, Role
from ilf_trt.errors import DeviceLost, InvalidRequest, OutOfMemory, PortMismatch
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.engine import Launch
from ilf_trt.runtime.gpu.bfloat16 import bfloat16_from_float32, float32_from_bfloat16
from ilf_trt.runtime.gpu.call import DeviceCall
from ilf_trt.runtime.gpu.cuda import Gpu, Memory, Stream
from ilf_trt.runtime.gpu.scratch import Scratch
from tests.runtime.conftest import Compiled, Machine

DEVICE = "cuda:0"
# One ONNX Runtime on one machine: the same products in the same order.
SAME = 1e-6
SIZES = {"B": 2, "R": 4}
ECHO = Graph(
    "echo",
    (Port("x_bf16", ("B", 3), "bfloat16", Role.TOKENS), Port("x_fp16", ("B", 3), "float16", Role.TOKENS)),
    (Port("y_bf16", ("B", 3), "bfloat16", Role.TOKENS), Port("y_fp16", ("B", 3), "float16", Role.TOKENS)),
)


class EchoEngine:
    """An engine, and its context, that copy each input to the output of the same dtype."""

    graph = ECHO
    scratch_bytes = 0
    capturable = True

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Scratch) -> "EchoEngine":
        self._stream = stream
        return self

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        buffer = sys.modules["cuda.core"].Buffer

        def memory(port: Port) -> Memory:
            size_bytes = prod(shapes[port.name]) * ITEM_BYTES[port.dtype]
            return Memory(buffer.from_handle(addresses[port.name], size_bytes))

        def launch() -> None:
            for source, target in zip(ECHO.inputs, ECHO.outputs, strict=True):
                self._stream.copy(memory(target), memory(source))

        return launch

    def check_capturable(self) -> None:
        pass

    def close(self) -> None:
        pass


def arrays_of(pipeline: Pipeline, graph: str) -> dict[str, NDArray[Any]]:
    border = next(each for each in pipeline.manifest.graphs if each.name == graph)
    return {port.name: np.ones(port.resolve(SIZES), port.dtype) for port in border.inputs}


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    values = np.concatenate([values, values * 1e30, values * 1e-30, np.float32([0, -0.0, np.inf, -np.inf, 3.4e38])])
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(bfloat16_from_float32(values), expected.view(torch.uint16).numpy())
    assert np.array_equal(float32_from_bfloat16(bfloat16_from_float32(values)), expected.float().numpy())


def test_a_bfloat16_port_is_float32_on_the_host_and_other_ports_keep_their_dtype(machine: Machine) -> None:
    gpu = Gpu.open(0)
    stream = gpu.stream()
    call = DeviceCall(gpu, stream, Scratch(gpu, stream), {"echo": EchoEngine()}, ECHO, {"B": 2})
    for seed in range(2):
        x = np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)
        for name, array in call.inputs.items():
            array[:] = x
            assert array.dtype == ("float32" if name == "x_bf16" else "float16")
        call()
        assert np.array_equal(call.outputs["y_bf16"], torch.from_numpy(x).bfloat16().float().numpy())
        assert np.array_equal(call.outputs["y_fp16"], x.astype(np.float16))
    call.close()
    stream.close()


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime"])
def test_a_single_graph_is_the_cpus_and_leaves_no_memory_bound(
    engine: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with (
        Pipeline.load(compiled(dit_bundle), device=DEVICE, engine=engine, sessions=1) as pipeline,
        Pipeline.load(dit_bundle, threads=1) as cpu,
    ):
        arrays = arrays_of(pipeline, "loop_feedback")
        first = pipeline.run("loop_feedback", arrays)["feedback"]
        live = machine.cuda.live()
        again = pipeline.run("loop_feedback", arrays)["feedback"]
        expected = cpu.run("loop_feedback", arrays)["feedback"]
        assert machine.cuda.live() == live
    for got in (first, again):
        assert np.abs(got - expected).max() <= SAME * np.abs(expected).max()


@pytest.mark.parametrize("call", ["allocate", "pinned", "copy", "sync"])
def test_a_single_graph_that_fails_frees_its_memory(
    call: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1) as pipeline:
        arrays = arrays_of(pipeline, "post") | {"coefficients": np.zeros(8, np.float32)}
        pipeline.run("post", arrays)
        live = machine.cuda.live()
        machine.cuda.fail(call)
        with pytest.raises(OutOfMemory):
            pipeline.run("post", arrays)
        assert machine.cuda.live() == live
        pipeline.run("post", arrays)


def test_a_single_graph_on_a_lost_gpu_says_so(dit_bundle: Path, machine: Machine, compiled: Compiled) -> None:
    pipeline = Pipeline.load(compiled(dit_bundle), device=DEVICE, sessions=1)
    arrays = arrays_of(pipeline, "loop_feedback")
    machine.cuda.fail("copy", "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DeviceLost, match="start it again"):
        pipeline.run("loop_feedback", arrays)
    pipeline.close()
    machine.cuda._live.clear()  # nothing can be freed on a GPU that is lost


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_arrays_that_do_not_fit_a_single_graph_are_refused(
    device: str, dit_bundle: Path, machine: Machine, compiled: Compiled
) -> None:
    with Pipeline.load(compiled(dit_bundle), device=device) as pipeline:
        arrays = arrays_of(pipeline, "loop_feedback")
        name = next(iter(arrays))
        with pytest.raises(PortMismatch, match=f"input '{name}' is missing; pass float32"):
            pipeline.run("loop_feedback", {key: array for key, array in arrays.items() if key != name})
        with pytest.raises(PortMismatch, match=rf"input '{name}' is \(1,\), expected \("):
            pipeline.run("loop_feedback", {**arrays, name: np.ones(1)})
        with pytest.raises(InvalidRequest, match=r"no graph 'head'; it has cond, pre"):
            pipeline.run("head", arrays)
