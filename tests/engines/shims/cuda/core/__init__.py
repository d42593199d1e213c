"""What `cuda.core` is to the worker on a machine without a GPU: one GPU of sm89, or what `CUDA_CORE_FAILS` says.

`CUDA_DRIVER` is the version of its driver.
"""

import os
from types import SimpleNamespace

KERNEL_MODE = tuple(map(int, os.environ.get("CUDA_DRIVER", "580.65.6").split(".")))


class Device:
    name = "NVIDIA Test GPU"
    compute_capability = SimpleNamespace(major=8, minor=9)

    def __init__(self):
        if os.environ.get("CUDA_CORE_FAILS") == "no GPU":
            raise RuntimeError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device\nis detected")
        if os.environ.get("CUDA_CORE_FAILS") == "mismatch":
            raise RuntimeError("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")


class system:  # noqa: N801
    @staticmethod
    def get_kernel_mode_driver_version():
        if os.environ.get("CUDA_CORE_FAILS") == "no NVML":
            raise RuntimeError("the NVML library is not available")
        return KERNEL_MODE
