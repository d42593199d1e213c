"""What `tensorrt` is to the worker on a machine without a GPU: TensorRT-RTX's builder, and an engine that only tells.

The tests put this folder's parent on the worker's PYTHONPATH. `TENSORRT_VERSION` says which version it plays.
"""

import json
import os
from pathlib import Path

import tensorrt_rtx
from tensorrt_rtx import *  # noqa: F403

from ilf_trt.engines.listing import kernels_of_plan

__version__ = os.environ.get("TENSORRT_VERSION", "11.4.0.106")
del ComputeCapability  # noqa: F821  TensorRT-RTX's alone

UNKNOWN = "N/A due to dynamic shapes"
FORMATS = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "fp8": "FP8"}
LAYER_TYPES = {"matmul": "gemm", "convolution": "CaskConvolution"}
SCRATCH_BYTES = 4096


class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return Config(config)

    def build_serialized_network(self, network, config):
        return super().build_serialized_network(network, config.real)


class Config:
    """A real configuration that notes the timings it is given, in the file of `TENSORRT_NOTES`."""

    def __init__(self, real):
        object.__setattr__(self, "real", real)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __setattr__(self, name, value):
        setattr(self.real, name, value)

    def create_timing_cache(self, timings):
        if "TENSORRT_NOTES" in os.environ:
            with Path(os.environ["TENSORRT_NOTES"]).open("a") as notes:
                notes.write(f"{len(timings)}\n")
        return self.real.create_timing_cache(timings)


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return None if os.environ.get("TENSORRT_LOADS_NOTHING") else Engine(bytes(plan))


class Engine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, plan):
        self.plan = plan

    def create_execution_context(self, strategy):
        assert strategy == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context()

    def create_engine_inspector(self):
        return Inspector(self.plan)


class Context:
    def __init__(self):
        self.shapes = {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True


class Inspector:
    """Tells types only when shapes are set, as TensorRT's does for an engine whose shapes vary."""

    def __init__(self, plan):
        self.plan = plan
        self.execution_context = None

    def get_engine_information(self, form):
        assert form == tensorrt_rtx.LayerInformationFormat.JSON
        if os.environ.get("TENSORRT_TELLS_NOTHING"):
            return ""
        return json.dumps({"Layers": [self._layer(kernel) for kernel in kernels_of_plan(self.plan)], "Bindings": []})

    def _layer(self, kernel):
        varies = b'dims={ "' in self.plan
        known = not varies or (self.execution_context is not None and self.execution_context.shapes)
        inputs = [
            {"Name": kind, "Dimensions": [2, 16, 64], "Format/Datatype": FORMATS[kind] if known else UNKNOWN}
            for kind in kernel.precision.split("+")
            if kind
        ]
        return {
            "Name": f"{kernel.name}_myl0_1",
            "LayerType": LAYER_TYPES.get(kernel.kind, "kgen"),
            "Inputs": inputs,
            "Outputs": [],
            "TacticName": f"{kernel.name}_0x0" if kernel.kind in ("attention", "other") else "sm90_xmma",
            "StreamId": 0,
            "Metadata": "\x1f".join(f"[ONNX Layer: {name}]" for name in kernel.layers),
        }
