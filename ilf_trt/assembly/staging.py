"""The staging folder: a bundle is made out of sight and takes its place when it is whole."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ilf_trt.contract.bundle import MANIFEST_FILE
from ilf_trt.errors import BundleError, one_line
from ilf_trt.files import sweep, whole_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL_IN_WORDS = re.compile(
    r"\d+ requested and \d+ written|problem writing element \d+ to file"  # numpy, without an errno
    + "".join(f"|{re.escape(os.strerror(code))}|os error {code}\\b" for code in FULL)  # libraries in Rust
)
DEEPEST_CAUSE = 10


@contextmanager
def staging_folder(output: str | Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder next to `output` that takes its place when the block ends well, and vanishes otherwise.

    The content is on the disk before that. An old bundle at `output` stays whole until it is exchanged. Raises
    BundleError when `output` exists and `force` is not set, when it is no bundle, or when the disk is full or not
    writable, however deep in another library that was noticed.
    """
    with _translate_errors(Path(output)):
        output = Path(os.path.realpath(output))
        _check_output(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        sweep(output)
    with ExitStack() as stack:
        with _translate_errors(output):
            staging = stack.enter_context(whole_folder(output, replace=force, sync=True))
        try:
            yield staging
        except Exception as error:
            if (reason := _full_disk(error)) is not None:
                raise _full(output, reason) from error
            if isinstance(error, OSError) and error.errno in FORBIDDEN and _is_write(error, staging):
                raise _unwritable(output, one_line(error)) from error
            raise
        with _translate_errors(output):
            _check_output(output, force=force)
            stack.close()


@contextmanager
def _translate_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _full_disk(error)
        raise (_unwritable(output, one_line(error)) if reason is None else _full(output, reason)) from error


def _check_output(output: Path, *, force: bool) -> None:
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise BundleError(f"{output} exists and is not a bundle; it is left alone, pass another --output")
    if output.exists() and not force:
        raise BundleError(f"{output} exists; pass --force to replace it, or another --output")


def _full_disk(error: BaseException) -> str | None:
    """What an error says of a full disk, a full quota or a limit of file sizes, itself or by its causes."""
    cause: BaseException | None = error
    for _ in range(DEEPEST_CAUSE):
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.errno in FULL and cause.strerror == os.strerror(cause.errno):
            return cause.strerror
        if found := FULL_IN_WORDS.search(str(cause)):
            return f"the disk took only a part ({found[0]})" if "writ" in found[0] else one_line(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _is_write(error: OSError, staging: Path) -> bool:
    """A file elsewhere, such as a checkpoint, could not be read."""
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(staging)


def _full(output: Path, reason: str) -> BundleError:
    return BundleError(f"cannot write {str(output)!r}: {reason}; free some space or choose another --output")


def _unwritable(output: Path, reason: str) -> BundleError:
    return BundleError(f"cannot write {str(output)!r}: {reason}; choose a writable --output")
