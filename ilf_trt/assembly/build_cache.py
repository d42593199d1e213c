"""The build cache: files by the key of their content, so that a later build takes what an earlier one made.

What an entry is trusted for. Its key is a digest of what went in; its seal is a digest of the key, of each file and of
the note, under a secret that only this user has. So an entry that was edited, that was copied from another key, or that
somebody else made, is not used: it is removed, and the build makes it again. The folder and all that is in it must
belong to this user or to root, and nobody else may write there; otherwise the build goes on without the cache. TensorRT
writes its kernel timings by itself, so for them only the second rule holds. Whoever runs as this user, or as root, is
trusted: they can read the secret.
"""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ilf_trt.contract.document import DocumentError
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.errors import one_line, shown
from ilf_trt.files import copy_file, copy_open_file, remove_folder, sweep_folder, whole_folder

from .cache_entry import ENTRY_FILE, Entry, NoteValue, open_own, seal_folder
from .ownership import PRIVATE_FILE, own_folder
from .seal import Seal

ENTRIES = "entries"
TIMINGS = "timing"
OLD_BUNDLES = "bundles"  # where version 0.1 kept the bundles of the package
DAY_S = 86400

log = logging.getLogger(__name__)


class BuildCache:
    """A folder that several builds may use at once; an entry appears whole or not at all.

    A folder that cannot be used, or not be written, gives one warning, and the build goes on without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._warned = False

    def take(self, key: str, into: Mapping[str, Path]) -> Entry | None:
        """Put copies of the files of `key` where `into` says; None when the cache has none that can be used.

        Raises OSError when a place cannot be written.
        """
        if not self._has(key):
            return None
        try:
            seal = self._seal()
        except OSError as error:
            self._warn(error)
            return None
        with ExitStack() as stack:
            entry, files = self._open(key, seal, into, stack)
            for name, file in files.items():
                into[name].parent.mkdir(parents=True, exist_ok=True)
                copy_open_file(file, into[name])
        return entry

    def put(self, key: str, files: Mapping[str, Path], note: Mapping[str, NoteValue]) -> None:
        """Keep copies of `files` under their names; a cache that cannot be written only gives a warning."""
        try:
            with self.making(key, note) as draft:
                for name, path in files.items():
                    copy_file(path, draft / name)
        except OSError as error:
            self._warn(error)

    def find(self, key: str) -> Path | None:
        """The folder of an entry, to read in its place; None when the cache has none that can be used.

        Raises OSError when the cache cannot be used.
        """
        if not self._has(key):
            return None
        with ExitStack() as stack:
            entry, _ = self._open(key, self._seal(), None, stack)
        return None if entry is None else entry.folder

    @contextmanager
    def making(self, key: str, note: Mapping[str, NoteValue]) -> Iterator[Path]:
        """An empty folder; when the block ends well, what it holds is the entry of `key`, unless there is one by then.

        Raises OSError when the cache cannot be written.
        """
        seal = self._seal()
        place = self.folder / ENTRIES / key
        try:
            # Not synced to the disk: a crash may leave a damaged entry, which its seal gives away.
            with whole_folder(place, replace=False) as draft:
                yield draft
                seal_folder(draft, key, note, seal)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not place.is_dir():
                raise  # else another build was first: its entry is as good

    def entries(self) -> tuple[Entry, ...]:
        """Every entry that is one by its form, the last used first; raises OSError when others can write the cache."""
        entries = []
        for folder in self._folders():
            with suppress(OSError, DocumentError):
                entries.append(Entry.read(folder))
        return tuple(sorted(entries, key=lambda entry: -entry.used_s))

    def prune(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> tuple[Entry, ...]:
        """Remove what was not used for `max_age_s`, then the least recently used until `max_bytes` hold the rest.

        With neither, everything goes, timings too. What cannot be read always goes. Returns the entries that went.
        Raises OSError when others can write the cache.
        """
        everything = max_age_s is None and max_bytes is None
        entries = self.entries()
        removed, total_bytes, now = [], 0, time.time()
        for entry in entries:
            total_bytes += entry.size_bytes
            old = max_age_s is not None and now - entry.used_s > max_age_s
            if old or everything or (max_bytes is not None and total_bytes > max_bytes):
                _remove(entry.folder)
                removed.append(entry)
        for folder in self._folders():
            try:
                Entry.read(folder)
            except (OSError, DocumentError):
                _remove(folder)
        if everything:
            for name in (TIMINGS, OLD_BUNDLES):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        with suppress(OSError):
            sweep_folder(self.folder / ENTRIES)
        return tuple(removed)

    @contextmanager
    def timings(self, name: str) -> Iterator[Path | None]:
        """The file of a GPU's timings, held by one build at a time; None when the cache cannot be used."""
        path: Path | None = None
        with ExitStack() as stack:
            try:
                folder = self._own(TIMINGS)
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                lock = os.open(folder / f"{name}.held", flags, PRIVATE_FILE)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
                _remove_foreign(folder / name)
                path = folder / name
            except OSError as error:
                self._warn(error)
            yield path

    def _has(self, key: str) -> bool:
        return os.path.lexists(self.folder / ENTRIES / key)

    def _open(
        self, key: str, seal: Seal, names: Iterable[str] | None, stack: ExitStack
    ) -> tuple[Entry | None, dict[str, BinaryIO]]:
        """The entry of `key` with its files `names` open in `stack`; None, and it is removed, when it is not ours.

        An open file stays what it is when another process removes the entry.
        """
        folder = self.folder / ENTRIES / key
        try:
            entry = Entry.read(folder)
            files = entry.open_files(seal, names, stack)
        except (OSError, DocumentError) as error:
            log.warning("the cached build %s is removed and made again: %s", folder, _reason(error))
            _remove(folder)
            return None, {}
        with suppress(OSError):  # a cache that can only be read
            os.utime(folder / ENTRY_FILE)
        return entry, files

    def _seal(self) -> Seal:
        """The user's seal for a cache that nobody else can write; raises OSError."""
        self._own(ENTRIES)
        return Seal.of_user()

    def _own(self, name: str) -> Path:
        """A folder in the cache, made if need be; raises OSError, PermissionError when others can write it."""
        own_folder(self.folder)
        return own_folder(self.folder / name)

    def _folders(self) -> list[Path]:
        if not (self.folder / ENTRIES).is_dir():
            return []
        return sorted(folder for folder in self._own(ENTRIES).iterdir() if not folder.name.startswith("."))

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("the build cache %s is not used: %s; the build goes on without", self.folder, _reason(error))
        self._warned = True


def take_or_make(
    cache: BuildCache | None,
    key: str,
    places: Mapping[str, Path],
    note: Mapping[str, NoteValue],
    make: Callable[[], object],
) -> bool:
    """Take the files of `key` from the cache, or `make` them and keep them there; tells whether the cache had them."""
    if cache is not None and cache.take(key, places) is not None:
        return True
    make()
    if cache is not None:
        cache.put(key, places, note)
    return False


def entry_note(
    spec: ModelSpec, graph: str, precision: Precision, *, target: str, version: str = "", gpus: tuple[str, ...] = ()
) -> dict[str, NoteValue]:
    """What `ilf-trt cache ls` tells of an entry; `version` and `gpus` are an engine's."""
    model = f"{spec.kind} {spec.blocks}x{spec.width}"
    return {
        "graph": graph,
        "model": model,
        "precision": precision.value,
        "target": target,
        "version": version,
        "gpus": list(gpus),
    }


def _remove_foreign(timings: Path) -> None:
    if not os.path.lexists(timings):
        return
    try:
        open_own(timings).close()
    except OSError as error:
        log.warning("the cached timings are removed and made again: %s", _reason(error))
        remove_folder(timings)


def _remove(folder: Path) -> None:
    with suppress(OSError):  # what cannot be removed is refused again
        remove_folder(folder)


def _reason(error: Exception) -> str:
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return shown(f"{where}{one_line(error)}")
