"""Turns the errors of CUDA and of the engine libraries into errors of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

from ilf_trt.contract.driver import driver_advice
from ilf_trt.errors import DeviceError, DeviceLost, IlfError, OutOfMemory, one_line

NAME_CHARS = 100  # enough for the name of an error; its explanation would push the advice out of the message
FULL = ("CUDA_ERROR_OUT_OF_MEMORY", "OutOfMemory", "out of memory", "Out of memory")
STICKY = (
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
)


@contextmanager
def translate_errors(what: str, hint: str = "") -> Iterator[None]:
    """Turn a foreign exception of the block into OutOfMemory, DeviceLost or DeviceError."""
    try:
        yield
    except IlfError:
        raise
    except Exception as error:
        raise device_error(what, error, hint) from error


def device_error(what: str, error: BaseException | str, hint: str = "") -> DeviceError:
    """The error of this package for one of CUDA or an engine library, by the error name in its text."""
    reason = one_line(error)
    text = str(error) or reason
    if any(words in text for words in FULL):
        return OutOfMemory(
            f"{what}: GPU memory is full ({reason}); free some, pass fewer pictures or sessions, or close a pipeline"
        )
    if any(name in text for name in STICKY):
        return DeviceLost(f"{what}: {reason}; CUDA is unusable in this process from now on; start it again")
    if "DEVICE_UNAVAILABLE" in text:
        hint = "another process holds the GPU: end it, or set the GPU's compute mode to default"
    if advice := driver_advice(text):
        return DeviceError(f"{what}: {one_line(error, NAME_CHARS)}; {advice}")
    return DeviceError(f"{what}: {reason}" + (f"; {hint}" if hint else ""))
