"""A store of files on disk by the key of their content: what a build made once, a later one takes from here."""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ilf_trt.bundle import FileFacts, link_or_copy, sha256_of

ENTRY_FILE = "entry.json"
ENTRIES = "entries"
DAY_S = 86400
ABANDONED_S = DAY_S

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key's files, with what was said of them when they were put."""

    key: str
    folder: Path
    files: dict[str, FileFacts]
    note: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(facts.size_bytes for facts in self.files.values())

    @property
    def used_s(self) -> float:
        """When it was last put or taken, in seconds of the epoch."""
        return (self.folder / ENTRY_FILE).stat().st_mtime


class Store:
    """A folder that several builds may use at once; an entry appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, key: str, into: Mapping[str, Path]) -> Entry | None:
        """Put the files of `key` where `into` says, by hard link where that can be; None when the store has none.

        A file whose hash is no longer its own takes its entry with it.
        """
        folder = self.folder / ENTRIES / key
        entry = _read(folder)
        if entry is None or not entry.files.keys() >= into.keys():
            return None
        try:
            for name, place in into.items():
                if sha256_of(folder / name) != entry.files[name].sha256:
                    raise OSError(f"{folder / name} has changed")
                place.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(folder / name, place)
            os.utime(folder / ENTRY_FILE)
        except OSError as error:
            log.warning("the cached build %s cannot be used (%s); it is made anew", key, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return entry

    def put(self, key: str, files: Mapping[str, Path], note: Mapping[str, Any]) -> None:
        """Keep `files` under their names; a store that cannot be written is only warned about."""
        draft = self.folder / f"draft-{uuid4().hex}"
        try:
            draft.mkdir(parents=True)
            facts = {}
            for name, path in files.items():
                link_or_copy(path, draft / name)
                facts[name] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
            (draft / ENTRY_FILE).write_text(json.dumps({"files": facts, "note": dict(note)}, indent=2) + "\n")
            place = self.folder / ENTRIES / key
            place.parent.mkdir(exist_ok=True)
            with suppress(OSError):
                draft.rename(place)  # another build was first: its entry is as good
        except OSError as error:
            log.warning("the build cache %s cannot be written (%s); going on without", self.folder, error)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def entries(self) -> tuple[Entry, ...]:
        """Every entry, the last used first."""
        folders = sorted((self.folder / ENTRIES).glob("*")) if (self.folder / ENTRIES).is_dir() else []
        found = [entry for entry in map(_read, folders) if entry is not None]
        return tuple(sorted(found, key=lambda entry: -entry.used_s))

    def prune(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> tuple[Entry, ...]:
        """Remove what was not used for `max_age_s`, then the least recently used until `max_bytes` hold the rest.

        With neither, everything goes. Returns what was removed.
        """
        removed, kept_bytes, now = [], 0, time.time()
        for entry in self.entries():
            old = max_age_s is not None and now - entry.used_s > max_age_s
            full = max_bytes is not None and kept_bytes + entry.size_bytes > max_bytes
            if old or full or (max_age_s is None and max_bytes is None):
                shutil.rmtree(entry.folder, ignore_errors=True)
                removed.append(entry)
            else:
                kept_bytes += entry.size_bytes
        for draft in self.folder.glob("draft-*"):
            with suppress(OSError):
                if now - draft.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(draft, ignore_errors=True)
        return tuple(removed)

    @contextmanager
    def locked_file(self, name: str) -> Iterator[Path | None]:
        """A file beside the entries, held by one build at a time; None when the store cannot be written."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            log.warning("the build cache %s cannot be written (%s); going on without", self.folder, error)
            yield None
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
        finally:
            os.close(lock)


def _read(folder: Path) -> Entry | None:
    try:
        data = json.loads((folder / ENTRY_FILE).read_text())
        files = {str(name): FileFacts(str(f["sha256"]), int(f["size_bytes"])) for name, f in data["files"].items()}
        if any(Path(name).name != name for name in files):
            return None
        return Entry(folder.name, folder, files, dict(data["note"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
