"""The result of a benchmark, `result.json`: its rows, what they may be compared with, and what disturbed them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .result_file import read_result_file
from .row import Boundary, Side
from .scores import PictureScore
from .statistics import Interval, Spread

SCHEMA = 1
RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Seconds from nothing to a first picture: the process, the files, and the first run, one after another."""

    process_s: float
    load_s: float
    first_s: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near latents, and with a decoder pixels, are to those of eager PyTorch from the same noise.

    `own_plan_db` compares with eager under the same plan: it is what the engines cost. `plain_db` and `long_db`
    compare with 20 and 50 plain steps: they also count what fewer steps cost. None where eager was not asked for, or
    for equal arrays. `own_plan_relative` is the largest difference under the same plan over the largest magnitude: what
    a build's limit is about; 0 for equal arrays.
    """

    own_plan_db: float | None = None
    plain_db: float | None = None
    long_db: float | None = None
    pixels_db: float | None = None
    nonfinite_share: float = 0.0
    own_plan_relative: float | None = None


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row measured. `failed` is the reason of a row that gave nothing; all numbers are then None."""

    slug: str
    title: str
    batch: int
    side: Side
    library: str
    precision: str
    steps: int
    feedback_steps: int
    block_forwards: int
    warm_ups: int
    host: Spread | None = None
    device: Spread | None = None
    ratio: Interval | None = None
    """How many times faster than the base line, turn by turn."""
    pictures_per_s: float | None = None
    peak_mib: float | None = None
    """Of the row's process with all its rows of this batch; on a GPU what the process takes of it."""
    cold: ColdStart | None = None
    agreement: Agreement | None = None
    scores: tuple[PictureScore, ...] = ()
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured."""

    bundle: str
    """Name of the folder."""
    sha256: str
    """Of its manifest, which names every file's hash."""
    base_sha256: str
    model: str
    """Kind, blocks and latent shape in words."""
    precision: str


@dataclass(frozen=True, slots=True)
class Noise:
    """How steady the machine was. `reasons` say in words why its numbers deserve doubt; none means a quiet machine."""

    base_spread: float
    """Distance between the base line's quartiles as a share of its median."""
    load_before: float
    """Of the machine per core, over the last minute."""
    load_after: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the rows may be compared, and if not, what differs between the two sides."""

    comparable: bool
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that a benchmark found out; the raw samples lie beside it."""

    command: str
    started: str
    """UTC, ISO 8601."""
    finished: bool
    subject: Subject
    boundary: Boundary
    guidance_scale: float
    size: tuple[int, int]
    """Height and width in pixels, of latents times 8 without a decoder."""
    device: str
    base_line: str
    """Slug of the row that ratios compare with."""
    within: float
    rows: tuple[RowResult, ...]
    ilf_ms: dict[str, float]
    """Where the time of one ILF generation went, in ms: text, the five graphs, decode, host."""
    fell_out: tuple[str, ...]
    """Layers of the engines that do not run in the asked precision."""
    noise: Noise
    verdict: Verdict
    schema: int = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """Plain data; `read_result` reads it back."""
        return asdict(self)

    def row(self, slug: str, batch: int) -> RowResult | None:
        """The row with this slug at this batch."""
        return next((row for row in self.rows if (row.slug, row.batch) == (slug, batch)), None)


def read_result(path: Path) -> Result:
    """The result in a file, or in `result.json` of a folder.

    Raises InvalidRequest for another file, for a newer schema and for an older one.
    """
    return read_result_file(path, Result, name=RESULT_FILE, what="result", schema=SCHEMA)
