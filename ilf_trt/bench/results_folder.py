"""The folder that a benchmark writes: raw samples as they come, then the result and its reports."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ilf_trt.contract.document import DocumentError, canonical, parse_json
from ilf_trt.errors import InvalidRequest
from ilf_trt.files import read_bytes, write_whole

from .environment import ENVIRONMENT_FILE, Environment
from .observation import Observation
from .observation_log import OBSERVATIONS_FILE, read_observations
from .report_html import report_html
from .report_md import report_md
from .result import RESULT_FILE, Result

ASKED_FILE = "asked.json"
"""What the folder's samples were measured for; another benchmark must not go on with them."""
MOST_BYTES = 1 << 20


class ResultsFolder:
    """One benchmark's files; a killed one leaves the samples of whole lines, and `resume` goes on behind them."""

    def __init__(self, place: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        """Open `place` for what was `asked`: plain data that decides what is measured.

        Raises InvalidRequest for a folder that has results, without `resume`, or those of another benchmark. Raises
        OSError.
        """
        self._place = place
        self.earlier: tuple[Observation, ...] = ()
        known, samples = place / ASKED_FILE, place / OBSERVATIONS_FILE
        if known.exists() and samples.exists() and samples.stat().st_size:
            if not resume:
                raise InvalidRequest(f"{place} has results already; pass --resume to go on, or another -o FOLDER")
            self._check(known, asked)
            self.earlier = read_observations(samples)
        place.mkdir(parents=True, exist_ok=True)
        write_whole(known, canonical(asked) + b"\n")
        self._samples: IO[bytes] = samples.open("ab")

    def begin(self, observations: Sequence[Observation]) -> None:
        """Keep just these samples of an interrupted run; the next ones come behind them."""
        self._samples.close()
        samples = self._place / OBSERVATIONS_FILE
        write_whole(samples, b"".join(map(_line, observations)))
        self._samples = samples.open("ab")

    def write(self, observation: Observation) -> None:
        """Add one sample; it is on its way to the disk when this returns."""
        self._samples.write(_line(observation))
        self._samples.flush()

    def finish(self, result: Result, environment: Environment, pictures: Mapping[str, bytes]) -> tuple[Path, ...]:
        """Write everything else; gives the files."""
        self._samples.close()
        samples = read_observations(self._place / OBSERVATIONS_FILE)
        facts = environment.as_json()
        contents = {
            RESULT_FILE: _document(result.as_json()),
            ENVIRONMENT_FILE: _document(facts),
            "report.md": report_md(result, facts).encode(),
            "report.html": report_html(result, samples, facts, pictures).encode(),
        }
        for name, content in contents.items():
            write_whole(self._place / name, content)
        return tuple(self._place / name for name in (OBSERVATIONS_FILE, *contents))

    def close(self) -> None:
        self._samples.close()

    def _check(self, known: Path, asked: Mapping[str, Any]) -> None:
        try:
            before = parse_json(read_bytes(known, most=MOST_BYTES))
        except (OSError, DocumentError) as error:
            raise InvalidRequest(f"{known} cannot be read ({error}); measure into another -o FOLDER") from error
        now = parse_json(canonical(asked))
        different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if different:
            raise InvalidRequest(
                f"{self._place} holds a benchmark with another {', '.join(different)}; measure into another -o FOLDER"
            )


def _line(observation: Observation) -> bytes:
    return json.dumps(observation.as_json()).encode() + b"\n"


def _document(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"
