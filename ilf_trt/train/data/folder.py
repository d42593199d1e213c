"""Loads a model of diffusers or transformers: from its own folder or hub id, or from a subfolder of a pipeline."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ilf_trt.errors import InvalidRequest, one_line


def load_pretrained(
    what: str,
    source: str,
    subfolder: str,
    load: Callable[[dict[str, str]], Any],
    errors: tuple[type[Exception], ...] = (),
) -> Any:
    """Call `load({"subfolder": …})` if the source is a pipeline, else `load({})`.

    `errors` are the foreign exceptions of `load` beside OSError, ValueError and RuntimeError. Raises InvalidRequest.
    """
    load_errors: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *errors)
    path, pipeline = Path(source), {"subfolder": subfolder}
    if not path.is_dir():
        if source.count("/") != 1 or path.is_absolute():
            raise InvalidRequest(f"{what} {source} is not a folder; give its folder, or an id such as owner/name")
        with suppress(*load_errors):
            return load(pipeline)
    try:
        return load(pipeline if (path / subfolder).is_dir() else {})
    except load_errors as error:
        raise InvalidRequest(f"{what} {source} cannot be loaded: {one_line(error)}; give its folder or id") from error
