"""scikit-learn's 1,797 real 8x8 digits as training data."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ilf_trt.errors import MissingDependency
from ilf_trt.train.batch_stream import Batch, MemoryStream

CLASSES = 10
NULL_SHARE = 0.1


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The 1,797 digits: pixels (1797, 1, 8, 8) in [-1, 1], labels (1797,). Raises MissingDependency."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("scikit-learn is not installed; pip install 'ilf-trt[demo]'") from error
    data = load_digits()
    return (data.images[:, None] / 8 - 1).astype(np.float32), data.target.astype(np.int64)


def digits_stream(*, global_batch: int, seed: int) -> MemoryStream:
    """The stream of the digits for training, with their class labels."""
    pixels, labels = (torch.from_numpy(array) for array in digits())
    return MemoryStream(Batch(pixels, {"class_labels": labels}), global_batch=global_batch, seed=seed)


def digit_batches(size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of random digits for the base; a tenth of the labels is the null class."""
    pixels, targets = (torch.from_numpy(array) for array in digits())
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(0, len(pixels), (size,), generator=generator)
        drop_mask = torch.rand(size, generator=generator) < NULL_SHARE
        labels = torch.where(drop_mask, CLASSES, targets[rows])
        yield Batch(pixels[rows], {"class_labels": labels})
