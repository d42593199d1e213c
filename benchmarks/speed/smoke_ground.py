"""Where a check of the smoke test runs: a real GPU with torch on it, or a stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rivals.torch_engine import CudaLane, Lane
from ilf_trt.contract.target import Library
from ilf_trt.errors import OutOfMemory
from ilf_trt.runtime.gpu.cuda import Gpu, Memory, Stream

SPIN_MS = 200.0
SMALLEST_BYTES = 4096


class NotTried(Exception):
    """Why a check cannot run here."""


class Ground(Protocol):
    """What checks do differently on a GPU and on a stand-in."""

    gpus: int
    builds: bool
    """Whether bundles and engines can be built for it."""

    work: Path
    """A folder for bundles."""

    bundles: dict[Library | None, Path]
    """Bundles that are built already, by the library of their engines; None for one without engines."""

    def lane(self, ordinal: int = 0) -> Lane:
        """torch's way to `cuda:ordinal`."""

    def latents_on_gpu(self, array: NDArray[np.float32], gpu: Gpu, stream: Stream) -> Any:
        """Another library's latents on the GPU, as DLPack takes them."""

    def latents_from_gpu(self, latents: Any) -> NDArray[np.float32]:
        """What another library reads of the runtime's latents by DLPack."""

    def churn(self, gpu: Gpu, stream: Stream, stop: Event) -> int:
        """Allocate and free memory until `stop`, leave pinned memory to the garbage collection; how often it did."""

    def full(self, gpu: Gpu, stream: Stream) -> Any:
        """A `with` block in which the GPU has no memory left."""

    def spin(self, stream: Stream) -> None:
        """Put work of about SPIN_MS on the stream; raises NotTried."""

    def lose(self, stream: Stream) -> None:
        """Put work on the stream after which CUDA refuses all further work of this process."""

    def empty_cache(self) -> None:
        """Free what torch keeps for later allocations."""


class CudaGround:
    """A real GPU."""

    builds = True

    def __init__(self, work: Path) -> None:
        self.gpus = torch.cuda.device_count()
        self.work = work
        self.bundles: dict[Library | None, Path] = {}
        torch.backends.cudnn.allow_tf32 = False  # cuDNN's default rounds a float32 convolution to 10 bits

    def lane(self, ordinal: int = 0) -> Lane:
        return CudaLane(ordinal)

    def latents_on_gpu(self, array: NDArray[np.float32], gpu: Gpu, stream: Stream) -> Any:
        # Work that is still on torch's stream when the runtime takes the array: the runtime must wait for it.
        tensor = torch.empty(array.shape, device=f"cuda:{gpu.ordinal}")
        self._sleep(SPIN_MS / 10)
        tensor.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)
        return tensor

    def latents_from_gpu(self, latents: Any) -> NDArray[np.float32]:
        shared = torch.from_dlpack(latents)
        copies = [shared.clone() for _ in range(2)]
        if shared.data_ptr() != torch.from_dlpack(latents).data_ptr():
            raise AssertionError("two views of one array do not share memory")
        return copies[1].cpu().numpy()

    def churn(self, gpu: Gpu, stream: Stream, stop: Event) -> int:
        rounds = 0
        gpu.use()
        while not stop.is_set():
            size = 1 << (12 + rounds % 12)
            gpu.allocate(size, stream).close()
            cycle: list[Any] = [gpu.pinned(size)]
            cycle.append(cycle)
            torch.empty(size, device=f"cuda:{gpu.ordinal}").add_(1)
            rounds += 1
        stream.sync()
        return rounds

    @contextmanager
    def full(self, gpu: Gpu, stream: Stream) -> Iterator[None]:
        torch.cuda.empty_cache()
        size_bytes, held = torch.cuda.get_device_properties(gpu.ordinal).total_memory, list[Memory]()
        try:
            while size_bytes >= SMALLEST_BYTES:
                try:
                    held.append(gpu.allocate(size_bytes, stream))
                except OutOfMemory:
                    size_bytes //= 2
            yield
        finally:
            gpu.use()
            for memory in held:
                memory.close()
            stream.sync()
            gpu.trim()

    def spin(self, stream: Stream) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            self._sleep(SPIN_MS)

    def lose(self, stream: Stream) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            torch._assert_async(torch.zeros((), device="cuda", dtype=torch.bool))

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def _sleep(self, milliseconds: float) -> None:
        clock_khz = 1.5e6  # about the clock of a data centre's GPU: the time need not be exact
        torch.cuda._sleep(int(milliseconds * clock_khz))
