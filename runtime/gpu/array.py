"""Latents on a GPU that this package and other libraries share by DLPack."""

from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np

from ilf_trt.errors import InvalidRequest, one_line

from .cuda import Gpu, Memory, Stream
from .current import Allocated

LATENT = np.dtype(np.float32)
DEFAULT_STREAM, NO_STREAM = 1, -1  # in DLPack and in CUDA


class DeviceArray(Allocated):
    """Complete float32 latents (B, C, H, W) on a GPU; `torch.from_dlpack(array)` shares their memory.

    The memory is freed with the last reference, also that of another library. Its stream may still read then:
    the memory serves nobody else before the work on every stream that asked for the array is done. Such a stream must
    live as long as the array. The per-thread default stream (2 in DLPack) is another one on every thread: whoever reads
    there synchronises it before another thread may drop the last reference.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], gpu: Gpu) -> None:
        self._gpu = gpu
        self.shape = shape
        self.dtype = LATENT
        self._owner = _Owner(memory, gpu)
        buffer = import_module("cuda.core").Buffer.from_handle(memory.address, memory.size_bytes, owner=self._owner)
        view = import_module("cuda.core.utils").StridedMemoryView
        self._view = view.from_buffer(buffer, shape, dtype=LATENT)

    def close(self) -> None:
        """Free the memory now; nobody may read the array afterwards, nor what another library made of it."""
        super().close()

    def _free(self) -> None:
        self._owner.close()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """The memory for another library that reads on `stream`; raises InvalidRequest after `close`."""
        self._owner.lend(stream)
        return self._view.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()


class _Owner(Allocated):
    """Keeps the memory for everybody who shares it, and the streams on which they may read it.

    Without such a stream, the memory is freed in the order of CUDA's default stream. The stream that it was made on is
    a session's: another thread may be capturing it, and would capture the end of the memory too.
    """

    def __init__(self, memory: Memory, gpu: Gpu) -> None:
        self._gpu = gpu
        self._memory: Memory | None = memory
        self._streams: dict[int, Stream] = {}

    def lend(self, handle: int | None) -> None:
        """Note the stream of a consumer, as DLPack says it: None is CUDA's default stream, -1 is no stream.

        Raises InvalidRequest when the memory is gone.
        """
        if self._memory is None:
            raise InvalidRequest("these latents are closed and their memory is free; share them before close()")
        handle = DEFAULT_STREAM if handle in (None, 0) else handle
        if handle != NO_STREAM and handle not in self._streams:
            self._streams[handle] = Stream.of_handle(handle)

    def _free(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close(after=tuple(self._streams.values()) or (Stream.of_handle(DEFAULT_STREAM),))

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending
            self.close()


def memory_from_dlpack(array: Any, shape: tuple[int, ...], gpu: Gpu, stream: Stream) -> Memory:
    """The memory of another library's float32 array on `gpu`, to copy from on `stream`.

    The stream waits for the work that the other library still does on the array. Raises InvalidRequest for another
    shape, dtype, GPU or layout.
    """
    try:
        view = import_module("cuda.core.utils").StridedMemoryView.from_any_interface(array, stream_ptr=stream.handle)
    except Exception as error:
        raise InvalidRequest(f"latents cannot be read by DLPack ({one_line(error)}); pass a numpy array") from error
    if tuple(view.shape) != shape or view.dtype != LATENT:
        raise InvalidRequest(f"latents are {view.dtype} {tuple(view.shape)}, expected float32 {shape}")
    if view.device_id != gpu.ordinal:
        raise InvalidRequest(f"latents are on cuda:{view.device_id}, the pipeline is on cuda:{gpu.ordinal}; move them")
    dense = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    strides = tuple(view.strides or dense)
    if any(size > 1 and got != expected for size, got, expected in zip(shape, strides, dense, strict=True)):
        raise InvalidRequest("latents are not contiguous; pass latents.contiguous()")
    buffer = import_module("cuda.core").Buffer
    return Memory(buffer.from_handle(int(view.ptr), int(np.prod(shape)) * LATENT.itemsize, owner=view))
