"""A held file: opened once, checked, and then read through the same descriptor, whatever happens to its name.

A file that is replaced by renaming leaves the old content to whoever holds it. One that is written over in place is
noticed at the next reading.
"""

import errno
import hashlib
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO
from weakref import finalize

from ilf_trt.errors import BundleError, one_line
from ilf_trt.files import copy_open_file, open_regular

SPARSE_FROM = 1 << 26
LEAST_FILLED = 1 / 64
MOST_HOLES = 4096
Stamp = tuple[int, int, int]


class HeldFile:
    """One regular file of `size_bytes`, open for reading; it is closed when nobody holds it any more."""

    def __init__(self, path: Path, *, sha256: str, size_bytes: int, check_hash: bool = True) -> None:
        """Open `path` and hold it against what it must be; raises BundleError."""
        self.path, self.sha256, self.size_bytes = path, sha256, size_bytes
        try:
            with open_regular(path) as file:
                self._handle = os.dup(file.fileno())
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing; copy the whole bundle again, or build it again") from error
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({one_line(error)}); copy the bundle again") from error
        finalize(self, os.close, self._handle)
        self._stamp = self._stamp_now()
        if self._stamp[0] != size_bytes:
            raise BundleError(
                f"{path} has {self._stamp[0]} bytes, the manifest says {size_bytes}; copy the bundle again"
            )
        if size_bytes >= SPARSE_FROM and _filled_bytes(self._handle, size_bytes) < size_bytes * LEAST_FILLED:
            raise BundleError(f"{path} of {size_bytes} bytes is almost all holes; copy the bundle again")
        if check_hash:
            self._check_hash()

    def read(self) -> bytes:
        """The whole content; raises BundleError if it was written over since it was checked."""
        with self.open() as file:
            return file.read(self.size_bytes)

    def map(self) -> mmap | bytes:
        """The content, mapped; raises BundleError if it was written over since it was checked.

        Copy what you need of it and let it go: a mapped file that is cut short ends the process.
        """
        self._check_unchanged()
        return mmap(self._handle, self.size_bytes, access=ACCESS_READ) if self.size_bytes else b""

    def open(self) -> BinaryIO:
        """A file object of its own at the start of the content; raises BundleError if it was written over."""
        self._check_unchanged()
        return Path(f"/proc/self/fd/{self._handle}").open("rb")  # a duplicate would share its offset with other threads

    def copy(self, place: Path) -> None:
        """Write the content to the new file `place`; raises BundleError, OSError."""
        place.touch(exist_ok=False)
        with self.open() as file:
            copy_open_file(file, place)
        if place.stat().st_size != self.size_bytes:
            raise OSError(errno.EIO, "the source ended early", str(place))

    def _check_unchanged(self) -> None:
        stamp = self._stamp_now()
        if stamp != self._stamp:  # also when the file was only renamed or touched: its content decides
            if stamp[0] != self.size_bytes:
                raise self._changed()
            self._check_hash()
            self._stamp = stamp

    def _check_hash(self) -> None:
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(self._handle, 1 << 20, offset):
            digest.update(block)
            offset += len(block)
        found = digest.hexdigest()
        if found != self.sha256:
            raise BundleError(
                f"{self.path} has sha256 {found[:12]}…, the manifest says {self.sha256[:12]}…; copy the bundle again"
            )

    def _changed(self) -> BundleError:
        return BundleError(
            f"{self.path} was written over while it was in use; put another bundle in place by renaming, then load it"
        )

    def _stamp_now(self) -> Stamp:
        facts = os.fstat(self._handle)
        return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _filled_bytes(handle: int, size_bytes: int) -> int:
    """Bytes of a file that lie on the disk, as far as the first holes tell."""
    filled = offset = 0
    for _ in range(MOST_HOLES):
        try:
            begin = os.lseek(handle, offset, os.SEEK_DATA)
            offset = os.lseek(handle, begin, os.SEEK_HOLE)
        except OSError as error:
            return filled if error.errno == errno.ENXIO else size_bytes
        filled += offset - begin
        if offset >= size_bytes:
            return filled
    return filled
