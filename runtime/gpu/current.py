"""What lives on one GPU, and may be used from any thread: each entry makes that GPU current there, and goes back."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ilf_trt.errors import DeviceError

from .errors import translate_errors

if TYPE_CHECKING:
    from .cuda import Gpu

CALLED_BY_SYNTAX = ("__call__", "__dlpack__")
MAKE_CURRENT_THEMSELVES = ("use", "current", "close")


class OnGpu:
    """Base of what lives on one GPU, `_gpu`.

    CUDA keeps the current GPU per thread, and refuses most calls on a thread that has none or another one. Therefore
    every public method that a subclass defines makes the GPU current for its time, without a word in the method. What
    the thread had before, another GPU or none, it has again afterwards.
    """

    _gpu: "Gpu"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            public = not name.startswith("_") or name in CALLED_BY_SYNTAX
            if isinstance(method, FunctionType) and public and name not in MAKE_CURRENT_THEMSELVES:
                setattr(cls, name, _with_current_gpu(method))


class Allocated(OnGpu):
    """Base of what holds memory of a GPU until `close`; a subclass frees it in `_free`."""

    def close(self) -> None:
        """Free everything, after the work that still runs; a lost GPU has nothing left to free."""
        with suppress(DeviceError), translate_errors("the GPU could not be freed"), self._gpu.current():
            self._free()

    def _free(self) -> None:
        raise NotImplementedError


def _with_current_gpu(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entry(self: OnGpu, *args: Any, **options: Any) -> Any:
        with self._gpu.current():
            return method(self, *args, **options)

    return entry
