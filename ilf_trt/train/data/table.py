"""The `[data]` table of a recipe: its options for each kind of data, and the batch stream that it opens."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ilf_trt.errors import DataError, InvalidRequest
from ilf_trt.model.backbone import Backbone
from ilf_trt.train.batch_stream import BatchStream
from ilf_trt.train.table import check_at_least, parse

from .images import ImageFolder
from .latents import LatentShards
from .loader import Loader
from .picture import MODES
from .webdataset import TarShards


class Kind(StrEnum):
    """The kinds of data."""

    DIGITS = "digits"
    IMAGES = "images"
    WEBDATASET = "webdataset"
    LATENTS = "latents"


@dataclass(frozen=True, slots=True)
class DigitsTable:
    """scikit-learn's digits."""

    kind: Kind

    def check(self) -> None:
        """There are no other keys."""


@dataclass(frozen=True, slots=True)
class PictureTable:
    """Pictures for training in pixels: `size` x `size`, 1 or 3 `channels`. `flip` mirrors half of them."""

    kind: Kind
    path: str
    size: int
    channels: int = 3
    flip: bool = False
    workers: int = 2
    max_broken: int = 100

    def check(self) -> None:
        check_at_least(0, "data.", workers=self.workers, max_broken=self.max_broken)
        check_at_least(1, "data.", size=self.size)
        if self.channels not in MODES:
            raise InvalidRequest(f"data.channels is {self.channels}, it must be 1 or 3")


@dataclass(frozen=True, slots=True)
class LatentsTable:
    """A folder of `ilf-trt prepare`. `verify` checks the hash of every shard first."""

    kind: Kind
    path: str
    verify: bool = False
    workers: int = 2
    max_broken: int = 100

    def check(self) -> None:
        check_at_least(0, "data.", workers=self.workers, max_broken=self.max_broken)


@dataclass(frozen=True, slots=True)
class _KindOnly:
    kind: Kind

    def check(self) -> None:
        """The kind decides which other keys are valid."""


TABLES: dict[Kind, type[DigitsTable | PictureTable | LatentsTable]] = {
    Kind.DIGITS: DigitsTable,
    Kind.IMAGES: PictureTable,
    Kind.WEBDATASET: PictureTable,
    Kind.LATENTS: LatentsTable,
}


def table_of(table: Mapping[str, Any], section: str = "data") -> DigitsTable | PictureTable | LatentsTable:
    """The options of a table; raises InvalidRequest for a key that is unknown, missing or of the wrong type."""
    where = f"{section}."
    kind = parse(_KindOnly, {name: value for name, value in table.items() if name == "kind"}, where).kind
    return parse(TABLES[kind], table, where)


def open_stream(table: Mapping[str, Any], *, global_batch: int, seed: int, section: str = "data") -> BatchStream:
    """Open the stream of a recipe's `data` or `validation` table; `section` names the table in errors.

    Raises InvalidRequest for a wrong key, value or path, DataError for damaged data, MissingDependency.
    """
    options = table_of(table, section)
    if isinstance(options, DigitsTable):
        from .digits import digits_stream

        return digits_stream(global_batch=global_batch, seed=seed)
    reading: dict[str, Any] = {"workers": options.workers, "max_broken": options.max_broken}
    try:
        if isinstance(options, LatentsTable):
            return Loader(
                LatentShards(options.path, verify=options.verify), global_batch=global_batch, seed=seed, **reading
            )
        source_class = TarShards if options.kind is Kind.WEBDATASET else ImageFolder
        source = source_class(options.path, size=options.size, channels=options.channels)
        return Loader(source, global_batch=global_batch, seed=seed, flip=options.flip, **reading)
    except InvalidRequest as error:
        raise InvalidRequest(f"{section}: {error}") from error
    except DataError as error:
        raise DataError(f"{section}: {error}") from error


def fit_stream(stream: BatchStream, adapter: Backbone) -> BatchStream:
    """The stream for a base; raises InvalidRequest if its pictures, labels or text do not fit the base."""
    return stream.for_base(adapter) if isinstance(stream, Loader) else stream
