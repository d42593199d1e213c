"""Latents on a GPU that this package and other libraries share by DLPack."""

from importlib import import_module
from typing import Any

import numpy as np

from ilf_trt.errors import InvalidRequest, one_line

from .cuda import Gpu, Memory, Stream

LATENT = np.dtype(np.float32)


class DeviceArray:
    """Complete float32 latents (B, C, H, W) on a GPU; `torch.from_dlpack(array)` shares their memory."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], gpu: Gpu) -> None:
        self._memory = memory
        self._gpu = gpu
        self.shape = shape
        self.dtype = LATENT
        view = import_module("cuda.core.utils").StridedMemoryView
        self._view = view.from_buffer(memory.core, shape, dtype=LATENT)

    def close(self) -> None:
        """Free the memory now, else the last reference to it does; nobody may read the array afterwards."""
        self._gpu.use()
        self._memory.close()

    def __dlpack__(self, **options: Any) -> Any:
        return self._view.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()


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
