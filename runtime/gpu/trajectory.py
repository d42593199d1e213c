"""A trajectory on a GPU: bound once, then captured as one CUDA graph that runs without a copy or a wait inside."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from time import monotonic, perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract.arrays import is_finite
from ilf_trt.errors import DeviceError, DeviceLost, EngineError, NonFinite
from ilf_trt.runtime.engine import Array, Launch
from ilf_trt.runtime.finite import error_of_run, unsteady_error
from ilf_trt.runtime.route import COEFFICIENT_ROWS, LAST, LATENTS, Route, Run, View
from ilf_trt.runtime.start_noise import check_finite_start, is_on_gpu
from ilf_trt.runtime.timings import Timings
from ilf_trt.runtime.trajectory import RunOptions, Watch

from .arena import arena_of
from .array import DeviceArray, memory_from_dlpack
from .bfloat16 import BFLOAT16, float32_from_bfloat16
from .cuda import CapturedGraph, Gpu, Memory, Stream, upload
from .current import Allocated
from .engine import DeviceContext, DeviceEngine
from .nvtx import nvtx_range
from .scratch import Scratch

log = logging.getLogger(__name__)

CAPTURE_TRIES = 2
CAPTURE_AGAIN_S = 60.0
REFUSED = "this plan runs without a CUDA graph, run by run, for at least %g s, because it could not be captured: %s"


class DeviceTrajectory(Allocated):
    """A route in one allocation of a GPU, with pinned memory for its inputs and its result.

    The first generation enqueues run by run, because the libraries need that before a capture. Then CUDA captures all
    runs as one graph, and every later generation is one launch. If CUDA refuses the capture twice, generations enqueue
    run by run, and a minute later CUDA is asked again. If the scratch memory moves, the graph is captured again.
    """

    def __init__(
        self,
        gpu: Gpu,
        engines: Mapping[str, DeviceEngine],
        constants: Mapping[str, Memory],
        route: Route,
        stream: Stream,
        scratch: Scratch,
    ) -> None:
        """Raises OutOfMemory, EngineError, and InvalidRequest if the plan or the batch does not fit an engine."""
        self._gpu = gpu
        self._route = route
        self._stream = stream
        self._scratch = scratch
        arena = arena_of(route)
        self._slots = arena.slots
        self._graph: CapturedGraph | None = None
        self._graph_scratch = 0
        self._capture_from_s = 0.0
        self._marks: list[Any] = []
        with ExitStack() as stack:
            self._memory = gpu.allocate(arena.size_bytes, stream)
            stack.callback(self._memory.close)
            self._pinned_inputs = gpu.pinned(arena.input_bytes)
            stack.callback(self._pinned_inputs.close)
            self._pinned_result = gpu.pinned(self._slots[route.result].size_bytes)
            stack.callback(self._pinned_result.close)
            self._inputs = self._memory.part(0, arena.input_bytes)
            self._zeros = self._memory.part(*arena.zeros)
            self._start, self._result = self._part(LATENTS[0]), self._part(route.result)
            self._first = gpu.event()
            stack.callback(self._first.close)
            self._last = gpu.event()
            stack.callback(self._last.close)

            stream.zero(self._memory)
            self._fields = {name: self._field(name) for name in route.inputs}
            for name, array in route.fixed.items():
                upload(gpu, stream, self._part(name), array)
            self._fields[COEFFICIENT_ROWS][:, 1:7] = [step.solver for step in route.plan.steps]
            self._contexts: dict[str, DeviceContext] = {}
            for run in route.runs:
                if run.graph not in self._contexts:
                    shapes = {port.name: route.shape(run.views[port.name]) for port in engines[run.graph].graph.inputs}
                    self._contexts[run.graph] = engines[run.graph].context(shapes, stream, scratch)
                    stack.callback(self._contexts[run.graph].close)
            self._runs = [self._bound(run, constants) for run in route.runs]
            self._outputs = [
                tuple(run.views[port.name].tensor for port in engines[run.graph].graph.outputs) for run in route.runs
            ]
            self._row_copies = self._copies_of_rows()
            self._run_ranges = [
                nvtx_range(run.graph if run.step is None else f"step {run.step} {run.graph}") for run in route.runs
            ]
            self._range = nvtx_range(f"trajectory of {len(route.plan.steps)} steps")
            self._scratch_bytes = max(context.scratch_bytes for context in self._contexts.values())
            scratch.reserve(self._scratch_bytes)
            self._capturable = all(engines[graph].capturable for graph in self._contexts)
            stack.callback(self._close_graph)
            self._closing = stack.pop_all()

    def run(
        self,
        noise: Any,
        conditions: Mapping[str, Array],
        guidance_scale: float,
        options: RunOptions,
    ) -> tuple[NDArray[np.float32] | DeviceArray, Timings]:
        """See `Trajectory.run`. With `on_device` the latents are a DeviceArray; `profile` times every graph run.

        A profile or a watch makes the trajectory enqueue run by run. The host checks the last latents in its pinned
        memory, also those that stay on the GPU: their copy takes microseconds, and a captured graph cannot stop.
        Raises InvalidRequest for foreign latents that do not fit, NonFinite, EngineError, DeviceError and its
        subclasses.
        """
        begin = perf_counter_ns()
        on_device, watch = options.on_device, options.watch
        self._scratch.reserve(self._scratch_bytes)
        foreign = None
        if is_on_gpu(noise):
            foreign = memory_from_dlpack(noise, self._latent_shape, self._gpu, self._stream)
        kept = self._gpu.allocate(self._result.size_bytes, self._stream) if on_device else None
        try:
            if foreign is not None and self._route.plan.initial_scale != 1:
                noise, foreign = self._download_noise(foreign), None
            self._write_inputs(noise, conditions, guidance_scale)
            self._upload_inputs(foreign)
            graph = None if options.profile or watch is not None else self._graph_here()
            marks = self._events_of_profile() if options.profile else []
            self._stream.record(self._first)
            launch_begin = perf_counter_ns()
            if graph is None:
                self._enqueue(marks, watch)
            else:
                with self._range:
                    graph.launch()
            launch_us = (perf_counter_ns() - launch_begin) / 1e3
            self._stream.record(self._last)
            self._stream.copy(self._pinned_result, self._result)
            if kept is not None:
                self._stream.copy(kept, self._result)
            self._stream.sync()
            result = self._pinned_result.host_bytes().view(np.float32).reshape(self._latent_shape)
            if not is_finite(result):
                raise self._error_of_runs(foreign, guidance_scale)
        except BaseException:
            with suppress(Exception):  # the GPU may still write to the memory that this block frees
                self._stream.sync()
            if kept is not None:
                kept.close()
            raise
        latents = result.copy() if kept is None else DeviceArray(kept, self._latent_shape, self._gpu)
        total_ms = (perf_counter_ns() - begin) / 1e6
        graph_ms, step_ms = self._profile(marks)
        device_ms = float(self._last - self._first)
        timings = Timings(
            total_ms, graph_ms, step_ms, len(self._route.plan.steps), device_ms, launch_us, captured=graph is not None
        )
        if self._capturable and self._graph is None and watch is None and monotonic() >= self._capture_from_s:
            self._capture()
        return latents, timings

    def _free(self) -> None:
        self._stream.sync()
        self._runs.clear()
        self._closing.close()

    def _graph_here(self) -> CapturedGraph | None:
        """The captured graph; none if its runs work where the scratch memory no longer is."""
        if self._graph is not None and self._graph_scratch != self._scratch.address:
            self._graph.close()
            self._graph = None
        return self._graph

    def _close_graph(self) -> None:
        """Free what exists only after the first generations: the CUDA graph and the events of a profile."""
        if self._graph is not None:
            self._graph.close()
        for mark in self._marks:
            mark.close()

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        return self._route.tensors[LATENTS[0]].shape

    def _write_inputs(self, noise: Any, conditions: Mapping[str, Array], guidance_scale: float) -> None:
        for name, value in conditions.items():
            self._fields[name][:] = value
        if isinstance(noise, np.ndarray):
            with np.errstate(over="ignore"):  # the latents at the end are then not finite either
                np.multiply(noise, np.float32(self._route.plan.initial_scale), out=self._fields[LATENTS[0]])
        self._fields[COEFFICIENT_ROWS][:, 0] = guidance_scale

    def _upload_inputs(self, foreign: Memory | None) -> None:
        """Copy what `_write_inputs` wrote, and start latents that lie on the GPU as they are."""
        self._stream.copy(self._inputs, self._pinned_inputs)
        if foreign is not None:
            self._stream.copy(self._start, foreign)

    def _download_noise(self, foreign: Memory) -> NDArray[np.float32]:
        """Start noise that lies on the GPU, for the host to scale."""
        self._stream.copy(self._pinned_result, foreign)
        self._stream.sync()
        return self._pinned_result.host_bytes().view(np.float32).reshape(self._latent_shape)

    def _enqueue(self, marks: Sequence[Any] = (), watch: Watch | None = None) -> None:
        self._stream.zero(self._zeros)
        if marks:
            self._stream.record(marks[0])
        for index, launch in enumerate(self._runs):
            with self._run_ranges[index]:
                launch()
            if index == 0:
                self._align_rows()
            if marks:
                self._stream.record(marks[index + 1])
            if watch is not None and self._route.runs[index].graph == LAST:
                self._stream.sync()
                watch()

    def _error_of_runs(self, foreign: Memory | None, guidance_scale: float) -> NonFinite:
        """Run everything again from the written inputs, waiting for every graph, to find the first to blame."""
        names = {LATENTS[0], *(name for outputs in self._outputs for name in outputs)}
        pinned = self._gpu.pinned(max(self._dense(name).size_bytes for name in names))
        try:
            self._upload_inputs(foreign)
            self._stream.zero(self._zeros)
            check_finite_start(self._download(LATENTS[0], pinned))
            for index, (run, launch) in enumerate(zip(self._route.runs, self._runs, strict=True)):
                launch()
                if index == 0:
                    self._align_rows()
                if not all(is_finite(self._download(name, pinned)) for name in self._outputs[index]):
                    return error_of_run(run, self._route, guidance_scale)
            return unsteady_error(self._route, len(self._route.plan.steps) - 1)
        finally:
            with suppress(DeviceError):  # the GPU may still write to the memory that this block frees
                self._stream.sync()
            pinned.close()

    def _download(self, name: str, pinned: Memory) -> NDArray[Any]:
        """The numbers of a tensor in a row, bfloat16 as float32; valid until the next download to `pinned`."""
        source, dtype = self._dense(name), self._route.tensors[name].dtype
        self._stream.copy(pinned.part(0, source.size_bytes), source)
        self._stream.sync()
        data = pinned.host_bytes()[: source.size_bytes]
        return float32_from_bfloat16(data.view(np.uint16)) if dtype == BFLOAT16 else data.view(dtype)

    def _align_rows(self) -> None:
        """Copy the rows of the tables that `cond` wrote to the addresses where the steps read them."""
        for target, source in self._row_copies:
            self._stream.copy(target, source)

    def _capture(self) -> None:
        """Capture all runs; what refuses once may not refuse twice, for another thread may have got in the way."""
        for tries_left in reversed(range(CAPTURE_TRIES)):
            try:
                for context in self._contexts.values():
                    context.check_capturable()
                self._graph = self._stream.capture(self._enqueue)
            except DeviceLost:
                raise
            except (DeviceError, EngineError) as error:
                if tries_left:
                    continue
                known = self._capture_from_s > 0
                log.log(logging.DEBUG if known else logging.WARNING, REFUSED, CAPTURE_AGAIN_S, error)
                self._capture_from_s = monotonic() + CAPTURE_AGAIN_S
            else:
                self._graph_scratch = self._scratch.address
                return

    def _events_of_profile(self) -> list[Any]:
        while len(self._marks) <= len(self._runs):
            self._marks.append(self._gpu.event())
        return self._marks

    def _profile(self, marks: list[Any]) -> tuple[dict[str, float], tuple[float, ...]]:
        if not marks:
            return {}, ()
        graph_ms = {run.graph: 0.0 for run in self._route.runs}
        step_ms = [0.0] * len(self._route.plan.steps)
        for run, begin, end in zip(self._route.runs, marks, marks[1:], strict=False):
            milliseconds = float(end - begin)
            graph_ms[run.graph] += milliseconds
            if run.step is not None:
                step_ms[run.step] += milliseconds
        return graph_ms, tuple(step_ms)

    def _bound(self, run: Run, constants: Mapping[str, Memory]) -> Launch:
        shapes = {port: self._route.shape(view) for port, view in run.views.items()}
        addresses = {port: self._address(view, constants) for port, view in run.views.items()}
        return self._contexts[run.graph].bind(addresses, shapes)

    def _address(self, view: View, constants: Mapping[str, Memory]) -> int:
        if view.tensor in constants:
            return constants[view.tensor].address
        slot = self._slots[view.tensor]
        if view.row is not None:
            return self._memory.address + slot.offset + view.row * slot.pitch
        return self._memory.address + (slot.offset if slot.dense is None else slot.dense)

    def _copies_of_rows(self) -> list[tuple[Memory, Memory]]:
        """Copies (target, source) of table rows from the dense area that `cond` writes to their aligned addresses."""
        return [
            (
                self._memory.part(slot.offset + row * slot.pitch, slot.row_bytes),
                self._memory.part(slot.dense + row * slot.row_bytes, slot.row_bytes),
            )
            for slot in self._slots.values()
            if slot.dense is not None
            for row in range(slot.rows)
        ]

    def _dense(self, name: str) -> Memory:
        """A tensor as its graph writes it, without gaps between the rows."""
        slot = self._slots[name]
        return self._memory.part(slot.offset if slot.dense is None else slot.dense, slot.row_bytes * slot.rows)

    def _part(self, name: str) -> Memory:
        return self._memory.part(self._slots[name].offset, self._slots[name].size_bytes)

    def _field(self, name: str) -> NDArray[Any]:
        """A tensor in the pinned memory of the inputs."""
        tensor, slot = self._route.tensors[name], self._slots[name]
        item_bytes = np.dtype(tensor.dtype).itemsize
        strides = [item_bytes]
        for size in reversed(tensor.shape[1:]):
            strides.insert(0, strides[0] * size)
        if tensor.by_row:
            strides[0] = slot.pitch
        return np.ndarray(tensor.shape, tensor.dtype, self._pinned_inputs.host_bytes(), slot.offset, tuple(strides))
