"""The index of prepared data: what was made from what, and the shards with their hashes."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ilf_trt.contract.bundle import sha256_of
from ilf_trt.errors import DataError
from ilf_trt.train.data.sample import Condition

SCHEMA = 1
INDEX_FILE = "index.json"
NULL_FILE = "null.safetensors"
KEYS = "keys"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard: its file, rows, bytes and hash, and its samples that were left out, reason by key."""

    file: str
    rows: int
    size_bytes: int
    sha256: str
    broken: Mapping[str, str] = field(default_factory=dict)

    def check(self, folder: Path, *, hashed: bool = False) -> None:
        """Raises DataError when the file is missing, of another size, or with `hashed` of another content."""
        path = folder / self.file
        if not path.is_file():
            raise DataError(f"shard {path} is missing; copy it there, or run `ilf-trt prepare` again")
        found = path.stat().st_size
        if found != self.size_bytes:
            raise DataError(
                f"shard {path} is damaged: {found} bytes, expected {self.size_bytes}; remove it and run "
                "`ilf-trt prepare` again, or copy it again"
            )
        if hashed and sha256_of(path) != self.sha256:
            raise DataError(
                f"shard {path} is damaged: its sha256 is not that of the index; remove it and run `ilf-trt prepare` "
                "again, or copy it again"
            )


@dataclass(frozen=True, slots=True)
class Index:
    """`settings` decide what the shards hold; `shape` is (C, H, W) of x0; `shards` are those that are written."""

    settings: Mapping[str, Any]
    condition: Condition
    classes: int | None = None
    shape: tuple[int, int, int] = (0, 0, 0)
    shards: tuple[ShardFacts, ...] = ()
    null: ShardFacts | None = None
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises DataError."""
        path = folder / INDEX_FILE
        try:
            table = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise DataError(f"{folder} is not prepared data: {INDEX_FILE} is missing; run `ilf-trt prepare`") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not readable JSON: {error}; run `ilf-trt prepare` anew") from error
        try:
            if table["schema"] != SCHEMA:
                raise DataError(f"{path}: schema {table['schema']!r}, this version reads {SCHEMA}; upgrade ilf-trt")
            channels, height, width = (int(length) for length in table["shape"])
            return cls(
                settings=dict(table["settings"]),
                condition=Condition(table["condition"]),
                classes=None if table["classes"] is None else int(table["classes"]),
                shape=(channels, height, width),
                shards=tuple(ShardFacts(**facts) for facts in table["shards"]),
                null=None if table["null"] is None else ShardFacts(**table["null"]),
                complete=bool(table["complete"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: field missing or of the wrong type ({error!r}); prepare the data anew") from error

    def write(self, folder: Path) -> None:
        """Takes the place of the old one in one step; raises DataError."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"
        _write(folder / INDEX_FILE, lambda draft: draft.write_text(text))

    @property
    def broken(self) -> dict[str, str]:
        """Why each sample that was left out could not be read."""
        return {key: reason for shard in self.shards for key, reason in shard.broken.items()}


def write_shard(
    path: Path, tensors: dict[str, Tensor], *, keys: list[str], broken: Mapping[str, str] | None = None
) -> ShardFacts:
    """Write tensors with a first dimension of rows, whole or not at all; raises DataError."""
    _write(path, lambda draft: save_file(tensors, draft, metadata={KEYS: json.dumps(keys)}))
    return ShardFacts(path.name, len(keys), path.stat().st_size, sha256_of(path), dict(broken or {}))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    draft = path.with_name(f".{path.name}.partial")
    try:
        try:
            draft.touch()
            mode = draft.stat().st_mode
            write(draft)
            draft.chmod(mode)  # safetensors lets nobody but the owner read
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DataError(
            f"cannot write {path}: {reason}; make room or choose another --output; the same command goes on"
        ) from error
