"""Ports and graphs: the name, shape and dtype of every tensor that crosses a graph's border."""

from collections.abc import Mapping
from dataclasses import dataclass

GRAPHS = ("cond", "pre", "loop_body", "loop_feedback", "post")


TEXT, DECODE = "text", "decode"


PICTURES, ROWS = "B", "R"


NEGATIVE = "negative_"


BRANCHES = ("conditional", "unconditional")


BLOCKS, FEEDBACK = "transformer_blocks", "feedback"


COEFFICIENTS = ("guidance", "c_x", "c_out", "a", "b_0", "b_1", "b_2", "unused")


Dim = int | str


Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """One tensor of a graph's border; `below` bounds an index input (0 <= value < below)."""

    name: str
    shape: Shape
    dtype: str
    below: int | None = None

    @property
    def array_dtype(self) -> str:
        """Dtype in which numpy holds such a tensor; it has no bfloat16."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, `sizes` naming each symbolic dimension."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph's border."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
