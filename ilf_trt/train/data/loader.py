"""The loader: the batch stream of a source, in the order of the seed, read ahead by threads, without broken samples."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ilf_trt.contract.conditioning import Conditioning
from ilf_trt.contract.ports import Role
from ilf_trt.errors import BrokenSample, DataError, InvalidRequest
from ilf_trt.model.backbone import Backbone
from ilf_trt.train.batch_stream import Batch, StreamItem
from ilf_trt.train.shuffle import Shuffle

from .broken import BrokenCount
from .sample import Condition, Sample, Source

PIECE_ROWS = 16  # rows that a thread reads at once: reading one latent takes less time than passing it on
AHEAD_ROWS, AHEAD_MOST = 256, 4  # a batch of 2,048 embedded captions of 120 tokens takes 2 GB
PREPARE = "run `ilf-trt prepare --data-kind … --vae … --text-encoder …` and train on its output with data.kind=latents"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a row in the endless sequence: its epoch, and its index in the source."""

    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Row:
    """The sample for one place, None if no sample can be read, and the broken samples before it."""

    sample: Sample | None
    broken: tuple[BrokenSample, ...]


class Loader:
    """A `BatchStream` over a source. The next readable index replaces a broken sample, the same in every process.

    `workers` threads read some batches ahead; with 0, the caller's thread reads. More than `max_broken` distinct broken
    samples in this process raise DataError. `flip` mirrors about half of the pictures by the seed, another half in
    every epoch. `conditioning` is that of the base. Raises InvalidRequest for an empty source, and for
    captions that are not embedded.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch: int,
        seed: int,
        workers: int = 2,
        max_broken: int = 100,
        flip: bool = False,
        conditioning: Conditioning | None = None,
    ) -> None:
        if not len(source):
            raise InvalidRequest("the data holds no sample; give at least one")
        if source.condition is Condition.CAPTION:
            raise InvalidRequest(f"the data has captions as text, and training needs them embedded; {PREPARE}")
        self.source, self.global_batch, self.seed = source, global_batch, seed
        self.workers, self.flip = workers, flip
        self.conditioning = conditioning or _conditioning_of(source)
        self.classes = None if conditioning is None else conditioning.classes
        self.broken = BrokenCount(max_broken)
        self.shuffle = Shuffle(len(source), seed)

    @property
    def null(self) -> Mapping[str, Tensor] | None:
        null = self.source.null
        if null is None:
            return None
        return {port.name: null[port.role] for port in self.conditioning.positive if port.role in null}

    def for_base(self, adapter: Backbone) -> "Loader":
        """This loader for a base; raises InvalidRequest if its pictures, labels or text do not fit the base."""
        source, latent = self.source, adapter.latent
        if source.shape != latent:
            raise InvalidRequest(
                f"the data's pictures are {source.shape}, the base takes {latent} (channels, height, width); set "
                f"data.size and data.channels for pixels, or {PREPARE}"
            )
        conditioning, name = adapter.conditioning(1), adapter.model_class()
        classes, text = conditioning.classes, conditioning.port(Role.TEXT)
        if classes is not None:
            if source.condition is not Condition.LABEL:
                raise InvalidRequest(f"the data has text, {name} takes labels; give data with labels")
            if source.classes is not None and source.classes > classes:
                raise InvalidRequest(
                    f"the data has {source.classes} classes, the base knows {classes}; give the base's own classes"
                )
        elif source.condition is not Condition.TEXT:
            raise InvalidRequest(f"the data has labels, {name} takes text; give captions, and {PREPARE}")
        elif source.null is not None and text is not None:
            channels = source.null[Role.TEXT].shape[-1]
            if channels != text.shape[-1]:
                raise InvalidRequest(
                    f"the data's text has {channels} channels, the base takes {text.shape[-1]}; prepare the data with "
                    "the text encoder of the base"
                )
        return Loader(
            source,
            global_batch=self.global_batch,
            seed=self.seed,
            workers=self.workers,
            max_broken=self.broken.limit,
            flip=self.flip,
            conditioning=conditioning,
        )

    def batches(self, *, start_iteration: int, rank: int, world: int) -> Iterator[StreamItem]:
        """As in `BatchStream`; close the iterator to end its threads. Raises DataError for too many broken samples."""
        rows = self.global_batch // world
        iterations = (
            (i, self._places((i - 1) * self.global_batch + rank * rows, rows)) for i in count(start_iteration)
        )
        if not self.workers:
            for iteration, places in iterations:
                yield self._item(iteration, self._read(places))
        ahead = max(1, min(AHEAD_MOST, AHEAD_ROWS // rows))
        queue: deque[tuple[int, list[Future[list[Row]]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ilf-data")
        try:
            for iteration, places in iterations:
                pieces = [places[at : at + PIECE_ROWS] for at in range(0, rows, PIECE_ROWS)]
                queue.append((iteration, [pool.submit(self._read, piece) for piece in pieces]))
                if len(queue) > ahead:
                    first, futures = queue.popleft()
                    yield self._item(first, [row for future in futures for row in future.result()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _places(self, first: int, size: int) -> list[Place]:
        epochs, rows = self.shuffle.epochs(first, size).tolist(), self.shuffle.rows(first, size).tolist()
        return [Place(epoch, row) for epoch, row in zip(epochs, rows, strict=True)]

    def _read(self, places: Sequence[Place]) -> list[Row]:
        return [self._row(place) for place in places]

    def _row(self, place: Place) -> Row:
        """The sample at a place, or the first readable one after it."""
        broken: list[BrokenSample] = []
        for step in range(min(len(self.source), self.broken.limit + 1)):
            index = (place.index + step) % len(self.source)
            try:
                sample = self._sample(index)
            except BrokenSample as error:
                broken.append(error)
                continue
            if self.flip and is_mirrored(self.seed, place.epoch, index):
                sample = Sample(sample.key, sample.x0.flip(-1), sample.size, label=sample.label)
            return Row(sample, tuple(broken))
        return Row(None, tuple(broken))

    def _sample(self, index: int) -> Sample:
        sample = self.source.read(index)
        if self.classes is not None and sample.label is not None and sample.label >= self.classes:
            raise BrokenSample(sample.key, f"label {sample.label}, the base has the classes 0 to {self.classes - 1}")
        return sample

    def _item(self, iteration: int, rows: list[Row]) -> StreamItem:
        samples = []
        for row in rows:
            for broken in row.broken:
                self.broken.add(broken)
            if row.sample is None:
                raise DataError(
                    f"none of the {len(self.source)} samples can be read: {self.broken.last()}; check these files"
                )
            samples.append(row.sample)
        return iteration, [sample.key for sample in samples], batch_of(samples, self.conditioning)


def batch_of(samples: Sequence[Sample], conditioning: Conditioning) -> Batch:
    """The batch of some samples, with the conditions that `conditioning` asks for."""
    rows = [
        conditioning.from_sample(size=sample.size, label=sample.label, text=sample.text, mask=sample.text_mask)
        for sample in samples
    ]
    conditions = {name: _column([row[name] for row in rows]) for name in rows[0]}
    return Batch(torch.stack([sample.x0 for sample in samples]), conditions)


def _column(values: list[Any]) -> Tensor:
    """One condition of all rows: numbers and lists as a new tensor, a stored mask in float32."""
    if not isinstance(values[0], Tensor):
        return torch.tensor(values)
    column = torch.stack(values)
    return column if column.is_floating_point() else column.float()


def _conditioning_of(source: Source) -> Conditioning:
    """What a source has, for whoever has no base yet."""
    if source.condition is Condition.LABEL:
        return Conditioning.of_labels(source.classes or 0)
    return Conditioning.of_text(1, 1, sized=True)


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether the loader mirrors a picture in an epoch, a pure function of seed, epoch and index."""
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, 1, 0], np.uint64)
    return bool(np.random.Generator(np.random.Philox(key=key, counter=counter)).random() < 0.5)
