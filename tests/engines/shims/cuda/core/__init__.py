"""What `cuda.core` is to the worker on a machine without a GPU: one GPU of sm89, or what `CUDA_CORE_FAILS` says."""

import os
from types import SimpleNamespace

KERNEL_MODE = (580, 65, 6)


class Device:
    name = "NVIDIA Test GPU"
    compute_capability = SimpleNamespace(major=8, minor=9)

    def __init__(self):
        if os.environ.get("CUDA_CORE_FAILS") == "no GPU":
            raise RuntimeError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device\nis detected")


class system:  # noqa: N801
    @staticmethod
    def get_kernel_mode_driver_version():
        if os.environ.get("CUDA_CORE_FAILS") == "no NVML":
            raise RuntimeError("the NVML library is not available")
        return KERNEL_MODE
