"""scikit-learn's 1,797 real 8x8 digits as training data."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ilf_trt.errors import MissingDependency
from ilf_trt.train.batch_stream import Batch, MemoryFeed

CLASSES = 10


NULL_SHARE = 0.1


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The 1,797 real digits: pixels (1797, 1, 8, 8) in [-1, 1] and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("scikit-learn is not installed; pip install 'ilf-trt[demo]'") from error
    data = load_digits()
    return (data.images[:, None] / 8 - 1).astype(np.float32), data.target.astype(np.int64)


def digits_feed(*, global_batch: int, seed: int) -> MemoryFeed:
    """The digits for training, with their labels as class labels."""
    pixels, targets = (torch.from_numpy(array) for array in digits())
    return MemoryFeed(Batch(pixels, {"class_labels": targets}), global_batch=global_batch, seed=seed)


def batches(size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of real digits with labels, a tenth of them the null class."""
    pixels, targets = (torch.from_numpy(array) for array in digits())
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(0, len(pixels), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < NULL_SHARE
        labels = torch.where(dropped, CLASSES, targets[chosen])
        yield Batch(pixels[chosen], {"class_labels": labels})
