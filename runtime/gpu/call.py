"""One graph alone on a GPU, bound once, its tensors in pinned memory on the host."""

from collections.abc import Mapping
from contextlib import ExitStack
from math import prod

import numpy as np

from ilf_trt.contract.ports import Graph
from ilf_trt.runtime.engine import Array
from ilf_trt.runtime.gpu.arena import ITEM_BYTES
from ilf_trt.runtime.gpu.cuda import Gpu, Memory, Stream
from ilf_trt.runtime.gpu.engine import DeviceEngine


class DeviceCall:
    """Fill `inputs`, call it, read `outputs`, which the next call overwrites; it waits until they are there.

    For graphs without bfloat16 at their border.
    """

    def __init__(
        self,
        gpu: Gpu,
        stream: Stream,
        scratch: Memory | None,
        engines: Mapping[str, DeviceEngine],
        graph: Graph,
        sizes: Mapping[str, int],
    ) -> None:
        """`scratch` is shared with what else runs on the stream. Raises OutOfMemory, EngineError, InvalidRequest."""
        self._gpu, self._stream = gpu, stream
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
            context = engine.context({port.name: shapes[port.name] for port in graph.inputs}, stream, scratch)
            stack.callback(context.close)
            self._launch = context.bind({name: memory.address for name, memory in self._memory.items()}, shapes)
            self.inputs, self.outputs = (
                {port.name: self._seen(port.name, shapes[port.name], port.dtype) for port in side}
                for side in (graph.inputs, graph.outputs)
            )
            self._close = stack.pop_all().close

    def __call__(self) -> None:
        self._gpu.use()
        for name in self.inputs:
            self._stream.copy(self._memory[name], self._pinned[name])
        self._launch()
        for name in self.outputs:
            self._stream.copy(self._pinned[name], self._memory[name])
        self._stream.sync()

    def close(self) -> None:
        self._close()

    def _seen(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.ndarray(shape, dtype, self._pinned[name].host_bytes())
