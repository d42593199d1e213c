"""The trainable part of an ILF model: one block of the backbone's design and a scale for each loop block."""

import torch
from torch import nn


class Feedback(nn.Module):
    """`block` predicts what later times add to the loop; `scales` (m,) weigh it for each loop block, from zero."""

    def __init__(self, block: nn.Module, loop_size: int) -> None:
        super().__init__()
        self.block = block
        device = next(block.parameters()).device
        self.scales = nn.Parameter(torch.zeros(loop_size, device=device))
