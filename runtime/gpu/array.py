"""Latents that stay on a GPU, ours for other libraries and theirs for us, by DLPack."""

from importlib import import_module
from typing import Any

import numpy as np

from ilf_trt.errors import InvalidRequest
from ilf_trt.runtime.gpu.cuda import Gpu, Memory, Stream
from ilf_trt.runtime.gpu.errors import line_of

DLPACK_CUDA = 2
LATENT = np.dtype(np.float32)


class DeviceArray:
    """float32 latents (B, C, H, W) on a GPU, complete when handed out: `torch.from_dlpack(array)` shares the memory."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], gpu: Gpu) -> None:
        self._memory = memory
        self._gpu = gpu
        self.shape = shape
        self.dtype = LATENT
        view = import_module("cuda.core.utils").StridedMemoryView
        self._view = view.from_buffer(memory.core, shape, dtype=LATENT)

    def close(self) -> None:
        """Free the memory now; without it, it goes with the last who holds it. Nobody may read it afterwards."""
        self._gpu.use()
        self._memory.close()

    def __dlpack__(self, **options: Any) -> Any:
        return self._view.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()


def is_on_gpu(array: object) -> bool:
    """Whether an object says by DLPack that it lies on a GPU."""
    asked = getattr(array, "__dlpack_device__", None)
    return asked is not None and int(asked()[0]) == DLPACK_CUDA


def borrowed(array: Any, shape: tuple[int, ...], gpu: Gpu, stream: Stream) -> Memory:
    """Somebody's float32 array on our GPU as memory to copy from, after what they still do to it.

    Raises InvalidRequest for another shape, dtype, GPU or layout.
    """
    try:
        view = import_module("cuda.core.utils").StridedMemoryView.from_any_interface(array, stream_ptr=stream.handle)
    except Exception as error:
        raise InvalidRequest(f"latents cannot be read by DLPack ({line_of(error)}); pass a numpy array") from error
    if tuple(view.shape) != shape or view.dtype != LATENT:
        raise InvalidRequest(f"latents are {view.dtype} {tuple(view.shape)}, expected float32 {shape}")
    if view.device_id != gpu.ordinal:
        raise InvalidRequest(f"latents are on cuda:{view.device_id}, the pipeline on cuda:{gpu.ordinal}; move them")
    dense = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    strides = tuple(view.strides or dense)
    if any(size > 1 and got != want for size, got, want in zip(shape, strides, dense, strict=True)):
        raise InvalidRequest("latents are not contiguous; pass latents.contiguous()")
    buffer = import_module("cuda.core").Buffer
    return Memory(buffer.from_handle(int(view.ptr), int(np.prod(shape)) * LATENT.itemsize, owner=view))
