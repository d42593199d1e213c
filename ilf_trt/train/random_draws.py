"""The random numbers of training: time, noise and dropout of each row, a pure function of seed, iteration and row.

Every row opens a counter-based generator (Philox), so training carries no generator state. A resumed training draws the
same numbers, and so does a batch that is split over processes and parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAINING, VALIDATION = 0, 1
BELOW_ONE = 1 - 2**-24  # a double closer to one is one in float32


@dataclass(frozen=True, slots=True)
class RandomDraws:
    """The random numbers of B rows.

    `time` (B,) counts from 0, `noise` (B, C, H, W) has unit variance, `drop_mask` (B,) says which rows lose their
    condition, and `share` (B,) in [0, 1) is for other draws of a loss.
    """

    time: Tensor
    noise: Tensor
    drop_mask: Tensor
    share: Tensor

    def part(self, rows: slice, device: torch.device) -> "RandomDraws":
        """The draws of some rows, on `device`."""
        tensors = (self.time, self.noise, self.drop_mask, self.share)
        return RandomDraws(*(tensor[rows].to(device, non_blocking=True) for tensor in tensors))


def draw_rows(
    seed: int,
    iteration: int,
    rows: range,
    latent: Sequence[int],
    *,
    times: int,
    dropout: float,
    purpose: int = TRAINING,
) -> RandomDraws:
    """Draw for the rows `rows` of the global batch; times are uniform over 0 … `times` - 1.

    `latent` is (C, H, W). `purpose` is TRAINING or VALIDATION; each has its own numbers.
    """
    noise = np.empty((len(rows), *latent), np.float32)
    time, drop_mask, share = np.empty(len(rows), np.int64), np.empty(len(rows), bool), np.empty(len(rows), np.float32)
    for index, row in enumerate(rows):
        counter = np.array([0, row, purpose, 0], np.uint64)  # the generator counts up in the low word
        random = np.random.Generator(np.random.Philox(key=np.array([seed, iteration], np.uint64), counter=counter))
        first, second, third = random.random(3)
        time[index], drop_mask[index], share[index] = int(first * times), second < dropout, min(third, BELOW_ONE)
        random.standard_normal(dtype=np.float32, out=noise[index])
    return RandomDraws(*(torch.from_numpy(array) for array in (time, noise, drop_mask, share)))
