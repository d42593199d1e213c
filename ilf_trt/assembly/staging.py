"""The draft: a folder in which a bundle is made, out of sight, that takes the bundle's place when it is whole."""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from ilf_trt.contract.bundle import MANIFEST_FILE
from ilf_trt.errors import BundleError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def drafted(output: str | Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    An old bundle at `output` stays whole until it is exchanged. Raises BundleError when `output` exists and `force` is
    not set, when it is no bundle, or when the disk is full or not writable.
    """
    try:
        output = Path(os.path.realpath(output))
        _check_place(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output)
    except (OSError, ValueError) as error:
        raise _unwritable(Path(output), error) from error
    draft = output.parent / f".{output.name}.partial-{uuid4().hex[:8]}-{os.getpid()}"
    with ExitStack() as cleanup:
        try:
            cleanup.callback(shutil.rmtree, draft, ignore_errors=True)  # first: a signal may end mkdir after its work
            draft.mkdir()
            lock = os.open(draft, os.O_RDONLY)
            cleanup.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _unwritable(output, error) from error
        try:
            yield draft
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise _unwritable(output, error) from error
            raise
        try:
            _check_place(output, force=force)
            _replace(output, draft)
        except OSError as error:
            raise _unwritable(output, error) from error


def _check_place(output: Path, *, force: bool) -> None:
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise BundleError(f"{output} exists and is not a bundle; it is left alone, pass another --output")
    if output.exists() and not force:
        raise BundleError(f"{output} exists; pass --force to replace it, or another --output")


def _unwritable(output: Path, error: Exception) -> BundleError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    hint = "free some space or choose another --output" if full else "choose a writable --output"
    return BundleError(f"cannot write {str(output)!r}: {reason}; {hint}")


def _sweep(output: Path) -> None:
    """Remove drafts of builds that were killed: their process is gone, or bears our number now, and holds no lock."""
    for stale in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if not pid.isdecimal() or (Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()):
            continue
        handle = os.open(stale, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def _replace(output: Path, draft: Path) -> None:
    """Put `draft` in place of `output` in one step; the old bundle, if any, ends where the draft was."""
    if not output.exists():
        draft.rename(output)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(draft), os.fsencode(output)
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number), str(draft))
    old = output.parent / f".{output.name}.old-{os.getpid()}"  # a file system that cannot exchange, as NFS
    output.rename(old)
    try:
        draft.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)
