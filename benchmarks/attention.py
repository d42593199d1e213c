"""Attention over few tokens on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def attention_on(device: str) -> Iterator[None]:
    """On a CPU as matrix products, which the compiler can fuse; on a GPU nothing changes.

    Over 64 tokens PyTorch's fused kernel takes longer there, most of all backwards (torch 2.13.0, bfloat16).
    """
    if device != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
