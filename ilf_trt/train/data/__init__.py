"""Training data: maps from an index to a sample, and the feed that a recipe's `[data]` table opens over one."""

from ilf_trt.train.data.table import fitted, open_feed

__all__ = ["fitted", "open_feed"]
