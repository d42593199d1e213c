"""The staging folder: a bundle is made out of sight and takes its place when it is whole."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ilf_trt.contract.bundle import MANIFEST_FILE
from ilf_trt.errors import BundleError
from ilf_trt.files import sweep, whole_folder

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


@contextmanager
def staging_folder(output: str | Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder next to `output` that takes its place when the block ends well, and vanishes otherwise.

    An old bundle at `output` stays whole until it is exchanged. Raises BundleError when `output` exists and `force` is
    not set, when it is no bundle, or when the disk is full or not writable.
    """
    with _translate_errors(Path(output)):
        output = Path(os.path.realpath(output))
        _check_output(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        sweep(output)
    with ExitStack() as stack:
        with _translate_errors(output):
            staging = stack.enter_context(whole_folder(output, replace=force))
        try:
            yield staging
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise _unwritable(output, error) from error
            raise
        with _translate_errors(output):
            _check_output(output, force=force)
            stack.close()


@contextmanager
def _translate_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise _unwritable(output, error) from error


def _check_output(output: Path, *, force: bool) -> None:
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise BundleError(f"{output} exists and is not a bundle; it is left alone, pass another --output")
    if output.exists() and not force:
        raise BundleError(f"{output} exists; pass --force to replace it, or another --output")


def _unwritable(output: Path, error: Exception) -> BundleError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    hint = "free some space or choose another --output" if full else "choose a writable --output"
    return BundleError(f"cannot write {str(output)!r}: {reason}; {hint}")
