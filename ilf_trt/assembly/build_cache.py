"""The build cache: files by the key of their content, so that a later build takes what an earlier one made."""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilf_trt.contract.bundle import link_or_copy, sha256_of
from ilf_trt.contract.manifest import FileFacts
from ilf_trt.contract.spec import ModelSpec, Precision
from ilf_trt.files import sweep_folder, whole_folder

ENTRY_FILE = "entry.json"
ENTRIES = "entries"
TIMINGS = "timing"
DAY_S = 86400

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """The files of one key, and the note that came with them.

    `used_s` is when a build last put or took it, in seconds of the epoch.
    """

    key: str
    folder: Path
    files: dict[str, FileFacts]
    note: dict[str, Any]
    used_s: float

    @property
    def size_bytes(self) -> int:
        return sum(facts.size_bytes for facts in self.files.values())


class BuildCache:
    """A folder that several builds may use at once; an entry appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, key: str, into: Mapping[str, Path]) -> Entry | None:
        """Put the files of `key` where `into` says, by hard link if possible; None when the cache has none.

        All of them or none. A file that is missing, or whose hash is no longer its own, takes its entry with it.
        """
        folder = self.folder / ENTRIES / key
        if not folder.is_dir():
            return None
        entry = _read(folder)
        if entry is None or not _is_whole(entry, into):
            log.warning("the cached build %s is damaged; the build makes it again", folder)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        try:
            for name, place in into.items():
                place.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(folder / name, place)
        except OSError as error:
            log.warning("the cached build %s cannot be used (%s); the build makes it again", folder, error)
            for place in into.values():
                place.unlink(missing_ok=True)  # never written over: it may be the same file as in another bundle
            return None
        with suppress(OSError):  # a cache that can only be read
            os.utime(folder / ENTRY_FILE)
        return entry

    def put(self, key: str, files: Mapping[str, Path], note: Mapping[str, Any]) -> None:
        """Keep `files` under their names; a cache that cannot be written only gives a warning."""
        folder = self.folder / ENTRIES / key
        try:
            with suppress(FileExistsError), whole_folder(folder, replace=False) as draft:
                facts = {}
                for name, path in files.items():
                    link_or_copy(path, draft / name)
                    facts[name] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
                (draft / ENTRY_FILE).write_text(json.dumps({"files": facts, "note": dict(note)}, indent=2) + "\n")
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # another build was first: its entry is as good
                log.warning("the build cache %s cannot be written (%s); the build goes on without", self.folder, error)

    def entries(self) -> tuple[Entry, ...]:
        """Every entry, the last used first."""
        entries = [entry for entry in map(_read, self._folders()) if entry is not None]
        return tuple(sorted(entries, key=lambda entry: -entry.used_s))

    def prune(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> tuple[Entry, ...]:
        """Remove what was not used for `max_age_s`, then the least recently used until `max_bytes` hold the rest.

        With neither, everything goes, timings too. What cannot be read always goes. Returns the entries that went.
        """
        everything = max_age_s is None and max_bytes is None
        removed, total_bytes, now = [], 0, time.time()
        for entry in self.entries():
            total_bytes += entry.size_bytes
            old = max_age_s is not None and now - entry.used_s > max_age_s
            if old or everything or (max_bytes is not None and total_bytes > max_bytes):
                shutil.rmtree(entry.folder, ignore_errors=True)
                removed.append(entry)
        for folder in self._folders():
            if _read(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
        if everything:
            shutil.rmtree(self.folder / TIMINGS, ignore_errors=True)
        with suppress(OSError):
            sweep_folder(self.folder / ENTRIES)
        return tuple(removed)

    @contextmanager
    def timings(self, name: str) -> Iterator[Path | None]:
        """The file of a GPU's timings, held by one build at a time; None when the cache cannot be written."""
        path: Path | None = self.folder / TIMINGS / name
        with ExitStack() as stack:
            try:
                (self.folder / TIMINGS).mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / TIMINGS / f"{name}.held").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                log.warning("the build cache %s cannot be written (%s); the build goes on without", self.folder, error)
                path = None
            yield path

    def _folders(self) -> list[Path]:
        entries = self.folder / ENTRIES
        if not entries.is_dir():
            return []
        return sorted(folder for folder in entries.iterdir() if not folder.name.startswith("."))


def take_or_make(
    cache: BuildCache | None, key: str, places: Mapping[str, Path], note: Mapping[str, Any], make: Callable[[], object]
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
) -> dict[str, Any]:
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


def _is_whole(entry: Entry, names: Iterable[str]) -> bool:
    try:
        return all(name in entry.files and sha256_of(entry.folder / name) == entry.files[name].sha256 for name in names)
    except OSError:
        return False


def _read(folder: Path) -> Entry | None:
    try:
        data = json.loads((folder / ENTRY_FILE).read_text())
        files = {str(name): FileFacts(str(f["sha256"]), int(f["size_bytes"])) for name, f in data["files"].items()}
        if any(Path(name).name != name or name == ".." for name in files):
            return None
        return Entry(folder.name, folder, files, dict(data["note"]), (folder / ENTRY_FILE).stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
