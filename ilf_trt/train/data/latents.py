"""Prepared data as a source: latents with labels or embedded text, read from safetensors shards on the disk."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ilf_trt.contract.ports import Role
from ilf_trt.errors import BrokenSample, DataError, InvalidRequest, one_line
from ilf_trt.files import is_folder

from .index import KEYS, NULL_FILE, Index, ShardFacts
from .sample import Condition, Sample

TENSORS = {Condition.LABEL: ("x0", "size", "label"), Condition.TEXT: ("x0", "size", "text", "text_mask")}


@dataclass(frozen=True, slots=True)
class Shard:
    """An open shard: slices of the file by tensor name, and the keys of its rows."""

    slices: dict[str, Any]
    keys: list[str]


class LatentShards:
    """The samples of a folder that `ilf-trt prepare` wrote. The first read of a shard maps its file into memory.

    Raises InvalidRequest if the folder is missing. Raises DataError if the folder is not complete, or if a shard is
    missing or of another size than in the index. `verify` also checks every sha256, which reads all shards once.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        if not is_folder(self.folder):
            raise InvalidRequest(f"{folder} is not a folder; give a folder that `ilf-trt prepare` wrote")
        index = Index.read(self.folder)
        if not index.complete:
            raise DataError(
                f"{folder} is not complete: it has {len(index.shards)} shards so far; run the same `ilf-trt prepare` "
                "again to resume"
            )
        for facts in (*index.shards, *([index.null] if index.null else ())):
            facts.check(self.folder, hashed=verify)
        self.index, self.condition, self.classes, self.shape = index, index.condition, index.classes, index.shape
        self._ends = list(accumulate(facts.rows for facts in index.shards))
        self._shards: dict[int, Shard] = {}
        self._lock = Lock()
        self.null = self._null()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, index: int) -> str:
        number, row = self._place(index)
        return self._shard(number).keys[row]

    def read(self, index: int) -> Sample:
        number, row = self._place(index)
        shard = self._shard(number)
        key = shard.keys[row]
        with _shard_errors(self.folder / self.index.shards[number].file):
            values = {name: tensor[row : row + 1][0] for name, tensor in shard.slices.items()}
        for name in ("x0", "text"):
            if name in values and not bool(torch.isfinite(values[name]).all()):
                raise BrokenSample(key, f"its {name} is not finite")
        height, width = values["size"].tolist()
        x0 = values["x0"].float()
        if self.condition is Condition.LABEL:
            return Sample(key, x0, (height, width), label=int(values["label"]))
        return Sample(key, x0, (height, width), text=values["text"], text_mask=values["text_mask"])

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the shard, and the row in it."""
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _shard(self, number: int) -> Shard:
        with self._lock:
            if number not in self._shards:
                self._shards[number] = self._open(self.index.shards[number])
            return self._shards[number]

    def _open(self, facts: ShardFacts) -> Shard:
        path = self.folder / facts.file
        with _shard_errors(path):
            file: Any = safe_open(path, framework="pt")
            slices = {name: file.get_slice(name) for name in TENSORS[self.condition]}
            keys = msgspec.json.decode(file.metadata()[KEYS], type=list[str])
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        if len(keys) != facts.rows or any(shape[0] != facts.rows for shape in shapes.values()):
            raise DataError(f"shard {path} holds {shapes}, expected {facts.rows} rows; prepare or copy it again")
        if shapes["x0"][1:] != self.shape:
            raise DataError(f"shard {path} holds x0 {shapes['x0'][1:]}, the index says {self.shape}; prepare it again")
        return Shard(slices, keys)

    def _null(self) -> Mapping[Role, Tensor] | None:
        if self.index.null is None:
            return None
        with _shard_errors(self.folder / NULL_FILE), safe_open(self.folder / NULL_FILE, framework="pt") as file:
            return {
                Role.TEXT: file.get_tensor("text"),
                Role.MASK: file.get_tensor("text_mask").float(),
            }


@contextmanager
def _shard_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors refuses into a DataError that names the shard."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"shard {path} is damaged ({one_line(error)}); copy it again, or run `ilf-trt prepare` again"
        ) from error
