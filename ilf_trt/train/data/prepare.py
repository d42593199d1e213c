"""Prepares data: encodes a source into shards of latents with labels or embedded text; a stopped run resumes."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ilf_trt.contract.progress import Progress, no_progress
from ilf_trt.errors import BrokenSample, DataError, InvalidRequest
from ilf_trt.files import sweep_folder
from ilf_trt.train.folder_lock import locked

from .broken import BrokenCount
from .index import DTYPES, INDEX_FILE, NULL_FILE, Index, write_shard
from .sample import Condition, Sample, Source


class PictureEncoder(Protocol):
    """Encodes pixels (B, 3, H, W) of the samples `indices` -> latents (B, C, h, w)."""

    def encode(self, pixels: Tensor, indices: Sequence[int]) -> Tensor: ...


class TextEncoder(Protocol):
    """Encodes B captions -> text (B, L, text channels) and mask (B, L)."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Preparation:
    """How to write shards. `settings` decide the values; `dtype` is that of the stored latents and texts."""

    settings: Mapping[str, Any]
    dtype: str
    shard_size: int
    batch: int
    max_broken: int
    workers: int = 2

    def check(self) -> None:
        """Raises InvalidRequest."""
        for name, value in {"shard-size": self.shard_size, "batch": self.batch, "workers": self.workers}.items():
            if value < 1:
                raise InvalidRequest(f"{name} is {value}, it must be at least 1")
        if self.max_broken < 0:
            raise InvalidRequest(f"max-broken is {self.max_broken}, it must be at least 0")


def prepare(
    source: Source,
    output: Path,
    preparation: Preparation,
    *,
    pictures: PictureEncoder | None,
    texts: TextEncoder | None,
    progress: Progress = no_progress,
) -> Index:
    """Write all of `source` into `output`, and return the index. Whole shards of an earlier run stay.

    `progress` counts samples. Raises InvalidRequest if an encoder is missing, or if `output` has other settings or
    other files; DataError if too many samples are broken or the disk is full.
    """
    preparation.check()
    captions = source.condition is Condition.CAPTION
    if captions and texts is None:
        raise InvalidRequest("the data has captions; give a text encoder with --text-encoder")
    if not captions and texts is not None:
        raise InvalidRequest("the data has labels and no captions; leave out --text-encoder")
    if pictures is None and texts is None:
        raise InvalidRequest("there is nothing to encode; give a VAE with --vae")
    output.mkdir(parents=True, exist_ok=True)
    with (
        locked(output, doing="prepares"),
        ThreadPoolExecutor(preparation.workers, thread_name_prefix="ilf-data") as pool,
    ):
        sweep_folder(output)
        return _Writer(source, output, preparation, pictures, texts, pool).run(progress)


def check_device(device: str) -> None:
    """Raises InvalidRequest if torch cannot use the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"device {device!r} cannot be used: {reason}; give cpu, or cuda:0") from error


class _Writer:
    """Writes the shards that are missing, then the index."""

    def __init__(
        self,
        source: Source,
        output: Path,
        preparation: Preparation,
        pictures: PictureEncoder | None,
        texts: TextEncoder | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.source, self.output, self.preparation, self.pool = source, output, preparation, pool
        self.pictures, self.texts = pictures, texts
        self.dtype = DTYPES[preparation.dtype]

    def run(self, progress: Progress) -> Index:
        index = self._open_index()
        self.broken = BrokenCount(self.preparation.max_broken, index.broken)
        if self.texts is not None:
            text, mask = self.texts.encode([""])
            tensors = {"text": text.to(self.dtype), "text_mask": mask.to(torch.uint8)}
            index = replace(index, null=write_shard(self.output / NULL_FILE, tensors, keys=[""]))
        total, size = len(self.source), self.preparation.shard_size
        for number, first in enumerate(range(0, total, size)):
            rows = range(first, min(first + size, total))
            progress("prepare", first, total)
            if number < len(index.shards):
                continue
            index = self._shard(index, number, rows, lambda done: progress("prepare", done, total))
            index.write(self.output)
        progress("prepare", total, total)
        if not sum(shard.rows for shard in index.shards):
            raise DataError(f"none of the {total} samples can be read: {self.broken.last()}; check these files")
        index = replace(index, complete=True)
        index.write(self.output)
        return index

    def _open_index(self) -> Index:
        """The index of an earlier run, up to its first damaged shard, or a new index."""
        names = hashlib.sha256()
        for row in range(len(self.source)):
            names.update(self.source.key(row).encode() + b"\0")
        settings = {
            **self.preparation.settings,
            "dtype": self.preparation.dtype,
            "shard_size": self.preparation.shard_size,
            "samples": len(self.source),
            "keys_sha256": names.hexdigest(),
        }
        condition = Condition.LABEL if self.texts is None else Condition.TEXT
        if not (self.output / INDEX_FILE).is_file():
            if any(not path.name.startswith(".") for path in self.output.iterdir()):
                raise InvalidRequest(f"{self.output} holds other files; give an empty folder as --output")
            index = Index(settings, condition, self.source.classes)
            index.write(self.output)
            return index
        index = Index.read(self.output)
        changes = [
            f"{name} was {index.settings.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted(settings.keys() | index.settings.keys())
            if settings.get(name) != index.settings.get(name)
        ]
        if changes:
            raise InvalidRequest(
                f"{self.output} was prepared with other settings: {'; '.join(changes)}; give another --output"
            )
        shards = []
        for facts in index.shards:
            try:
                facts.check(self.output)
            except DataError:
                break
            shards.append(facts)
        return replace(index, shards=tuple(shards), complete=False)

    def _shard(self, index: Index, number: int, rows: range, progress: Callable[[int], None]) -> Index:
        keys: list[str] = []
        broken: dict[str, str] = {}
        parts: dict[str, list[Tensor]] = {}
        for first in range(rows.start, rows.stop, self.preparation.batch):
            batch = range(first, min(first + self.preparation.batch, rows.stop))
            samples: list[tuple[int, Sample]] = []
            for row, sample in zip(batch, self.pool.map(self._read, batch), strict=True):
                if isinstance(sample, BrokenSample):
                    self._note(sample, broken)
                else:
                    samples.append((row, sample))
            for key, values in self._encode(samples, broken):
                keys.append(key)
                for name, value in values.items():
                    parts.setdefault(name, []).append(value)
            progress(batch.stop)
        tensors = {name: torch.stack(values) for name, values in parts.items()}
        facts = write_shard(self.output / f"shard-{number:05}.safetensors", tensors, keys=keys, broken=broken)
        shape = index.shape
        if keys:
            channels, height, width = tensors["x0"].shape[1:]
            shape = (channels, height, width)
        return replace(index, shape=shape, shards=(*index.shards, facts))

    def _read(self, row: int) -> Sample | BrokenSample:
        try:
            return self.source.read(row)
        except BrokenSample as error:
            return error

    def _encode(
        self, samples: Sequence[tuple[int, Sample]], broken: dict[str, str]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if not samples:
            return
        x0 = torch.stack([sample.x0 for _, sample in samples])
        if self.pictures is not None:
            x0 = self.pictures.encode(x0, [row for row, _ in samples])
        columns: dict[str, Any] = {"x0": x0.to(self.dtype)}
        if self.texts is None:
            columns["label"] = torch.tensor([sample.label for _, sample in samples])
        else:
            text, mask = self.texts.encode([sample.caption or "" for _, sample in samples])
            columns["text"], columns["text_mask"] = text.to(self.dtype), mask.to(torch.uint8)
        columns["size"] = torch.tensor([sample.size for _, sample in samples])
        for place, (_, sample) in enumerate(samples):
            values = {name: column[place].clone() for name, column in columns.items()}
            bad = [name for name in ("x0", "text") if name in values and not bool(values[name].isfinite().all())]
            if bad:
                reason = f"its {bad[0]} is not finite in {self.preparation.dtype}; try --dtype bf16"
                self._note(BrokenSample(sample.key, reason), broken)
            else:
                yield sample.key, values

    def _note(self, error: BrokenSample, broken: dict[str, str]) -> None:
        self.broken.add(error)
        broken[error.key] = error.reason
