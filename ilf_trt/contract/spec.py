"""The dimensions of a model, of a text encoder and of a decoder: everything that their graphs' borders follow from.

Legend: B pictures; R rows, with guidance the B conditional ones and then the B unconditional ones; T distinct times of
a plan; h and w patches of a column and of a row; D width; C, H, W latent channels and sides; L text tokens; m blocks
of the loop; K blocks of a graph.
"""

from dataclasses import dataclass
from enum import StrEnum

from ilf_trt.errors import InvalidRequest

from .arrays import is_digits
from .conditioning import Conditioning
from .document import Count, Size
from .ports import DECODE, FEEDBACK, PICTURES, ROWS, TEXT, Dim, Graph, Port, Role, Shape


class Precision(StrEnum):
    """What the matrix products of a bundle run in; norms, modulation, guidance and solver stay in float32.

    FP8 is E4M3 for the blocks' Linears, between FP16 tokens.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def dtype(self) -> str:
        """Dtype of the tokens that pass from graph to graph."""
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float16"}[self.value]

    @property
    def array_dtype(self) -> str:
        """Dtype in which numpy keeps such tensors; it has no bfloat16."""
        return "float32" if self is Precision.BF16 else self.dtype

    @property
    def parity_limit(self) -> float:
        """Largest relative difference from the float32 reference that a build accepts."""
        return {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "fp8": 2e-1}[self.value]


class Calibrator(StrEnum):
    """What measures the largest inputs of the Linears for FP8; `auto` takes Model Optimizer if it is installed."""

    AUTO = "auto"
    MODELOPT = "modelopt"
    OWN = "own"


class Initialisation(StrEnum):
    """A fresh feedback block: a copy of the last or first block of the loop, or of the last with its branches at zero.

    The paper copies a block without naming it. `zero` sets the last layer of attention and of feed-forward to zero, so
    that the block passes its input on as it is.
    """

    END = "end"
    BEGIN = "begin"
    ZERO = "zero"


@dataclass(frozen=True, slots=True)
class Loop:
    """The inner loop: blocks `begin` to `end`, both included."""

    begin: Count
    end: Count

    @classmethod
    def parse(cls, text: str) -> "Loop":
        """`"8:19"` -> Loop(8, 19)."""
        begin, separator, end = text.partition(":")
        if not (separator and is_digits(begin.strip()) and is_digits(end.strip())):
            raise InvalidRequest(f"loop {text!r} is not BEGIN:END; give two block numbers, such as 8:19")
        return cls(int(begin), int(end))

    @property
    def size(self) -> int:
        """m, the number of blocks that run twice on a feedback step."""
        return self.end - self.begin + 1

    def check(self, blocks: int) -> None:
        """Raise InvalidRequest unless 0 <= begin <= end < blocks."""
        if not 0 <= self.begin <= self.end < blocks:
            raise InvalidRequest(
                f"loop {self.begin}:{self.end} does not fit a model of {blocks} blocks; "
                f"it needs 0 <= begin <= end <= {blocks - 1}"
            )


@dataclass(frozen=True, slots=True)
class BatchRange:
    """The range of pictures a graph accepts; equal ends mean a fixed batch."""

    min: Size
    opt: Size
    max: Size

    @classmethod
    def parse(cls, text: str) -> "BatchRange":
        """`"1"` -> fixed, `"1:4:8"` -> min, opt, max."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(map(is_digits, parts)):
            raise InvalidRequest(f"batch {text!r} is neither N nor MIN:OPT:MAX; give 1 or 1:4:8")
        low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
        if not 1 <= low <= best <= high:
            raise InvalidRequest(f"batch {text!r} is out of order; it needs 1 <= MIN <= OPT <= MAX")
        return cls(low, best, high)

    @property
    def fixed(self) -> bool:
        return self.min == self.max

    def check(self, pictures: int) -> None:
        """Raise InvalidRequest when `pictures` is outside the range."""
        if not self.min <= pictures <= self.max:
            raise InvalidRequest(
                f"batch of {pictures} is outside the bundle's {self}; ask for {self}, or rebuild with "
                f"--batch {min(self.min, pictures)}:{self.opt}:{max(self.max, pictures)}"
            )

    def __str__(self) -> str:
        return str(self.min) if self.fixed else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, slots=True)
class Positions:
    """What the sinusoids of the position embedding follow from: the side that they span, and a divisor.

    Source: diffusers' PatchEmbed (`base_size`, `interpolation_scale`).
    """

    base: Size
    scale: float


@dataclass(frozen=True, slots=True)
class Stream:
    """One sequence of tokens that runs through all blocks: (R, *tokens, width). The image's stream has no name."""

    name: str
    tokens: Shape
    width: Size

    def port_name(self, prefix: str) -> str:
        """`hidden` of the image's stream, `hidden_text` of a stream `text`."""
        return f"{prefix}_{self.name}" if self.name else prefix


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The dimensions of an ILF model, and what one picture needs of it.

    | field | meaning |
    |---|---|
    | `block_path` | where the blocks lie in the model, such as `transformer_blocks` |
    | `latent` | (C, H, W) of the default size; `sizes` are all (H, W) that it can make |
    | `side_streams` | the streams that run through the blocks with the image's |
    | `modulation_rows`, `head_rows` | rows of D values that time and conditions give to a block, and to the head |
    | `shares_modulation` | all blocks get the same rows |
    | `conditioning` | what a caller gives for a picture |
    | `context` | what all blocks read of the conditions; `per_block` is what each block has for itself, K at axis 1 |
    | `constants` | tensors of the feedback block that `cond` takes as inputs: training changes no other graph |
    | `wide_residual` | the sum that runs through the blocks stays in float32 in every precision |
    """

    kind: str
    block_path: str
    blocks: Size
    width: Size
    patch: Size
    latent: tuple[Size, Size, Size]
    sizes: tuple[tuple[Size, Size], ...]
    positions: Positions
    side_streams: tuple[Stream, ...]
    modulation_rows: Count
    head_rows: Count
    loop: Loop
    guidance: bool
    shares_modulation: bool
    train_timesteps: Size
    conditioning: Conditioning
    context: tuple[Port, ...]
    per_block: tuple[Port, ...]
    constants: tuple[Port, ...]
    wide_residual: bool

    @property
    def rows(self) -> str:
        """Symbol of the rows that the blocks see: a guided batch carries a picture twice."""
        return ROWS if self.guidance else PICTURES

    @property
    def varies(self) -> bool:
        """Whether the graphs take more than one size; they then take the positions too."""
        return len(self.sizes) > 1

    @property
    def grid(self) -> tuple[Dim, Dim]:
        """Patches of a column and of a row, as symbols h and w if they differ from size to size."""
        return (self._side(0, "h", self.patch), self._side(1, "w", self.patch))

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The image's stream, then the others."""
        return (Stream("", self.grid, self.width), *self.side_streams)

    @property
    def latent_dims(self) -> Shape:
        """(C, H, W) of a port, H and W as symbols if they differ from size to size."""
        return (self.latent[0], self._side(0, "H", 1), self._side(1, "W", 1))

    def sides(self, size: tuple[int, int]) -> dict[str, int]:
        """What the symbols of a size (H, W) stand for."""
        height, width = size
        return {"H": height, "W": width, "h": height // self.patch, "w": width // self.patch}

    @property
    def conditions(self) -> tuple[Port, ...]:
        """What a caller gives for each picture."""
        return self.conditioning.ports(guidance=self.guidance)

    @property
    def row_conditions(self) -> tuple[Port, ...]:
        """The conditions as the graphs take them."""
        return self.conditioning.row_ports(self.rows)

    def _side(self, axis: int, symbol: str, cells: int) -> Dim:
        sides = {size[axis] for size in self.sizes}
        return symbol if len(sides) > 1 else sides.pop() // cells

    def graph_of_linear(self, name: str) -> str:
        """The graph that runs a Linear of a block, by its name in the model, `transformer_blocks.8.attn1.to_q`.

        Raises InvalidRequest for a name of another kind or of a block that the model does not have.
        """
        if name.startswith(f"{FEEDBACK}."):
            return "loop_feedback"
        number = name.removeprefix(f"{self.block_path}.").partition(".")[0]
        if not (name.startswith(f"{self.block_path}.") and is_digits(number) and int(number) < self.blocks):
            raise InvalidRequest(
                f"{name!r} is no Linear of a block; Linears are {self.block_path}.0.attn1.to_q and so on, up to block "
                f"{self.blocks - 1}, and {FEEDBACK}.attn1.to_q"
            )
        block = int(number)
        if block < self.loop.begin:
            return "pre"
        return "loop_body" if block <= self.loop.end else "post"


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text encoder: `tokens` numbers below `vocabulary` to a prompt, `channels` values to a token.

    `precision` is fp32 or bf16: T5 overflows fp16. It is served by graph `text`, which embeds B prompts.
    """

    tokens: Size
    vocabulary: Size
    channels: Size
    precision: Precision

    @property
    def graph(self) -> Graph:
        """The border of graph `text`; the mask is 1 for a token and 0 for padding."""
        ids = Port("ids", (PICTURES, self.tokens), "int32", Role.TOKEN_IDS, below=self.vocabulary)
        mask = Port("ids_mask", (PICTURES, self.tokens), "float32", Role.MASK)
        text = Port("text", (PICTURES, self.tokens, self.channels), "float32", Role.TEXT)
        return Graph(TEXT, (ids, mask), (text,))


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """An image decoder: `channels` of a latent to RGB, `scale` pixels to a side of a latent's cell.

    Graph `decode` takes one latent of `size` (height, width), or a part of one of at most `tile` cells a side where
    `tile` is not 0. A latent's own scaling and shift are undone inside; shades are 0 to 255, not clipped nor rounded.
    """

    channels: Size
    scale: Size
    size: tuple[Dim, Dim]
    tile: Count
    precision: Precision

    @property
    def graph(self) -> Graph:
        """The border of graph `decode`; a symbol H of a latent is 8H of a picture where `scale` is 8."""
        pixels = tuple(f"{self.scale}{side}" if isinstance(side, str) else side * self.scale for side in self.size)
        latents = Port("latents", (1, self.channels, *self.size), "float32", Role.LATENT)
        return Graph(DECODE, (latents,), (Port("shades", (1, *pixels, 3), "float32", Role.PIXELS),))
