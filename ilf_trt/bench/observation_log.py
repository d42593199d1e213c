"""`observations.jsonl`, read back: every raw sample of a benchmark, a line each."""

from pathlib import Path

from ilf_trt.contract.document import DocumentError, parse_json
from ilf_trt.errors import InvalidRequest, one_line
from ilf_trt.files import read_bytes

from .observation import Observation

OBSERVATIONS_FILE = "observations.jsonl"
MOST_BYTES = 1 << 28


def read_observations(place: Path) -> tuple[Observation, ...]:
    """The samples in a file; a last line without its end is left out, for the process was killed as it wrote it.

    Raises InvalidRequest for a file that cannot be read, or of which a line is no sample.
    """
    try:
        content = read_bytes(place, most=MOST_BYTES)
    except OSError as error:
        raise InvalidRequest(f"{place} cannot be read: {one_line(error)}; remove it or measure again") from error
    lines = content.split(b"\n")[:-1]
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(Observation.from_json(parse_json(line)))
        except DocumentError as error:
            raise InvalidRequest(
                f"{place}: line {number} is no observation ({error.reason}); remove the file or measure again"
            ) from error
    return tuple(samples)
