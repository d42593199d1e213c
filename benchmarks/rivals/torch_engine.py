"""The five segments run by torch behind the runtime's own trajectory: CUDA graphs without a compiler.

The runtime's memory, streams and captures are the real ones; only the engine library is missing. So this is the base
line for what engines add, and it shows on a GPU that all other parts of the runtime work.

torch allocates what lies between the ports. A captured graph keeps those addresses, so they come from a memory pool
that belongs to the stream and lives until the last context on the stream closes. The trajectory enqueues its runs once
before it captures them, on the same thread and the same stream: then cuBLAS has its handle and its workspace, and the
pool holds every block that the capture asks for. If a block is missing, torch allocates it in relaxed capture mode.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.graphs import graphs_of
from ilf_trt.contract.manifest import Manifest, PictureFacts
from ilf_trt.contract.plan import StepPlan
from ilf_trt.contract.ports import ITEM_BYTES, Graph
from ilf_trt.contract.spec import BatchRange, ModelSpec, Precision
from ilf_trt.export.segments import Segment, constants_of, segments_of, spec_of
from ilf_trt.model.ilf_model import ILFModel
from ilf_trt.model.sampling import inference_copy
from ilf_trt.runtime import Pipeline
from ilf_trt.runtime.engine import Launch
from ilf_trt.runtime.gpu.cuda import Gpu, Stream, upload
from ilf_trt.runtime.gpu.device import Device
from ilf_trt.runtime.gpu.errors import translate_errors
from ilf_trt.runtime.gpu.scratch import Scratch

NAME = "torch-graph"
TYPESTR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "int32": "<i4"}
"""Types of `__cuda_array_interface__`, which has no bfloat16."""

Block = tuple[int, int]
"""Address and size in bytes."""


@dataclass(frozen=True, slots=True)
class Work:
    """One run of a graph: what it calls, and the memory that it reads and writes. `owner` is its context."""

    name: str
    run: Callable[[], None]
    reads: Sequence[Block]
    writes: Sequence[Block]
    owner: object


class Lane(Protocol):
    """The way of torch's work to the streams of the runtime."""

    device: str
    """Where torch keeps the weights."""

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor of a port's dtype over memory of the runtime, which must outlive it."""

    def enter(self, stream: Stream) -> None:
        """Prepare a stream for one more context."""

    def put(self, stream: Stream, work: Work) -> None:
        """Put a run on the stream, or into what the stream captures; return at once."""

    def leave(self, stream: Stream, owner: object) -> None:
        """Forget a context; nobody may launch what holds its runs afterwards."""


class CudaLane:
    """torch on `cuda:ordinal`, on streams that cuda.core made."""

    def __init__(self, ordinal: int = 0) -> None:
        torch.cuda.init()
        self.device = f"cuda:{ordinal}"
        self._ordinal = ordinal
        self._places: dict[int, _Place] = {}
        self._lock = Lock()

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        tensor = torch.as_tensor(_Raw(address, shape, TYPESTR[dtype]), device=self.device)
        if prod(shape) and tensor.data_ptr() != address:
            raise RuntimeError(f"torch copied memory at {address:#x} instead of sharing it")
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor

    def enter(self, stream: Stream) -> None:
        with self._lock:
            place = self._places.get(stream.handle)
            if place is None:
                with torch.cuda.device(self._ordinal):
                    external = torch.cuda.ExternalStream(stream.handle, device=self.device)
                    place = self._places[stream.handle] = _Place(external, torch.cuda.MemPool())
            place.contexts += 1

    def put(self, stream: Stream, work: Work) -> None:
        place = self._places[stream.handle]
        with torch.cuda.stream(place.stream), torch.cuda.use_mem_pool(place.pool, device=self._ordinal):
            work.run()

    def leave(self, stream: Stream, owner: object) -> None:
        with self._lock:
            place = self._places[stream.handle]
            place.contexts -= 1
            if not place.contexts:
                del self._places[stream.handle]


class TorchEngine:
    """A `DeviceEngine` of one segment."""

    capturable = True

    def __init__(self, segment: Segment, lane: Lane) -> None:
        self.graph: Graph = segment.graph
        self.segment: Segment | None = segment
        self.lane = lane

    def context(self, shapes: Mapping[str, tuple[int, ...]], stream: Stream, scratch: Scratch) -> "TorchContext":
        """A context on `stream`; it leaves `scratch` alone."""
        return TorchContext(self, stream)

    def close(self) -> None:
        self.segment = None


class TorchContext:
    """A `DeviceContext` of one segment; the addresses may change from run to run."""

    scratch_bytes = 0

    def __init__(self, engine: TorchEngine, stream: Stream) -> None:
        self._engine = engine
        self._stream = stream
        with translate_errors(f"{engine.graph.name}: torch cannot use the stream"):
            engine.lane.enter(stream)

    def bind(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Launch:
        graph, lane, stream, segment = self._engine.graph, self._engine.lane, self._stream, self._engine.segment
        inputs, outputs = (
            [lane.tensor(addresses[port.name], shapes[port.name], port.dtype) for port in ports]
            for ports in (graph.inputs, graph.outputs)
        )
        reads, writes = (
            [(addresses[port.name], prod(shapes[port.name]) * ITEM_BYTES[port.dtype]) for port in ports]
            for ports in (graph.inputs, graph.outputs)
        )

        @torch.inference_mode()
        def run() -> None:
            values = segment(*inputs) if segment is not None else ()
            for output, value in zip(outputs, values if isinstance(values, tuple) else (values,), strict=True):
                output.copy_(value)

        work = Work(graph.name, run, reads, writes, self)

        def launch() -> None:
            with translate_errors(f"{graph.name}: torch failed"):
                lane.put(stream, work)

        return launch

    def check_capturable(self) -> None:
        """Do nothing: torch says so only during a capture."""

    def close(self) -> None:
        self._engine.lane.leave(self._stream, self)


@dataclass(frozen=True, slots=True)
class Served:
    """What the runtime serves: a model in float32 on the CPU, its plan, and the most pictures of a run."""

    model: ILFModel
    plan: StepPlan
    scheduler: Mapping[str, Any]
    precision: Precision
    pictures: int
    text_tokens: int
    guidance_scale: float

    def manifest(self) -> Manifest:
        """The manifest that a bundle of this model would have, without files."""
        spec = spec_of(
            self.model,
            guidance=True,
            text_tokens=self.text_tokens,
            train_timesteps=int(self.scheduler.get("num_train_timesteps", 1000)),
            precision=self.precision,
        )
        return Manifest(
            spec=spec,
            precision=self.precision,
            batch=BatchRange(1, self.pictures, self.pictures),
            graphs=graphs_of(spec, self.precision),
            scales=tuple(self.model.feedback.scales.tolist()),
            plan=self.plan,
            scheduler=dict(self.scheduler),
            guidance_scale=self.guidance_scale,
            clean_captions=False,
            base_sha256="",
            base_rounded_sha256={},
            base_differs=False,
            tools={},
            fp8=None,
            text=None,
            decoder=None,
            picture=PictureFacts(1, {}, {}),
            engines=(),
            files={},
        )


@contextmanager
def opened(served: Served, lane: Lane, *, ordinal: int = 0, sessions: int = 1) -> Iterator[Pipeline]:
    """A pipeline on `cuda:ordinal` whose engines are torch's; raises what opening a device raises."""
    manifest = served.manifest()
    device = open_device(served, manifest, lane, ordinal)
    with Pipeline.of(Bundle(Path(NAME), manifest), device, sessions=sessions) as pipeline:
        yield pipeline


def open_device(served: Served, manifest: Manifest, lane: Lane, ordinal: int) -> Device:
    """The segments of a copy of the model in its precision, on one GPU; the caller closes the device."""
    gpu = Gpu.open(ordinal)
    dtype = getattr(torch, manifest.precision.dtype)
    model = inference_copy(served.model, device=lane.device, dtype=dtype)
    segments = segments_of(model, manifest.spec, manifest.precision)
    with ExitStack() as failure, ExitStack() as stack:
        stream = gpu.stream()
        failure.callback(stream.close)
        engines = {name: TorchEngine(segment, lane) for name, segment in segments.items()}
        for engine in engines.values():
            stack.callback(engine.close)
        constants = {}
        for name, array in _constants(model, manifest.spec).items():
            constants[name] = gpu.allocate(array.nbytes, stream)
            stack.callback(constants[name].close)
            upload(gpu, stream, constants[name], array)
        failure.pop_all()
        return Device(
            gpu,
            engines,
            manifest,
            constants,
            stream,
            stack.pop_all(),
            library=f"torch {torch.__version__}",
            one_stream=False,
        )


@dataclass(slots=True)
class _Place:
    """torch's view of a stream, the pool of its work, and how many contexts use it."""

    stream: Any
    pool: Any
    contexts: int = 0


class _Raw:
    """Memory on a GPU as torch and others take it."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _constants(model: ILFModel, spec: ModelSpec) -> dict[str, Any]:
    """The feedback block's tensors as bytes, copied to the host after the work that made them."""
    return {
        name: value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        for name, value in constants_of(model, spec).items()
    }
