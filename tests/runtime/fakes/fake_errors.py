"""What product code may be told: an error of CUDA, or that it broke a rule."""

STICKY = {
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
}
EXPLANATIONS = {
    "INVALID_VALUE": "This indicates that one or more of the parameters passed to the API call is not within an "
    "acceptable range of values.",
    "OUT_OF_MEMORY": "The API call failed because it was unable to allocate enough memory or other resources to "
    "perform the requested operation.",
    "DEVICE_UNAVAILABLE": "This indicates that requested CUDA device is unavailable at the current time. Devices are "
    "often unavailable due to use of CU_COMPUTEMODE_EXCLUSIVE_PROCESS or CU_COMPUTEMODE_PROHIBITED.",
    "NO_DEVICE": "This indicates that no CUDA-capable devices were detected by the installed CUDA driver.",
    "INVALID_HANDLE": "This indicates that a resource handle passed to the API call was not valid. Resource handles "
    "are opaque types like CUstream and CUevent.",
    "ILLEGAL_STATE": "This indicates that a resource required by the API call is not in a valid state to perform the "
    "requested operation.",
    "ILLEGAL_ADDRESS": "While executing a kernel, the device encountered a load or store instruction on an invalid "
    "memory address. This leaves the process in an inconsistent state and any further CUDA work will return the same "
    "error. To continue using CUDA, the process must be terminated and relaunched.",
    "LAUNCH_FAILED": "An exception occurred on the device while executing a kernel. This leaves the process in an "
    "inconsistent state and any further CUDA work will return the same error. To continue using CUDA, the process must "
    "be terminated and relaunched.",
    "STREAM_CAPTURE_UNSUPPORTED": "This error indicates that the operation is not permitted when the stream is "
    "capturing.",
    "STREAM_CAPTURE_INVALIDATED": "This error indicates that the current capture sequence on the stream has been "
    "invalidated due to a previous error.",
    "STREAM_CAPTURE_ISOLATION": "This error indicates that a dependency would have been created which crosses the "
    "capture sequence boundary. Only implicit in-stream ordering dependencies are allowed to cross the boundary.",
    "STREAM_CAPTURE_WRONG_THREAD": "A stream capture sequence not initiated with the CU_STREAM_CAPTURE_MODE_RELAXED "
    "argument to cuStreamBeginCapture was passed to cuStreamEndCapture in a different thread.",
    "CAPTURED_EVENT": "This error indicates that the operation is not permitted on an event which was last recorded in "
    "a capturing stream.",
}


class RuleBroken(AssertionError):
    """Product code did what CUDA or an engine library does not allow."""


class CUDAError(Exception):
    """What cuda.core raises for an error of the driver."""


def cuda_error(name: str) -> CUDAError:
    """The error of that name, worded as cuda.core words it."""
    explanation = EXPLANATIONS.get(name.removeprefix("CUDA_ERROR_"))
    return CUDAError(f"{name}: {explanation}" if explanation else name)
