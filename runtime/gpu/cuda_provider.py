"""Finds the CUDA provider of ONNX Runtime: built into the library, or a plug-in beside it."""

from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from threading import Lock
from typing import Any

from ilf_trt.contract.driver import extra_to_install
from ilf_trt.errors import EngineError, MissingDependency, one_line

BUILT_IN = "CUDAExecutionProvider"
PLUG_INS = (BUILT_IN, "CudaPluginExecutionProvider")  # the second is the name of the plug-in's first release
PLUG_IN_MODULE = "onnxruntime_ep_cuda"  # of Microsoft's onnxruntime-ep-cuda12 and onnxruntime-ep-cuda13

_once_a_process = Lock()


def use_cuda(onnxruntime: Any, options: Any, ordinal: int, settings: dict[str, str]) -> tuple[str, list[Any]]:
    """The name of the provider on GPU `ordinal`, and what the session takes as `providers`.

    The session's `options` get a plug-in's device; its `providers` are then empty, because ONNX Runtime ignores the
    options if it gets both. Raises MissingDependency if this ONNX Runtime has no CUDA, EngineError if its plug-in
    cannot be loaded or has no such GPU.
    """
    with redirect_stdout(StringIO()):  # it prints the missing libraries; the session reports them better
        onnxruntime.preload_dlls()
    if BUILT_IN in onnxruntime.get_available_providers():
        return BUILT_IN, [(BUILT_IN, {"device_id": str(ordinal), **settings}), "CPUExecutionProvider"]
    devices = _plug_in_devices(onnxruntime)
    device = next((one for one in devices if one.ep_options.get("device_id") == str(ordinal)), None)
    if device is None:
        raise EngineError(
            f"the CUDA plug-in of ONNX Runtime finds {len(devices)} GPUs and none with number {ordinal}; check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    options.add_provider_for_devices([device], settings)
    return device.ep_name, []


def _plug_in_devices(onnxruntime: Any) -> list[Any]:
    """The GPUs of the plug-in, registered if nobody else did; none if the plug-in finds no GPU."""
    with _once_a_process:
        devices = _registered_devices(onnxruntime)
        if devices:
            return devices
        try:
            plug_in = import_module(PLUG_IN_MODULE)
        except ImportError as error:
            raise MissingDependency(
                "this ONNX Runtime has no CUDA; run pip uninstall onnxruntime onnxruntime-gpu, then pip install "
                + extra_to_install("onnxruntime-cuda")
            ) from error
        try:
            onnxruntime.register_execution_provider_library(plug_in.get_ep_name(), plug_in.get_library_path())
        except Exception as error:
            if "already registered" not in str(error):
                raise EngineError(
                    f"ONNX Runtime could not load its CUDA plug-in: {one_line(error)}; install that library of CUDA, "
                    "and put its folder into LD_LIBRARY_PATH"
                ) from error
        return _registered_devices(onnxruntime)


def _registered_devices(onnxruntime: Any) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name in PLUG_INS]
