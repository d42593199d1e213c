"""Reads the JSON file that a measurement leaves: its schema first, then field by field."""

from pathlib import Path
from typing import Any, TypeVar

from ilf_trt.contract.document import DocumentError, as_type, read_json
from ilf_trt.errors import InvalidRequest

T = TypeVar("T")


def read_result_file(path: Path, kind: type[T], *, name: str, what: str, schema: int) -> T:
    """The `kind` in a file, or in the file `name` of a folder; `what` says in a message what it should be.

    Raises InvalidRequest for another file, for a newer schema and for an older one.
    """
    place = path / name if path.is_dir() else path
    try:
        data = read_json(place)
        _check_schema(data.get("schema"), schema, place)
        return as_type(data, kind)
    except DocumentError as error:
        raise InvalidRequest(f"{place} is no {what} of ilf-trt bench ({error.reason}); pass its {name}") from error


def _check_schema(got: Any, schema: int, place: Path) -> None:
    if got == schema:
        return
    if isinstance(got, int) and got > schema:
        raise InvalidRequest(f"{place} has schema {got}, this ilf-trt reads {schema}; update ilf-trt")
    raise InvalidRequest(f"{place} has schema {got!r:.60}, expected {schema}; measure again with ilf-trt bench")
