"""The index of prepared data: the settings that decide its content, and the shards with their hashes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ilf_trt.contract.bundle import sha256_of
from ilf_trt.contract.document import Count, DocumentError, Size, as_type, read_json
from ilf_trt.contract.stamp import Sha256
from ilf_trt.errors import DataError, one_line, told
from ilf_trt.files import whole_file

from .sample import Condition

SCHEMA = 1
INDEX_FILE = "index.json"
NULL_FILE = "null.safetensors"
KEYS = "keys"
MOST_INDEX_BYTES = 1 << 28
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard: its file, rows, bytes and hash, and the keys of its broken samples with their reasons."""

    file: Annotated[str, msgspec.Meta(pattern=r"^[\w-][\w.-]{0,200}$")]
    rows: Count
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
    sha256: Sha256
    broken: Mapping[str, str] = field(default_factory=dict)

    def check(self, folder: Path, *, hashed: bool = False) -> None:
        """Raises DataError for a file that is missing or of another size, and with `hashed` of another sha256."""
        path = folder / self.file
        if not path.is_file():
            raise DataError(f"shard {path} is missing; copy it there, or run `ilf-trt prepare` again")
        size_bytes = path.stat().st_size
        if size_bytes != self.size_bytes:
            raise DataError(
                f"shard {path} is damaged: {size_bytes} bytes, expected {self.size_bytes}; remove it and run "
                "`ilf-trt prepare` again, or copy it again"
            )
        if hashed and sha256_of(path) != self.sha256:
            raise DataError(
                f"shard {path} is damaged: its sha256 is not that of the index; remove it and run `ilf-trt prepare` "
                "again, or copy it again"
            )


@dataclass(frozen=True, slots=True)
class Index:
    """`settings` decide the content of the shards, `shape` is (C, H, W) of x0, `shards` lists those that are whole."""

    settings: Mapping[str, Any]
    condition: Condition
    classes: Size | None = None
    shape: tuple[Count, Count, Count] = (0, 0, 0)
    shards: tuple[ShardFacts, ...] = ()
    null: ShardFacts | None = None
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Read the index of a folder; raises DataError."""
        path = folder / INDEX_FILE
        if not os.path.lexists(path):
            raise DataError(f"{folder} is not prepared data: {INDEX_FILE} is missing; run `ilf-trt prepare`")
        try:
            table = read_json(path, most=MOST_INDEX_BYTES)
            schema = table.pop("schema", None)
            if type(schema) is not int or schema != SCHEMA:
                what = told(schema)
                raise DataError(f"{path}: schema {what}, this version reads {SCHEMA}; upgrade ilf-trt")
            return as_type(table, cls)
        except DocumentError as error:
            raise DataError(f"{path} {error.reason}; run `ilf-trt prepare` again") from error

    def write(self, folder: Path) -> None:
        """Replace the index of a folder in one step; raises DataError."""
        with _whole_data_file(folder / INDEX_FILE) as draft:
            draft.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @property
    def broken(self) -> dict[str, str]:
        """The keys of all broken samples with their reasons."""
        return {key: reason for shard in self.shards for key, reason in shard.broken.items()}


def write_shard(
    path: Path, tensors: dict[str, Tensor], *, keys: list[str], broken: Mapping[str, str] | None = None
) -> ShardFacts:
    """Write tensors, whose first dimension is rows, whole or not at all; raises DataError."""
    with _whole_data_file(path) as draft:
        save_file(tensors, draft, metadata={KEYS: json.dumps(keys)})
    return ShardFacts(path.name, len(keys), path.stat().st_size, sha256_of(path), dict(broken or {}))


@contextmanager
def _whole_data_file(path: Path) -> Iterator[Path]:
    """`whole_file` that turns what the disk refuses into a DataError."""
    try:
        with whole_file(path) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"cannot write {path}: {one_line(error)}; make room or choose another --output, then run the same command "
            "again to resume"
        ) from error
