"""A sample, and the protocol of a source: a map from an index to a sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from ilf_trt.contract.ports import Role


class Condition(StrEnum):
    """The kind of condition that every sample of a source has."""

    LABEL = "label"
    CAPTION = "caption"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture x0 (C, H, W) in float32, pixels in [-1, 1] or a scaled latent, and its condition.

    `size` is the height and width of the picture in pixels, after resizing. `text` (L, text channels) and `text_mask`
    (L,) are an embedded caption.
    """

    key: str
    x0: Tensor
    size: tuple[int, int]
    label: int | None = None
    caption: str | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None


class Source(Protocol):
    """Samples in a fixed order. Several threads may call `read` at once."""

    @property
    def condition(self) -> Condition:
        """The condition of every sample."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every x0."""

    @property
    def classes(self) -> int | None:
        """The number of labels, or None if the data does not say."""

    @property
    def null(self) -> Mapping[Role, Tensor] | None:
        """The conditions of the empty caption by role, one row each, or None if the data has none."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The name of a sample in logs and errors; does not read the sample."""

    def read(self, index: int) -> Sample:
        """Raises BrokenSample if the sample cannot be read."""
