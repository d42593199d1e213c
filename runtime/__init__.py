"""Serves a bundle without PyTorch: numpy, an engine library, nothing else."""

from .noise import NoiseSource
from .pipeline import Pipeline
from .result import Result
from .session import Timings

__all__ = ["NoiseSource", "Pipeline", "Result", "Timings"]
