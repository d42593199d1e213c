"""Where a model of diffusers or transformers lies: in a folder or hub id of its own, or in a pipeline's subfolder."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ilf_trt.errors import InvalidRequest


def loaded(
    what: str,
    source: str,
    subfolder: str,
    load: Callable[[dict[str, str]], Any],
    refusals: tuple[type[Exception], ...] = (),
) -> Any:
    """`load({"subfolder": …})` where the pipeline's layout is found, else `load({})`; raises InvalidRequest."""
    refused: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *refusals)
    path, pipeline = Path(source), {"subfolder": subfolder}
    if not path.is_dir():
        if source.count("/") != 1 or path.is_absolute():
            raise InvalidRequest(f"{what} {source} is not a folder; give its folder, or an id such as owner/name")
        with suppress(*refused):
            return load(pipeline)
    try:
        return load(pipeline if (path / subfolder).is_dir() else {})
    except refused as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidRequest(f"{what} {source} cannot be loaded: {reason}; give its folder or id") from error
