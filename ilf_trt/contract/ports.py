"""Ports and graphs: the name, shape, dtype and role of every tensor that crosses a graph's border."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

GRAPHS = ("cond", "pre", "loop_body", "loop_feedback", "post")
TEXT, DECODE = "text", "decode"
PICTURES, ROWS = "B", "R"
BRANCHES = ("conditional", "unconditional")
FEEDBACK = "feedback"
COEFFICIENTS = ("guidance", "c_x", "c_out", "a", "b_0", "b_1", "b_2", "unused")

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}
"""Bytes of one number, by the dtype of a port."""

Dim = int | str
Shape = tuple[Dim, ...]


class Role(StrEnum):
    """What a tensor is for. Code asks for the role, never for a part of a name."""

    TIME = "time"
    LABEL = "label"
    TEXT = "text"
    MASK = "mask"
    RESOLUTION = "resolution"
    ASPECT_RATIO = "aspect_ratio"
    WEIGHT = "weight"
    MODULATION = "modulation"
    HEAD_MODULATION = "head_modulation"
    CONTEXT = "context"
    POSITIONS = "positions"
    START = "start"
    TOKENS = "tokens"
    FEATURES = "features"
    FEEDBACK = "feedback"
    SCALES = "scales"
    LATENT = "latent"
    PREDICTION = "prediction"
    COEFFICIENTS = "coefficients"
    INDEX = "index"
    TOKEN_IDS = "token_ids"
    PIXELS = "pixels"


@dataclass(frozen=True, slots=True)
class Port:
    """One tensor of a graph's border; `below` bounds an index input (0 <= value < below)."""

    name: str
    shape: Shape
    dtype: str
    role: Role
    below: int | None = None

    @property
    def array_dtype(self) -> str:
        """Dtype in which numpy holds such a tensor; numpy has no bfloat16."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers; `sizes` gives each symbol its number."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph's border."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
