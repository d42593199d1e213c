"""Where the build cache of a user lies."""

from pathlib import Path

from platformdirs import user_cache_path

from ilf_trt.errors import InvalidRequest


def cache_folder(given: Path | None) -> Path:
    """The build cache's folder; raises InvalidRequest for a user without a home folder."""
    if given is not None:
        return given
    try:
        folder = user_cache_path("ilf-trt")
    except (RuntimeError, KeyError, OSError) as error:
        raise _homeless() from error
    if not folder.is_absolute():
        raise _homeless()
    return folder


def _homeless() -> InvalidRequest:
    return InvalidRequest(
        "this user has no home folder to keep the build cache in; set HOME, or pass --cache-dir FOLDER"
    )
