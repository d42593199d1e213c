"""The order of the rows in training: each epoch has its own permutation, a pure function of the seed."""

import numpy as np
from numpy.typing import NDArray


class Shuffle:
    """An endless sequence of the rows 0 … `size` - 1, with a new permutation in every epoch.

    Any position of the sequence is known without the positions before it.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def epochs(self, first: int, count: int) -> NDArray[np.int64]:
        """The epochs (count,) of the positions `first` … `first` + `count` - 1."""
        return np.arange(first, first + count) // self.size

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """The rows (count,) at the positions `first` … `first` + `count` - 1."""
        positions, epochs = np.arange(first, first + count), self.epochs(first, count)
        rows = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            rows[in_epoch] = self._permutation_of(int(epoch))[positions[in_epoch] % self.size]
        return rows

    def _permutation_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._permutation = epoch, random.permutation(self.size)
        return self._permutation
