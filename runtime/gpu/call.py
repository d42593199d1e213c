"""A single graph on a GPU, bound once; the host reads and writes its tensors in pinned memory."""

from collections.abc import Mapping
from contextlib import ExitStack
from math import prod

import numpy as np

from ilf_trt.contract.ports import ITEM_BYTES, Graph, Port
from ilf_trt.runtime.engine import Array

from .bfloat16 import BFLOAT16, bfloat16_from_float32, float32_from_bfloat16
from .cuda import Gpu, Stream
from .current import Allocated
from .engine import DeviceEngine
from .scratch import Scratch


class DeviceCall(Allocated):
    """Fill `inputs`, call it, read `outputs`, which the next call overwrites.

    A call returns when the outputs are complete. The arrays of a bfloat16 port are float32: each call rounds the inputs
    to nearest even.
    """

    def __init__(
        self,
        gpu: Gpu,
        stream: Stream,
        scratch: Scratch,
        engines: Mapping[str, DeviceEngine],
        graph: Graph,
        sizes: Mapping[str, int],
    ) -> None:
        """All work on `stream` shares `scratch`. Raises OutOfMemory, EngineError, InvalidRequest."""
        self._gpu, self._stream, self._scratch = gpu, stream, scratch
        ports = (*graph.inputs, *graph.outputs)
        shapes = {port.name: port.resolve(sizes) for port in ports}
        size_bytes = {port.name: prod(shapes[port.name]) * ITEM_BYTES[port.dtype] for port in ports}
        with ExitStack() as stack:
            self._pinned, self._memory = {}, {}
            for port in ports:
                self._pinned[port.name] = gpu.pinned(size_bytes[port.name])
                stack.callback(self._pinned[port.name].close)
                self._memory[port.name] = gpu.allocate(size_bytes[port.name], stream)
                stack.callback(self._memory[port.name].close)
            engine = engines[graph.name]
            self._context = engine.context({port.name: shapes[port.name] for port in graph.inputs}, stream, scratch)
            stack.callback(self._context.close)
            scratch.reserve(self._context.scratch_bytes)
            self._launch = self._context.bind({name: memory.address for name, memory in self._memory.items()}, shapes)
            self._bits = {
                port.name: self._pinned_array(port.name, shapes[port.name], "uint16")
                for port in ports
                if port.dtype == BFLOAT16
            }
            self.inputs, self.outputs = (
                {port.name: self._host_array(port, shapes[port.name]) for port in side}
                for side in (graph.inputs, graph.outputs)
            )
            self._closing = stack.pop_all()

    def __call__(self) -> None:
        self._scratch.reserve(self._context.scratch_bytes)
        for name, array in self.inputs.items():
            if name in self._bits:
                self._bits[name][...] = bfloat16_from_float32(array)
            self._stream.copy(self._memory[name], self._pinned[name])
        self._launch()
        for name in self.outputs:
            self._stream.copy(self._pinned[name], self._memory[name])
        self._stream.sync()
        for name in self.outputs.keys() & self._bits.keys():
            self.outputs[name][...] = float32_from_bfloat16(self._bits[name])

    def _free(self) -> None:
        self._stream.sync()
        self._closing.close()

    def _host_array(self, port: Port, shape: tuple[int, ...]) -> Array:
        if port.dtype == BFLOAT16:
            return np.zeros(shape, port.array_dtype)
        return self._pinned_array(port.name, shape, port.dtype)

    def _pinned_array(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.ndarray(shape, dtype, self._pinned[name].host_bytes())
