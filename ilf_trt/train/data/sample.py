"""A sample, and what every kind of data is: a map from an index to one."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Condition(StrEnum):
    """What stands beside the picture of every sample."""

    LABEL = "label"
    CAPTION = "caption"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Sample:
    """x0 (C, H, W) in float32: pixels in [-1, 1] or a scaled latent; and its condition.

    `text` (L, text channels) and `text_mask` (L,) are an embedded caption; `size` is the picture's height and width in
    pixels, as it is trained on.
    """

    key: str
    x0: Tensor
    size: tuple[int, int]
    label: int | None = None
    caption: str | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None


class Source(Protocol):
    """Data in a fixed order. `read` may be called from several threads."""

    @property
    def condition(self) -> Condition:
        """What every sample carries."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every x0."""

    @property
    def classes(self) -> int | None:
        """How many labels there are, where the data says so."""

    @property
    def null(self) -> Mapping[str, Tensor] | None:
        """The backbone's arguments, one row each, for a caption that says nothing, where the data has them."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """What names a sample in logs and errors, found without reading it."""

    def read(self, index: int) -> Sample:
        """Raises BrokenSample when this one cannot be read."""
