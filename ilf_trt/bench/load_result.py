"""What a load found out, `load.json`: throughput, latency and its parts, and what was not answered."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ilf_trt.errors import InvalidRequest

from .load import Load, LoadRun
from .result_file import read_result_file
from .statistics import Spread, spread

SCHEMA = 1
LOAD_FILE = "load.json"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of a load. Every request that was due is answered, failed or unanswered.

    The latency of an answer is the sum of its three parts: the wait in the client, the wait at the target, and the
    target's own work. Their quantiles do not add up, since different answers stand at the same quantile.
    """

    clients: int
    """Requests under way at most."""
    rate: float | None
    """Intended requests a second of an open stream; None for closed clients."""
    seed: int
    warm_ups: int
    """Requests before the load, which nothing here counts."""
    requests: int
    answered: int
    failures: dict[str, int]
    """How many requests failed, by the kind of error."""
    unanswered: int
    """Requests that were due, and still waited at the end; their latency is unknown, and longer than that of others."""
    pictures: int
    duration_s: float
    """From the begin to the last answer."""
    offered_per_s: float | None
    """Requests a second that were due: the drawn arrivals of `rate`. None for closed clients."""
    answered_per_s: float
    pictures_per_s: float
    latency: Spread | None
    """From the intended start to the answer; None without answers."""
    client_queue: Spread | None
    """From the intended start until one of `clients` was free to send."""
    target_queue: Spread | None
    """From sending to the answer, less `service`: the wait for a session, checks and start noise.

    None, as `service` is, if the target does not tell its own work.
    """
    service: Spread | None
    """The target's own work; of a pipeline, `Timings.total_ms`."""
    finished: bool
    """Whether it ran to its end; false after Ctrl-C."""
    schema: int = SCHEMA

    @classmethod
    def of(cls, load: Load, run: LoadRun) -> Self:
        """The result of a run of `load`."""
        answers = [sample for sample in run.samples if not sample.failure]
        failures = Counter(sample.failure for sample in run.samples if sample.failure)
        told = [sample for sample in answers if sample.served.service_ms is not None]
        requests = len(run.samples) + run.unanswered
        pictures = sum(sample.served.pictures for sample in answers)
        return cls(
            clients=load.clients,
            rate=load.rate,
            seed=load.seed,
            warm_ups=run.warm_ups,
            requests=requests,
            answered=len(answers),
            failures=dict(sorted(failures.items())),
            unanswered=run.unanswered,
            pictures=pictures,
            duration_s=run.duration_s,
            offered_per_s=None if load.rate is None else _per_s(requests, run.span_s),
            answered_per_s=_per_s(len(answers), run.duration_s),
            pictures_per_s=_per_s(pictures, run.duration_s),
            latency=_spread([sample.latency_ms for sample in answers]),
            client_queue=_spread([sample.client_queue_ms for sample in answers]),
            target_queue=_spread([sample.target_queue_ms or 0.0 for sample in told]),
            service=_spread([sample.served.service_ms or 0.0 for sample in told]),
            finished=run.finished,
        )

    @property
    def failed(self) -> int:
        """Requests that failed, of all kinds."""
        return sum(self.failures.values())

    def as_json(self) -> dict[str, Any]:
        """Plain data; `read_load` reads it back."""
        return asdict(self)


def read_load(path: Path) -> LoadResult:
    """The result in a file, or in `load.json` of a folder.

    Raises InvalidRequest for another file, for a newer schema and for an older one.
    """
    result = read_result_file(path, LoadResult, name=LOAD_FILE, what="load", schema=SCHEMA)
    if result.requests != result.answered + result.failed + result.unanswered:
        raise InvalidRequest(f"{path}: its answers and failures do not add up to its requests; measure again")
    return result


def _per_s(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _spread(times_ms: Sequence[float]) -> Spread | None:
    return spread(times_ms) if times_ms else None
