"""Training data: sources of samples, their preparation, and the batch stream of a recipe's `[data]` table."""

from .table import fit_stream, open_stream

__all__ = ["fit_stream", "open_stream"]
