"""A recipe's table that says where pictures come from, checked key by key, and the feed that it opens."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ilf_trt.errors import DataError, InvalidRequest
from ilf_trt.model.backbone import Backbone
from ilf_trt.train.batch_stream import Feed
from ilf_trt.train.data.images import ImageFolder
from ilf_trt.train.data.latents import LatentShards
from ilf_trt.train.data.loader import Loader
from ilf_trt.train.data.picture import MODES
from ilf_trt.train.data.webdataset import TarShards
from ilf_trt.train.table import parsed


class Kind(StrEnum):
    """What a table's pictures lie in."""

    DIGITS = "digits"
    IMAGES = "images"
    WEBDATASET = "webdataset"
    LATENTS = "latents"


@dataclass(frozen=True, slots=True)
class DigitsTable:
    """scikit-learn's digits."""

    kind: Kind

    def check(self) -> None:
        """The kind is all there is."""


@dataclass(frozen=True, slots=True)
class PictureTable:
    """Pictures to train on in pixels: `size` x `size`, in 1 or 3 `channels`; `flip` mirrors half of them."""

    kind: Kind
    path: str
    size: int
    channels: int = 3
    flip: bool = False
    workers: int = 2
    max_broken: int = 100

    def check(self) -> None:
        _check_reading(self.workers, self.max_broken)
        if self.size < 1:
            raise InvalidRequest(f"data.size is {self.size}, it must be at least 1")
        if self.channels not in MODES:
            raise InvalidRequest(f"data.channels is {self.channels}, it must be 1 or 3")


@dataclass(frozen=True, slots=True)
class LatentsTable:
    """What `ilf-trt prepare` made; `verify` holds every shard against its hash first."""

    kind: Kind
    path: str
    verify: bool = False
    workers: int = 2
    max_broken: int = 100

    def check(self) -> None:
        _check_reading(self.workers, self.max_broken)


@dataclass(frozen=True, slots=True)
class _KindOnly:
    kind: Kind

    def check(self) -> None:
        """Which other keys there may be, the kind decides."""


TABLES: dict[Kind, Any] = {
    Kind.DIGITS: DigitsTable,
    Kind.IMAGES: PictureTable,
    Kind.WEBDATASET: PictureTable,
    Kind.LATENTS: LatentsTable,
}


def table_of(table: Mapping[str, Any], section: str = "data") -> DigitsTable | PictureTable | LatentsTable:
    """The options of a table; raises InvalidRequest for a key that is unknown, missing or of the wrong type."""
    where = f"{section}."
    kind = parsed(_KindOnly, {name: value for name, value in table.items() if name == "kind"}, where).kind
    made: DigitsTable | PictureTable | LatentsTable = parsed(TABLES[kind], table, where)
    return made


def open_feed(table: Mapping[str, Any], *, global_batch: int, seed: int, section: str = "data") -> Feed:
    """The feed of a recipe's `data` or `validation`; `section` is its name in errors.

    Raises InvalidRequest for a table or a path that cannot be served, DataError for data that is damaged.
    """
    options = table_of(table, section)
    if isinstance(options, DigitsTable):
        from ilf_trt.train.data.digits import digits_feed

        return digits_feed(global_batch=global_batch, seed=seed)
    reading: dict[str, Any] = {"workers": options.workers, "max_broken": options.max_broken}
    try:
        if isinstance(options, LatentsTable):
            return Loader(
                LatentShards(options.path, verify=options.verify), global_batch=global_batch, seed=seed, **reading
            )
        opened = TarShards if options.kind is Kind.WEBDATASET else ImageFolder
        source = opened(options.path, size=options.size, channels=options.channels)
        return Loader(source, global_batch=global_batch, seed=seed, flip=options.flip, **reading)
    except InvalidRequest as error:
        raise InvalidRequest(f"{section}: {error}") from error
    except DataError as error:
        raise DataError(f"{section}: {error}") from error


def fitted(feed: Feed, adapter: Backbone) -> Feed:
    """The feed for a base; raises InvalidRequest when its pictures, labels or text are not what the base takes."""
    return feed.fitted(adapter) if isinstance(feed, Loader) else feed


def _check_reading(workers: int, max_broken: int) -> None:
    for name, value in {"workers": workers, "max_broken": max_broken}.items():
        if value < 0:
            raise InvalidRequest(f"data.{name} is {value}, it must be at least 0")
