"""GPUs in host memory: streams whose work waits for a sync, captures, and the rules of CUDA that one may break.

Work that is enqueued runs, in stream order, when the host waits for it, so whoever reads too early or overwrites too
early gets wrong numbers. A broken rule is noted in `FakeCuda.broken` and raised as RuleBroken; what CUDA itself would
refuse is raised as CUDAError.
"""

import ctypes
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fake_errors import STICKY, RuleBroken, cuda_error
from fake_memory import FREED, Allocation, Span

KEPT_FREED_BYTES = 1 << 28  # freed memory stays mapped, so that a stray host view reads FREED instead of crashing
LEGACY, PER_THREAD = 1, 2
NULL_STREAM = 0
FIRST_STREAM = 0x5000_0000_0000
MANY = 64
COUNTED = ("allocations", "frees", "syncs", "copies", "fills", "launches", "captures", "engine_runs")


@dataclass(frozen=True, slots=True)
class FakeGpu:
    """One GPU of the machine; `busy` means that another process holds it in exclusive mode."""

    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    memory_bytes: int = 80 << 30
    busy: bool = False


@dataclass(eq=False, slots=True)
class Op:
    """One piece of work on a stream; `after` is work elsewhere that must be done before it."""

    label: tuple[Any, ...]
    run: Callable[[], None] = lambda: None
    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()
    owner: Any = None
    after: "Op | None" = None
    stream: "StreamState | None" = None
    index: int = 0
    done: bool = False
    time_ns: int = 0
    clock: dict[int, int] = field(default_factory=dict)


class StreamState:
    """What CUDA knows of a stream: its queue, and the work elsewhere that is ordered before its next."""

    def __init__(self, handle: int, device: int) -> None:
        self.handle, self.device = handle, device
        self.queue: deque[Op] = deque()
        self.issued = 0
        self.clock: dict[int, int] = {}
        self.capture: Capture | None = None
        self.closed = False


class Capture:
    """Work that is recorded instead of run; only the thread that began it may end it."""

    def __init__(self, stream: StreamState) -> None:
        self.stream = stream
        self.thread = threading.get_ident()
        self.ops: list[Op] = []
        self.invalid = False


class EventState:
    """The last record of an event."""

    def __init__(self, device: int, *, timing: bool) -> None:
        self.device, self.timing = device, timing
        self.op: Op | None = None
        self.captured = False
        self.closed = False


class GraphState:
    """A captured graph that can be launched."""

    def __init__(self, ops: list[Op], device: int) -> None:
        self.ops, self.device = ops, device
        self.reads = list(dict.fromkeys(span for op in ops for span in op.reads))
        self.writes = list(dict.fromkeys(span for op in ops for span in op.writes))
        self.last: Op | None = None
        self.closed = False

    @property
    def labels(self) -> list[tuple[Any, ...]]:
        return [op.label for op in self.ops]


class Counts:
    """How often something happened since a block began; stops counting when it ends."""

    def __init__(self, counts: Counter[str]) -> None:
        self._live = counts
        self._before = Counter(counts)
        self._after: Counter[str] | None = None

    def __getattr__(self, name: str) -> int:
        if name not in COUNTED:
            raise AttributeError(name)
        return (self._live if self._after is None else self._after)[name] - self._before[name]

    def stop(self) -> None:
        self._after = Counter(self._live)

    def __repr__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in COUNTED)


@dataclass(slots=True)
class Fault:
    call: str
    error: str
    after: int
    times: int


class FakeCuda:
    """The controller: what product code did, what it broke, and what shall fail."""

    def __init__(self, devices: Sequence[FakeGpu], driver: tuple[int, ...] | None, *, nvml: bool = True) -> None:
        self.devices = tuple(devices)
        self.driver = driver
        self.nvml = nvml
        self.broken: list[str] = []
        self.journal: list[tuple[Any, ...]] = []
        self.work: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        self.captured: list[list[tuple[Any, ...]]] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.lost: str | None = None
        self.graphs: list[GraphState] = []
        self._current = threading.local()
        self._faults: list[Fault] = []
        self._live: dict[object, str] = {}
        self._allocations: dict[int, Allocation] = {}
        self._freed: deque[Allocation] = deque()
        self._kept: list[Allocation] = []
        self._captures: list[Capture] = []
        self._streams: dict[int, StreamState] = {}
        for device in range(len(self.devices)):
            for handle in (LEGACY, PER_THREAD):
                self._streams.setdefault(handle, StreamState(handle, device))

    @property
    def allocations(self) -> int:
        """Allocations on GPUs and of pinned memory."""
        return self.counts["allocations"]

    @property
    def syncs(self) -> int:
        return self.counts["syncs"]

    @property
    def copies(self) -> int:
        return self.counts["copies"]

    @property
    def launches(self) -> int:
        return self.counts["launches"]

    @property
    def captures(self) -> int:
        return self.counts["captures"]

    @property
    def engine_runs(self) -> int:
        """Engine runs that were enqueued, those into a capture counted once."""
        return self.counts["engine_runs"]

    @property
    def streams_used(self) -> set[int]:
        """Handles of the streams that got work."""
        return {handle for handle, labels in self.work.items() if labels}

    @property
    def allocated_bytes(self) -> int:
        """Memory of all GPUs that is not closed."""
        return sum(each.size for each in self._allocations.values() if each.kind == "buffer")

    def reserved_bytes(self, device: int = 0) -> int:
        """Memory of a GPU that this process holds: allocations, and what CUDA keeps for the next ones."""
        with self.lock:
            held = [*self._allocations.values(), *self._kept]
            return sum(each.size for each in held if (each.kind, each.device) == ("buffer", device))

    def trim(self, device: int) -> None:
        """Give back what CUDA keeps, as far as no stream still has to free it."""
        with self.lock:
            self.enter("trim")
            self._kept = [each for each in self._kept if each.device != device or not each.freed]

    def live(self) -> list[str]:
        """What was made and not closed."""
        with self.lock:
            return sorted(self._live.values())

    def pending(self) -> int:
        """Pieces of work that no one waited for."""
        with self.lock:
            return sum(len(stream.queue) for stream in self._streams.values())

    @contextmanager
    def during(self) -> Iterator[Counts]:
        """Count what happens within the block."""
        counts = Counts(self.counts)
        try:
            yield counts
        finally:
            counts.stop()

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """A copy of what lies at an address now, without waiting for anything."""
        with self.lock:
            span = self.span(address, nbytes, "the test")
            return span.allocation.bytes[span.low : span.high].copy()

    def fail(self, call: str, error: str = "CUDA_ERROR_OUT_OF_MEMORY", after: int = 0, times: int = 1) -> None:
        """Let a call fail, `after` that many good ones; an error that is sticky makes every later call fail too."""
        self._faults.append(Fault(call, error, after, times))

    def break_rule(self, what: str) -> None:
        self.broken.append(what)
        raise RuleBroken(what)

    def enter(self, call: str, device: int | None = None, *, unsafe: bool = False, note: tuple[Any, ...] = ()) -> None:
        """Every CUDA call begins here; `unsafe` is what a capturing thread must not do."""
        self.journal.append((call, *note))
        if self.lost:
            raise cuda_error(self.lost)
        for fault in self._faults:
            if fault.call == call and fault.times:
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                if fault.error in STICKY:
                    self.lost = fault.error
                raise cuda_error(fault.error)
        if device is not None and self.current != device:
            self.break_rule(f"{call}: GPU {device} is not current on this thread, {self.current} is")
        if unsafe:
            self.forbid_in_capture()

    def forbid_in_capture(self) -> None:
        """Raise, and invalidate what this thread captures."""
        mine = [capture for capture in self._captures if capture.thread == threading.get_ident()]
        if mine:
            self.invalidate(*mine)

    def invalidate(self, *captures: Capture) -> None:
        for capture in captures:
            capture.invalid = True
        raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    @property
    def current(self) -> int | None:
        """The GPU that is current on this thread."""
        return getattr(self._current, "device", None)

    def make_current(self, device: int) -> None:
        with self.lock:
            self.enter("set_current", note=(device,))
            if self.devices[device].busy:
                raise cuda_error("CUDA_ERROR_DEVICE_UNAVAILABLE")
            self._current.device = device

    def set_context(self, device: int | None) -> None:
        """What the driver does with a context that it knows: it works after a sticky error too."""
        self.journal.append(("set_context", device))
        self._current.device = device

    def allocate(self, kind: str, size: int, device: int, stream: StreamState | None) -> Allocation:
        with self.lock:
            call = "allocate" if kind == "buffer" else "pinned"
            self.enter(call, device, unsafe=True, note=(size,))
            if kind == "buffer":
                used = sum(a.size for a in self._allocations.values() if (a.kind, a.device) == ("buffer", device))
                if used + size > self.devices[device].memory_bytes:
                    raise cuda_error("CUDA_ERROR_OUT_OF_MEMORY")
            allocation = Allocation(kind, device, size)
            if kind == "buffer":
                self._reuse(device, size)
            self.counts["allocations"] += 1
            self._allocations[allocation.address] = allocation
            self._live[allocation] = f"{kind} of {size} bytes"
            if stream is not None:
                self.enqueue(stream, Op(("allocate", size), writes=[self._all_of(allocation)]))
            return allocation

    def free(self, allocation: Allocation, stream: StreamState | None) -> None:
        """In stream order where there is a stream, at once else."""
        with self.lock:
            self.journal.append(("free", allocation.size))
            if not self.lost:
                if self.current is None or (allocation.kind == "buffer" and self.current != allocation.device):
                    self.break_rule(f"free: GPU {allocation.device} is not current on this thread, {self.current} is")
                self.forbid_in_capture()
            self._check_guards(allocation)
            if stream is None and not self.lost and self._busy(allocation):
                self.break_rule(f"a {allocation} was closed while work that uses it is pending")
            allocation.closed = True
            self.counts["frees"] += 1
            self._live.pop(allocation, None)
            self._allocations.pop(allocation.address)

            def release() -> None:
                allocation.bytes.fill(FREED)
                allocation.freed = True

            self._keep(allocation)
            if allocation.kind == "buffer":
                self._kept.append(allocation)
            if stream is None or self.lost:
                release()
            else:
                self.enqueue(stream, Op(("free", allocation.size), release, writes=[self._all_of(allocation)]))

    def span(self, address: int, nbytes: int, who: str) -> Span:
        """The live memory at an address; a broken rule where there is none, or not enough."""
        for allocation in self._allocations.values():
            low = address - allocation.address
            if 0 <= low < max(allocation.size, 1):
                if low + nbytes > allocation.size:
                    self.break_rule(f"{who}: needs {nbytes} bytes at byte {low} of a {allocation}")
                return Span(allocation, low, low + nbytes)
        for allocation in self._freed:
            if 0 <= address - allocation.address < allocation.size:
                self.break_rule(f"{who}: {address:#x} lies in a {allocation} that was closed")
        return self.break_rule(f"{who}: {address:#x} lies in no memory of CUDA")  # type: ignore[return-value]

    def _reuse(self, device: int, size: int) -> None:
        for kept in [each for each in self._kept if each.device == device and each.freed]:
            if size <= 0:
                break
            self._kept.remove(kept)
            size -= kept.size

    def _all_of(self, allocation: Allocation) -> Span:
        return Span(allocation, 0, allocation.size)

    def _keep(self, allocation: Allocation) -> None:
        self._freed.append(allocation)
        while sum(each.size for each in self._freed) > KEPT_FREED_BYTES and self._freed[0].freed:
            self._freed.popleft()

    def _busy(self, allocation: Allocation) -> bool:
        return any(not op.done for op, _, _ in allocation.readers + allocation.writers)

    def _check_guards(self, *allocations: Allocation) -> None:
        for allocation in allocations:
            if not allocation.intact:
                allocation.mend()
                self.break_rule(f"something wrote outside a {allocation}")

    def make_stream(self, device: int) -> StreamState:
        with self.lock:
            self.enter("create_stream", device)
            state = StreamState(FIRST_STREAM + 0x100 * len(self._streams), device)
            self._streams[state.handle] = state
            self._live[state] = f"stream {state.handle:#x}"
            return state

    def close_stream(self, state: StreamState) -> None:
        with self.lock:
            if state.capture is not None:
                self.break_rule("a stream was closed while it captures")
            state.closed = True
            self._live.pop(state, None)

    def stream(self, handle: int) -> StreamState:
        """The stream with that handle."""
        with self.lock:
            state = self._streams.get(handle or LEGACY)
            if state is None or state.closed:
                self.break_rule(f"{handle:#x} is the handle of {'a closed' if state else 'no'} stream")
            if state.handle in (LEGACY, PER_THREAD):
                state.device = self.current or 0
            return state

    def enqueue(self, state: StreamState, op: Op) -> None:
        """Work to the end of a stream, or into what the stream captures."""
        with self.lock:
            if state.handle == LEGACY:
                self.forbid_in_capture()
            capture = state.capture
            if capture is not None:
                if capture.thread != threading.get_ident():
                    self.break_rule(f"{op.label} went to a stream that another thread is capturing")
                if capture.invalid:
                    raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
                capture.ops.append(op)
                return
            self.work[state.handle].append(op.label)
            state.issued += 1
            op.stream, op.index = state, state.issued
            self._check_order(op, state)
            state.clock[state.handle] = op.index
            op.clock = dict(state.clock)
            for span in op.reads:
                _add_use(span.allocation.readers, op, span)
            for span in op.writes:
                _add_use(span.allocation.writers, op, span)
            state.queue.append(op)

    def _check_order(self, op: Op, state: StreamState) -> None:
        """Two pieces of work on one memory, one of them writing, must be ordered by a stream, an event or a sync."""
        for span, conflicting in [(span, ("writers",)) for span in op.reads] + [
            (span, ("readers", "writers")) for span in op.writes
        ]:
            for name in conflicting:
                pending = [use for use in getattr(span.allocation, name) if not use[0].done]
                setattr(span.allocation, name, pending)
                for other, low, high in pending:
                    if low < span.high and span.low < high and not self.ordered(other, state):
                        self.break_rule(
                            f"race: {op.label} and {other.label} of another stream use one {span.allocation} unordered"
                        )

    def ordered(self, op: Op, state: StreamState) -> bool:
        """Whether the next work of a stream comes after `op` whatever happens."""
        return (
            op.done
            or op.stream is state
            or (op.stream is not None and state.clock.get(op.stream.handle, 0) >= op.index)
        )

    def sync_stream(self, state: StreamState) -> None:
        with self.lock:
            self.counts["syncs"] += 1
            self.enter("sync", state.device, unsafe=True, note=("stream", state.handle))
            if state.capture is not None:
                self.invalidate(state.capture)
            self.drain(state)

    def sync_device(self, device: int) -> None:
        with self.lock:
            self.counts["syncs"] += 1
            self.enter("sync", device, unsafe=True, note=("device", device))
            open_ones = [capture for capture in self._captures if capture.stream.device == device]
            if open_ones:
                self.invalidate(*open_ones)
            for state in list(self._streams.values()):
                if state.device == device:
                    self.drain(state)

    def drain(self, state: StreamState, until: Op | None = None) -> None:
        """Run what is on a stream, all of it or to some piece of work, with all that it waits for."""
        while state.queue and not (until is not None and until.done):
            op = state.queue.popleft()
            try:
                if op.after is not None and op.after.stream is not None and not op.after.done:
                    self.drain(op.after.stream, op.after)
                self._execute(op)
            finally:
                op.done = True

    def _execute(self, op: Op) -> None:
        spans = [*op.reads, *op.writes]
        for span in spans:
            if span.allocation.freed:
                self.break_rule(f"{op.label} ran on a {span.allocation} that was freed")
        op.run()
        op.time_ns = time.perf_counter_ns()
        self._check_guards(*{span.allocation for span in spans})

    def copy(self, target: tuple[int, int], source: tuple[int, int], state: StreamState) -> None:
        """(address, bytes) to (address, bytes)."""
        with self.lock:
            self.enter("copy", state.device, note=(target[1],))
            to, of = self.span(*target, "copy to"), self.span(*source, "copy from")
            if to.overlaps(of):
                self.break_rule(f"copy: source and target overlap in a {to.allocation}")
            self.counts["copies"] += 1

            def run() -> None:
                ctypes.memmove(target[0], source[0], target[1])

            self.enqueue(state, Op(("copy", target[1]), run, reads=[of], writes=[to]))

    def fill(self, target: tuple[int, int], pattern: bytes, state: StreamState) -> None:
        with self.lock:
            self.enter("fill", state.device, note=(target[1],))
            span = self.span(*target, "fill")
            self.counts["fills"] += 1

            def run() -> None:
                repeated = np.resize(np.frombuffer(pattern, np.uint8), target[1])
                span.allocation.bytes[span.low : span.high] = repeated

            self.enqueue(state, Op(("fill", target[1]), run, writes=[span]))

    def make_event(self, device: int, *, timing: bool) -> EventState:
        with self.lock:
            self.enter("create_event", device)
            state = EventState(device, timing=timing)
            self._live[state] = "event"
            return state

    def close_event(self, event: EventState) -> None:
        with self.lock:
            event.closed = True
            self._live.pop(event, None)

    def record(self, event: EventState, state: StreamState) -> None:
        with self.lock:
            self.enter("record", state.device)
            op = Op(("record",))
            event.captured = state.capture is not None
            self.enqueue(state, op)
            event.op = op

    def wait(self, state: StreamState, event: EventState) -> None:
        with self.lock:
            self.enter("wait", state.device)
            if event.op is None:
                return
            if state.capture is not None:
                if event.op not in state.capture.ops:
                    state.capture.invalid = True
                    raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
                return
            if event.captured:
                self.break_rule("a stream that does not capture waits for an event that was captured")
            self.enqueue(state, Op(("wait",), after=event.op))
            for handle, index in event.op.clock.items():
                state.clock[handle] = max(state.clock.get(handle, 0), index)

    def sync_event(self, event: EventState) -> None:
        with self.lock:
            self.counts["syncs"] += 1
            self.enter("sync", event.device, unsafe=True, note=("event",))
            op = self._reached(event)
            if op is not None and op.stream is not None:
                self.drain(op.stream, op)

    def query_event(self, event: EventState) -> bool:
        """Whether it is done; the work before it is, by the next time that someone asks."""
        with self.lock:
            self.enter("query", event.device, unsafe=True)
            op = self._reached(event)
            if op is None or op.done:
                return True
            if op.stream is not None:
                self.drain(op.stream, op)
            return False

    def elapsed_ms(self, first: EventState, last: EventState) -> float:
        with self.lock:
            self.enter("elapsed", last.device)
            if not (first.timing and last.timing):
                raise RuntimeError(
                    "Both Events must be created with timing enabled in order to subtract them; "
                    "use EventOptions(timing_enabled=True) when creating both events."
                )
            ops = [event.op for event in (first, last)]
            if None in ops or first.captured or last.captured:
                raise RuntimeError(
                    "Both Events must be recorded before they can be subtracted; "
                    "use Stream.record() to record both events to a stream."
                )
            if not all(op is not None and op.done for op in ops):
                raise RuntimeError(
                    "One or both events have not completed; "
                    "use Event.sync(), Stream.sync(), or Device.sync() to wait for the events to complete "
                    "before subtracting them."
                )
            begin, end = (op.time_ns for op in ops if op is not None)
            return float(np.float32((end - begin) / 1e6))

    def _reached(self, event: EventState) -> Op | None:
        if event.captured:
            raise cuda_error("CUDA_ERROR_CAPTURED_EVENT")
        return event.op

    def begin_capture(self, state: StreamState, mode: str) -> Capture:
        with self.lock:
            self.enter("begin_building", state.device, note=(mode,))
            if mode != "thread_local":
                self.break_rule(f"a capture in mode {mode!r} disturbs other threads or hides errors; use thread_local")
            if state.handle in (LEGACY, PER_THREAD):
                raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            if state.capture is not None:
                raise cuda_error("CUDA_ERROR_ILLEGAL_STATE")
            state.capture = Capture(state)
            self._captures.append(state.capture)
            return state.capture

    def end_capture(self, capture: Capture) -> list[Op]:
        with self.lock:
            self.enter("end_building", capture.stream.device)
            if capture.thread != threading.get_ident():
                raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD")
            if capture not in self._captures:
                raise cuda_error("CUDA_ERROR_ILLEGAL_STATE")
            capture.stream.capture = None
            self._captures.remove(capture)
            if capture.invalid:
                raise cuda_error("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
            return capture.ops

    def make_graph(self, ops: list[Op], device: int) -> GraphState:
        with self.lock:
            self.enter("complete", device)
            graph = GraphState(ops, device)
            self.counts["captures"] += 1
            self.captured.append(graph.labels)
            self.graphs.append(graph)
            self._live[graph] = f"graph of {len(ops)}"
            return graph

    def launch(self, graph: GraphState, state: StreamState) -> None:
        with self.lock:
            self.enter("launch", state.device, note=(len(graph.ops),))
            if state.capture is not None:
                self.invalidate(state.capture)
            for span in (*graph.reads, *graph.writes):
                if span.allocation.closed:
                    self.break_rule(f"a graph was launched that uses a {span.allocation} that was closed")
            if graph.last is not None and not graph.last.done and graph.last.stream is not state:
                self.break_rule("a graph was launched while its last launch is pending on another stream")
            self.counts["launches"] += 1

            def run() -> None:
                for op in graph.ops:
                    op.run()

            graph.last = Op(("graph", len(graph.ops)), run, graph.reads, graph.writes)
            self.enqueue(state, graph.last)

    def upload(self, graph: GraphState, state: StreamState) -> None:
        with self.lock:
            self.enter("upload", state.device)
            if state.capture is not None:
                self.invalidate(state.capture)
            self.enqueue(state, Op(("upload", len(graph.ops))))

    def close_graph(self, graph: GraphState) -> None:
        with self.lock:
            if not graph.closed:
                graph.closed = True
                self.graphs.remove(graph)
                self._live.pop(graph, None)

    def opened(self, thing: object, what: str) -> None:
        """Something that `live` lists until it is closed."""
        with self.lock:
            self._live[thing] = what

    def shut(self, thing: object) -> None:
        with self.lock:
            self._live.pop(thing, None)

    def owns_captured_work(self, owner: object) -> bool:
        """Whether work of `owner` is in a graph that is open, or in a capture that goes on; takes no lock."""
        held = [graph.ops for graph in list(self.graphs)] + [capture.ops for capture in list(self._captures)]
        return any(op.owner is owner for ops in held for op in list(ops))

    def owns_pending_work(self, owner: object) -> bool:
        """Whether work of `owner` waits on a stream; takes no lock, so that a garbage collection can ask."""
        return any(op.owner is owner for stream in list(self._streams.values()) for op in list(stream.queue))


def _add_use(uses: list[tuple[Op, int, int]], op: Op, span: Span) -> None:
    if len(uses) > MANY:
        uses[:] = [use for use in uses if not use[0].done]
    uses.append((op, span.low, span.high))
