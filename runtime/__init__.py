"""Serves a bundle without PyTorch: numpy, an engine library, nothing else."""

from ilf_trt.runtime.pipeline import Pipeline
from ilf_trt.runtime.result import Result
from ilf_trt.runtime.start_noise import NoiseSource
from ilf_trt.runtime.timings import Timings

__all__ = ["NoiseSource", "Pipeline", "Result", "Timings"]
