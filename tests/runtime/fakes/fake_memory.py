"""Memory of a GPU, in the host's: real addresses, guards around it, and who is about to use it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGNMENT = 256
GUARD_BYTES = 256
UNWRITTEN, FREED, GUARD = 0xFF, 0xDD, 0xA5  # 0xFF… is NaN in every float


class Allocation:
    """Some bytes at a real, aligned address; `readers` and `writers` are work (op, first byte, last) on streams."""

    def __init__(self, kind: str, device: int, size: int) -> None:
        self.kind, self.device, self.size = kind, device, size
        self._whole = np.full(size + 2 * GUARD_BYTES + ALIGNMENT, GUARD, np.uint8)
        first = self._whole.ctypes.data + GUARD_BYTES
        offset = GUARD_BYTES + -first % ALIGNMENT
        self.address = self._whole.ctypes.data + offset
        self.bytes = self._whole[offset : offset + size]
        self.bytes.fill(UNWRITTEN)
        self._guards = (self._whole[offset - GUARD_BYTES : offset], self._whole[offset + size :])
        self.closed = self.freed = False
        self.readers: list[tuple[Any, int, int]] = []
        self.writers: list[tuple[Any, int, int]] = []

    @property
    def intact(self) -> bool:
        return all((guard == GUARD).all() for guard in self._guards)

    def mend(self) -> None:
        """Guards as new, so that a breach is told once."""
        for guard in self._guards:
            guard.fill(GUARD)

    def __str__(self) -> str:
        return f"{self.kind} of {self.size} bytes at {self.address:#x}"


@dataclass(frozen=True, slots=True)
class Span:
    """Part of an allocation, from byte `low` to `high`."""

    allocation: Allocation
    low: int
    high: int

    def overlaps(self, other: "Span") -> bool:
        return self.allocation is other.allocation and self.low < other.high and other.low < self.high
