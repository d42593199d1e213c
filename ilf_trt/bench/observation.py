"""One raw sample of a benchmark, a line of `observations.jsonl`."""

from dataclasses import asdict, dataclass
from typing import Any

from ilf_trt.contract.document import as_type


@dataclass(frozen=True, slots=True)
class Observation:
    """One run of a row in a turn. Turns below 0 warm up, and no result counts them.

    `host_ms` is the time of the host across the boundary; `device_ms` that of the GPU by CUDA events, None on a CPU.
    `at_s` is the start in seconds since the benchmark began.
    """

    row: str
    batch: int
    turn: int
    at_s: float
    host_ms: float
    device_ms: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for one line; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Observation":
        """Raises DocumentError for data of another type."""
        return as_type(data, cls)

    @property
    def counts(self) -> bool:
        """Whether it belongs to a result; a warm-up does not."""
        return self.turn >= 0

    @property
    def best_ms(self) -> float:
        """The GPU's time if there is one, else the host's: what a ratio compares."""
        return self.host_ms if self.device_ms is None else self.device_ms
