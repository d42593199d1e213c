"""The order in which training sees its rows: each epoch's own permutation, a pure function of the seed."""

import numpy as np
from numpy.typing import NDArray


class Order:
    """Rows 0 … `size` - 1, shuffled anew for every epoch; any place of the endless sequence is known at once."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def epochs(self, first: int, count: int) -> NDArray[np.int64]:
        """Epochs (count,) that the places `first` … belong to."""
        return np.arange(first, first + count) // self.size

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Rows (count,) at the places `first` … of the sequence of epochs."""
        places, epochs = np.arange(first, first + count), self.epochs(first, count)
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._order_of(int(epoch))[places[here] % self.size]
        return chosen

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._permutation = epoch, random.permutation(self.size)
        return self._permutation
