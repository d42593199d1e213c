"""safetensors files of others: a bounded header, then tensors of the wanted names and shapes, of the wanted digest."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ilf_trt.contract.document import DocumentError, as_type, parse_json
from ilf_trt.errors import CheckpointError, one_line, shown
from ilf_trt.files import open_regular, whole_file

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 1 << 24
MOST_TENSORS = 1 << 14
WIDEST = 8
METADATA = "__metadata__"
NAME_CHARS = 80
FLOATS = ("F64", "F32", "F16", "BF16")

Length = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a header says of one tensor: its dtype as safetensors writes it, such as `F32`, its shape and its bytes."""

    dtype: str
    shape: tuple[Length, ...]
    data_offsets: tuple[Length, Length]


def read_header(path: Path) -> dict[str, TensorFacts]:
    """The tensors of a file by name, as its header has them; none is read.

    Raises OSError, also for a pipe, and DocumentError, also for a tensor that the file is too short for.
    """
    with open_regular(path) as file:
        return _header(file, os.fstat(file.fileno()).st_size)


def read_tensors(
    path: Path, wanted: Mapping[str, tuple[int, ...]], *, sha256: str | None, advice: str
) -> dict[str, Tensor]:
    """The tensors of a file, which have the `wanted` names and shapes and are floating-point numbers.

    `sha256` is that of the whole file, None if nobody wrote it down. Raises CheckpointError, which ends with `advice`
    if the file is missing or damaged.
    """
    most = LENGTH_BYTES + MOST_HEADER_BYTES + WIDEST * sum(map(prod, wanted.values()))
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > most:
                raise CheckpointError(
                    f"{path} has {size_bytes} bytes, the wanted tensors have at most {most}; it belongs to another "
                    "loop or backbone"
                )
            data = file.read(most)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(f"{path} is damaged or cut short (its sha256 is not {sha256[:12]}…); {advice}")
        _check_tensors(path, _header(BytesIO(data), len(data)), wanted)
        return load(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {advice}") from error
    except (OSError, DocumentError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({one_line(error)}); {advice}") from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write a file whole or not at all, and return its sha256. Raises OSError."""
    data = save(tensors)
    with whole_file(path) as draft:
        draft.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _header(file: BinaryIO, size_bytes: int) -> dict[str, TensorFacts]:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if not 2 <= length <= MOST_HEADER_BYTES:
        raise DocumentError(f"its header claims {length} bytes")
    table = parse_json(file.read(length))
    table.pop(METADATA, None)
    if len(table) > MOST_TENSORS:
        raise DocumentError(f"it claims {len(table)} tensors, at most {MOST_TENSORS} are read")
    tensors = {}
    for name, entry in table.items():
        tensors[name] = facts = as_type(entry if isinstance(entry, dict) else {}, TensorFacts)
        if facts.data_offsets[1] > size_bytes - LENGTH_BYTES - length:
            raise DocumentError(f"{shown(name, NAME_CHARS)} does not fit in it")
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, TensorFacts], wanted: Mapping[str, tuple[int, ...]]) -> None:
    got = {name: facts.shape for name, facts in tensors.items()}
    if got != wanted:
        name = min(set(got.items()) ^ set(wanted.items()))[0]
        raise CheckpointError(
            f"{path}: {name} is {got.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}; "
            "it belongs to another loop or backbone"
        )
    for name, facts in tensors.items():
        if facts.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name} holds {facts.dtype}, expected one of {', '.join(FLOATS)}")
