"""What is random in training: each row's time, noise and dropped condition, a pure function of seed, iteration, row.

A counter-based generator (Philox) is opened anew for every row, so no state runs along: to resume, or to split a batch
over processes and parts, makes no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAINING, VALIDATION = 0, 1
BELOW_ONE = 1 - 2**-24  # a double closer to one is one in float32


@dataclass(frozen=True, slots=True)
class Draws:
    """time (B,) from 0 on, noise (B, C, H, W) of unit variance, dropped (B,) whether a row loses its condition.

    `share` (B,) in [0, 1) is for what else a loss draws.
    """

    time: Tensor
    noise: Tensor
    dropped: Tensor
    share: Tensor

    def part(self, rows: slice, device: torch.device) -> "Draws":
        """Some of the rows, on `device`."""
        return Draws(
            *(x[rows].to(device, non_blocking=True) for x in (self.time, self.noise, self.dropped, self.share))
        )


def draw(
    seed: int,
    iteration: int,
    rows: range,
    latent: Sequence[int],
    *,
    times: int,
    dropout: float,
    purpose: int = TRAINING,
) -> Draws:
    """The draws of rows `rows` of the global batch; times are uniform over `times`."""
    noise = np.empty((len(rows), *latent), np.float32)
    time, dropped, share = np.empty(len(rows), np.int64), np.empty(len(rows), bool), np.empty(len(rows), np.float32)
    for index, row in enumerate(rows):
        counter = np.array([0, row, purpose, 0], np.uint64)  # the low word counts up by itself
        random = np.random.Generator(np.random.Philox(key=np.array([seed, iteration], np.uint64), counter=counter))
        first, second, third = random.random(3)
        time[index], dropped[index], share[index] = int(first * times), second < dropout, min(third, BELOW_ONE)
        random.standard_normal(dtype=np.float32, out=noise[index])
    return Draws(*(torch.from_numpy(array) for array in (time, noise, dropped, share)))
