"""The scratch memory of a session: all graphs work in it, one after another."""

from ilf_trt.errors import OutOfMemory

from .cuda import Gpu, Memory, Stream


class Scratch:
    """One allocation on a stream, as large as the neediest work so far; it grows, and never shrinks.

    After it has grown, its address may be another one: whoever holds the address compares it before each use.
    """

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self._gpu = gpu
        self._stream = stream
        self._memory: Memory | None = None

    @property
    def address(self) -> int:
        """Where it lies on the GPU; 0 while nobody has needed any."""
        return 0 if self._memory is None else self._memory.address

    @property
    def size_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.size_bytes

    def reserve(self, size_bytes: int) -> None:
        """Have at least `size_bytes`; raises OutOfMemory, and keeps what it had if that can be had again.

        The smaller allocation goes first, so that both need not fit at once. The stream orders that after its work.
        """
        had = self.size_bytes
        if size_bytes <= had:
            return
        self.close()
        try:
            self._memory = self._gpu.allocate(size_bytes, self._stream)
        except OutOfMemory:
            if had:
                self._memory = self._gpu.allocate(had, self._stream)
            raise

    def close(self) -> None:
        """Free the memory, in the order of the stream."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
