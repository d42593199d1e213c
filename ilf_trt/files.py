"""Reading files of others with a bound, and whole-or-nothing writing.

Only regular files are opened: a pipe or a device would keep the reader waiting. What is written stands complete at its
place, or not at all: a hidden draft is written beside the place and takes its name in one step. A killed process leaves
only a draft, which `sweep` removes later.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from .interrupts import check_interrupted

DRAFT = ".partial-"
DRAFT_NAME = re.compile(r"\.partial-(?:[0-9a-f]{8}|(?:[0-9a-f]{8}-)?(?P<pid>[0-9]+))$")  # old: without pid
MOST_BEGUN = 1000
_begun: dict[Path, None] = {}  # the last drafts of this process, most of them ended
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
UNSYNCED_FOLDER = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)  # one that cannot be read, and network file systems
COPY_BYTES = 1 << 26  # of one call to the kernel, so that a signal does not wait for a whole file


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read; raises OSError for anything else, such as a pipe, without waiting for it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: str | Path, *, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; raises OSError, also for one that is larger."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return content


def sha256_of_open(file: BinaryIO) -> str:
    """sha256 of what is left to read of a file, in hex."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def copy_file(source: Path, place: Path) -> None:
    """A copy of a regular file; the two share their blocks if the file system can do that. Raises OSError."""
    with open_regular(source) as file:
        copy_open_file(file, place)


def copy_open_file(file: BinaryIO, place: Path) -> None:
    """A copy of the whole of an open file. Raises OSError."""
    done = 0
    with place.open("wb") as copy:
        with suppress(OSError):  # what the kernel cannot copy is read and written below
            while count := os.copy_file_range(file.fileno(), copy.fileno(), COPY_BYTES, done, done):
                done += count
        file.seek(done)
        copy.seek(done)
        shutil.copyfileobj(file, copy)


def is_folder(path: str | Path) -> bool:
    """Whether a folder lies there; false also for a name that is too long or holds a null, unlike `Path.is_dir`."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """Whether a regular file lies there; false also for a name that is too long or holds a null."""
    return os.path.isfile(path)  # noqa: PTH113


@contextmanager
def whole_file(place: Path, *, mode: int | None = None) -> Iterator[Path]:
    """A hidden file beside `place`; when the block ends well it is synced to the disk and takes its name.

    The file has the permissions `mode` from its first moment, or those that a new file has here. Raises OSError.
    """
    draft = _draft_of(place)
    try:
        draft.touch(0o666 if mode is None else mode)
        permissions = draft.stat().st_mode
        yield draft
        draft.chmod(permissions)  # some writers let nobody but the owner read
        _sync(draft)
        check_interrupted()
        draft.replace(place)
        _sync(place.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(place: Path, content: bytes) -> None:
    """Make the file `place` hold `content`, and the folders above it; follows a link. Raises OSError."""
    place = Path(os.path.realpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    sweep(place)
    with whole_file(place) as draft:
        draft.write_bytes(content)


def check_writable(place: Path) -> None:
    """Raise OSError if `write_whole` cannot write at `place`; leaves nothing there."""
    place = Path(os.path.realpath(place))
    if place.exists() and not place.is_file():
        raise OSError(errno.EINVAL, "exists and is not a regular file", str(place))
    folder = next(above for above in place.parents if above.exists())
    draft = _draft_of(folder / place.name)
    try:
        draft.touch()
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(place: Path, *, replace: bool, sync: bool = False) -> Iterator[Path]:
    """A hidden folder beside `place`; when the block ends well it takes its name in one step.

    `replace` lets it take the place of another folder, which stays whole until then; without it, OSError says that
    somebody was first. `sync` writes the content through to the disk before. Raises OSError.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(place)
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, draft, ignore_errors=True)  # first: a signal may end mkdir after its work
        draft.mkdir()
        lock = os.open(draft, os.O_RDONLY)
        cleanup.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield draft
        if sync:
            for path in (*draft.rglob("*"), draft):
                _sync(path)
        check_interrupted()
        if replace and place.exists():
            _exchange(place, draft)
        else:
            draft.rename(place)
        if sync:
            _sync(place.parent)


def whole_link(place: Path, target: Path) -> None:
    """Point the symbolic link `place` at `target` in one step. Raises OSError."""
    draft = _draft_of(place)
    try:
        draft.symlink_to(target)
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)


def sweep(place: Path) -> None:
    """Remove the drafts of `place` whose process was killed: it is gone, or holds no lock. Raises OSError."""
    _remove_abandoned(place.parent.glob(f".{glob.escape(place.name)}{DRAFT}*"))


def sweep_folder(folder: Path) -> None:
    """Remove the abandoned drafts of every place in `folder`. Raises OSError."""
    _remove_abandoned(folder.glob(f".*{DRAFT}*"))


def remove_folder(folder: Path) -> None:
    """Remove a folder: first out of sight, so that no half of it is ever taken for a whole. Raises OSError.

    A link or a file of that name goes too; what a link leads to stays.
    """
    if os.path.lexists(folder):
        hidden = _draft_of(folder)
        folder.rename(hidden)
        if hidden.is_symlink() or not hidden.is_dir():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)


def _remove_abandoned(drafts: Iterable[Path]) -> None:
    for draft in drafts:
        name = DRAFT_NAME.search(draft.name)
        if name is None or (name["pid"] and name["pid"] != str(os.getpid()) and Path(f"/proc/{name['pid']}").exists()):
            continue
        if draft.is_symlink() or not draft.is_dir():
            draft.unlink(missing_ok=True)
            continue
        handle = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def drop_drafts() -> None:
    """Remove what this process began to write and did not end: a signal may come between two of Python's cleanups."""
    for draft in list(_begun):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _draft_of(place: Path) -> Path:
    draft = place.parent / f".{place.name}{DRAFT}{uuid4().hex[:8]}-{os.getpid()}"
    _begun[draft] = None
    while len(_begun) > MOST_BEGUN:
        _begun.pop(next(iter(_begun)), None)
    return draft


def _exchange(place: Path, draft: Path) -> None:
    """Put `draft` in place of `place` in one step; the old folder ends where the draft was."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(draft), os.fsencode(place)
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number), str(draft))
    old = place.parent / f".{place.name}.old-{os.getpid()}"  # a file system that cannot exchange, such as NFS
    place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk; not every file system can do that for a folder."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in UNSYNCED_FOLDER or not path.is_dir():
            raise
