"""A row at one batch while it is measured."""

from dataclasses import dataclass, field

from ilf_trt.errors import one_line

from .observation import Observation
from .result import Agreement, ColdStart
from .row import Row
from .scores import PictureScore

REASON_CHARS = 300


@dataclass(slots=True)
class Measured:
    """What is known so far; `failed` is a reason, or empty.

    `library` is empty where it is that of the row's side, `block_forwards` None where the plan tells them.
    """

    row: Row
    batch: int
    library: str = ""
    block_forwards: int | None = None
    cold: ColdStart | None = None
    peak_mib: float | None = None
    agreement: Agreement | None = None
    scores: tuple[PictureScore, ...] = ()
    failed: str = ""
    observations: list[Observation] = field(default_factory=list)

    @property
    def times_ms(self) -> dict[int, float]:
        """The times that ratios compare, by turn."""
        return {each.turn: each.best_ms for each in self.observations if each.counts}

    def fail(self, error: BaseException) -> None:
        """Give the row its reason in the place of all numbers."""
        self.failed = one_line(error, REASON_CHARS)
        self.cold = self.peak_mib = self.agreement = None
        self.scores, self.observations = (), []


def whole_turns(measured: list[Measured]) -> int:
    """Keep the turns that every row with samples has, each once, the last that was written; gives their number."""
    for each in measured:
        each.observations = list({one.turn: one for one in each.observations if one.counts}.values())
    ends = [max(each.times_ms) + 1 for each in measured if each.observations]
    first = min(ends, default=0)
    for each in measured:
        each.observations = [one for one in each.observations if one.turn < first]
    return first
