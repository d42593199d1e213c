"""Serves a bundle without PyTorch: numpy, an engine library, nothing else."""

from .pipeline import Pipeline
from .result import Result
from .start_noise import NoiseSource
from .timings import Timings

__all__ = ["NoiseSource", "Pipeline", "Result", "Timings"]
