"""An entry of the build cache: a folder of files, sealed with the key that it was made for."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ilf_trt.contract.bundle import sha256_of
from ilf_trt.contract.document import DocumentError, as_type, read_json
from ilf_trt.contract.manifest import FileFacts
from ilf_trt.errors import shown
from ilf_trt.files import open_regular, sha256_of_open

from .ownership import check_own, make_own
from .seal import Seal

ENTRY_FILE = "entry.json"
MOST_BYTES = 1 << 20  # of an entry file
NoteValue = str | list[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """The files of one key, and the note that came with them.

    `used_s` is when a build last put or took it, in seconds of the epoch.
    """

    key: str
    folder: Path
    files: dict[str, FileFacts]
    note: dict[str, NoteValue]
    used_s: float
    seal: str

    @property
    def size_bytes(self) -> int:
        return sum(facts.size_bytes for facts in self.files.values())

    @classmethod
    def read(cls, folder: Path) -> "Entry":
        """The entry in a folder, by its form alone; raises OSError, DocumentError."""
        path = folder / ENTRY_FILE
        record = as_type(read_json(path, most=MOST_BYTES), _Record)
        for name in record.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
                raise DocumentError(f"{path} names a file outside of the entry")
        return cls(folder.name, folder, record.files, record.note, path.stat().st_mtime, record.seal)

    def open_files(self, seal: Seal, names: Iterable[str] | None, stack: ExitStack) -> dict[str, BinaryIO]:
        """The files `names`, open in `stack` and checked: nobody else can write them, and they are what was sealed.

        Without names it opens all files, and no other file may be there. Raises OSError, DocumentError.
        """
        check_own(self.folder)
        check_own(self.folder / ENTRY_FILE)
        if not seal.fits(_sealed(self.key, self.files, self.note), self.seal):
            raise DocumentError("its seal is not that of this user and this key")
        if names is None:
            names = self.files
            self._refuse_strangers()
        files = {}
        for name in names:
            if name not in self.files:
                raise DocumentError(f"it holds no {name}")
            file = files[name] = stack.enter_context(open_own(self.folder / name))
            facts = self.files[name]
            if os.fstat(file.fileno()).st_size != facts.size_bytes or sha256_of_open(file) != facts.sha256:
                raise DocumentError(f"{name} is not what the build made")
        return files

    def _refuse_strangers(self) -> None:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                check_own(path)
            elif name != ENTRY_FILE and name not in self.files:
                raise DocumentError(f"it holds {shown(name)!r}, which the build did not make")


def seal_folder(folder: Path, key: str, note: Mapping[str, NoteValue], seal: Seal) -> None:
    """Make a folder of files the entry of `key`. Raises OSError."""
    files = {
        path.relative_to(folder).as_posix(): FileFacts(sha256_of(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    sealed = _sealed(key, files, note)
    record = {"seal": seal.of(sealed), "files": sealed["files"], "note": sealed["note"]}
    (folder / ENTRY_FILE).write_text(json.dumps(record, indent=2) + "\n")
    make_own(folder)


def open_own(path: Path) -> BinaryIO:
    """A regular file that nobody else can write; raises OSError."""
    file = open_regular(path)
    try:
        check_own(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


@dataclass(frozen=True, slots=True)
class _Record:
    """What `entry.json` holds."""

    seal: str
    files: dict[str, FileFacts]
    note: dict[str, NoteValue]


def _sealed(key: str, files: Mapping[str, FileFacts], note: Mapping[str, NoteValue]) -> dict[str, Any]:
    return {"key": key, "files": {name: asdict(facts) for name, facts in files.items()}, "note": dict(note)}
