"""A PNG of a stranger: its chunks are read with bounds before any of it is inflated, and only its pixels after that."""

import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from struct import Struct
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ilf_trt.errors import InvalidRequest, one_line, shown
from ilf_trt.files import read_bytes

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "ilf-trt"
MOST_BYTES = 1 << 28
MOST_PIXELS = 1 << 26  # below Pillow's own limit, so that it has nothing to warn of
MOST_RECORD_BYTES = 1 << 20
MOST_CHUNKS = 1 << 16
CHANNELS = {0: 1, 2: 3}  # by colour type: grey, RGB
PLAIN = (8, 0, 0, 0)  # bits, compression, filter, interlace

HEADER = Struct(">IIBBBBB")
LENGTH_AND_KIND, CHECKSUM = Struct(">I4s"), Struct(">I")
TEXT_KINDS = (b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True, slots=True)
class PngFile:
    """The size and channels of a picture, its record, and its pixels, still packed: zlib of the rows."""

    path: Path
    height: int
    width: int
    channels: int
    record: bytes
    packed: bytes

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InvalidRequest for a file that is no PNG as `generate` writes it, or that has no record."""
        try:
            content = read_bytes(path, most=MOST_BYTES)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{path} cannot be read ({one_line(error)}); give a PNG of generate") from error
        try:
            return cls._of(path, content)
        except _BrokenPng as error:
            raise InvalidRequest(f"{path} {error}; give a PNG as ilf-trt generate wrote it") from error

    @classmethod
    def _of(cls, path: Path, content: bytes) -> Self:
        header, packed, record, begin = b"", [], None, f"{KEYWORD}\0".encode()
        for index, (kind, body) in enumerate(_chunks(content)):
            if (index == 0) != (kind == b"IHDR"):
                raise _BrokenPng("does not begin with one header")
            if kind == b"IHDR":
                header = bytes(body)
            elif kind == b"IDAT":
                packed.append(body)
            elif kind in TEXT_KINDS and body[: len(begin)] == begin:
                if kind != b"tEXt":
                    raise _BrokenPng(f"has its record in a chunk {kind.decode()}, expected tEXt, never compressed")
                if record is not None:
                    raise _BrokenPng("has two records")
                if len(body) > len(begin) + MOST_RECORD_BYTES:
                    raise _BrokenPng(f"has a record of {len(body)} bytes, at most {MOST_RECORD_BYTES} are read")
                record = bytes(body[len(begin) :])
        height, width, channels = _sides(header)
        if record is None:
            raise _BrokenPng("has no record of what made it: --no-metadata, or another program, left it out")
        return cls(path, height, width, channels, record, b"".join(packed))

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 (H, W, C); raises InvalidRequest if the packed rows are damaged."""
        from PIL import Image

        colour = next(kind for kind, channels in CHANNELS.items() if channels == self.channels)
        header = HEADER.pack(self.width, self.height, PLAIN[0], colour, *PLAIN[1:])
        plain = SIGNATURE + b"".join(
            _chunk(kind, body) for kind, body in ((b"IHDR", header), (b"IDAT", self.packed), (b"IEND", b""))
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with Image.open(BytesIO(plain), formats=("PNG",)) as image:
                    pixels = np.array(image, np.uint8)
        except Exception as error:  # Pillow's for damaged data are of many kinds
            reason = one_line(error)
            raise InvalidRequest(f"{self.path} has damaged pixels ({reason}); copy the picture again") from error
        return pixels.reshape(self.height, self.width, self.channels)


class _BrokenPng(ValueError):
    """What is wrong with a PNG, without its path."""


def _chunks(content: bytes) -> list[tuple[bytes, memoryview]]:
    """The kind and the body of every chunk up to the end, each with a checksum that fits."""
    if not content.startswith(SIGNATURE):
        raise _BrokenPng("is no PNG")
    view, place = memoryview(content), len(SIGNATURE)
    chunks: list[tuple[bytes, memoryview]] = []
    while not chunks or chunks[-1][0] != b"IEND":
        if len(view) - place < LENGTH_AND_KIND.size + CHECKSUM.size:
            raise _BrokenPng("ends early")
        if len(chunks) >= MOST_CHUNKS:
            raise _BrokenPng(f"has more than {MOST_CHUNKS} chunks")
        length, kind = LENGTH_AND_KIND.unpack_from(view, place)
        begin = place + LENGTH_AND_KIND.size
        place = begin + length + CHECKSUM.size
        if place > len(view):
            raise _BrokenPng("ends early")
        (checksum,) = CHECKSUM.unpack_from(view, begin + length)
        if zlib.crc32(view[begin - len(kind) : begin + length]) != checksum:
            raise _BrokenPng(f"is damaged: its chunk {shown(repr(kind)[1:], 20)} has another checksum")
        chunks.append((kind, view[begin : begin + length]))
    return chunks


def _sides(header: bytes) -> tuple[int, int, int]:
    """Height, width and channels."""
    if len(header) != HEADER.size:
        raise _BrokenPng("has a header of another length")
    width, height, bits, colour, *rest = HEADER.unpack(header)
    if colour not in CHANNELS or (bits, *rest) != PLAIN:
        raise _BrokenPng("was converted: it is not 8-bit grey or RGB, in rows from top to bottom")
    if not 0 < width * height <= MOST_PIXELS:
        raise _BrokenPng(f"has {width} x {height} pixels, expected 1 to {MOST_PIXELS} in all")
    return height, width, CHANNELS[colour]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return LENGTH_AND_KIND.pack(len(body), kind) + body + CHECKSUM.pack(zlib.crc32(body, zlib.crc32(kind)))
