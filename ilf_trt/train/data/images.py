"""A folder of pictures: a subfolder for every class, or captions and labels in metadata.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilf_trt.errors import DataError, InvalidRequest
from ilf_trt.train.data.picture import EXTENSIONS, pixels_of
from ilf_trt.train.data.sample import Condition, Sample

METADATA_FILE = "metadata.jsonl"
FIELDS = {"label": Condition.LABEL, "text": Condition.CAPTION}


class ImageFolder:
    """Class subfolders sorted by name are the labels 0, 1, …; with metadata.jsonl, its lines are the samples.

    Raises InvalidRequest when the folder is missing or empty, DataError when metadata.jsonl cannot be understood.
    """

    null = None

    def __init__(self, folder: str | Path, *, size: int, channels: int = 3) -> None:
        self.folder, self.size, self.channels = Path(folder), size, channels
        if not self.folder.is_dir():
            raise InvalidRequest(f"{folder} is not a folder; give one with a subfolder for every class, or {_LISTED}")
        self.names: list[str] = []
        self.values: list[int | str] = []
        self.condition = Condition.LABEL
        self.classes: int | None = None
        if (self.folder / METADATA_FILE).is_file():
            self._list_lines(self.folder / METADATA_FILE)
        else:
            self._list_classes()
        if not self.names:
            raise InvalidRequest(
                f"{folder} holds no picture ({', '.join(EXTENSIONS)}) in a subfolder for its class, and no {_LISTED}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Sample:
        name, value = self.names[index], self.values[index]
        x0 = pixels_of(name, self.folder / name, size=self.size, channels=self.channels)
        size = (self.size, self.size)
        if isinstance(value, int):
            return Sample(name, x0, size, label=value)
        return Sample(name, x0, size, caption=value)

    def _list_classes(self) -> None:
        with os.scandir(self.folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        self.classes = len(classes)
        for label, name in enumerate(classes):
            found = sorted(_pictures(self.folder / name, f"{name}/"))
            self.names += found
            self.values += [label] * len(found)

    def _list_lines(self, path: Path) -> None:
        kinds = set()
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(_decoded(path, lines), 1):
                if not line.strip():
                    continue
                name, field, value = _entry(f"{path}, line {number}", line)
                kinds.add(field)
                self.names.append(name)
                self.values.append(value)
        if len(kinds) > 1:
            raise DataError(f"{path} has text in some lines and label in others; keep one of both")
        self.condition = FIELDS[kinds.pop()] if kinds else Condition.LABEL
        if self.condition is Condition.LABEL and self.names:
            self.classes = 1 + max(int(value) for value in self.values)


_LISTED = f'{METADATA_FILE} with a line such as {{"file_name": "0001.png", "text": "a red bird"}} for each'


def _pictures(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _pictures(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.name.rpartition(".")[2].lower() in EXTENSIONS:
                yield prefix + entry.name


def _decoded(path: Path, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}; save it as UTF-8") from error


def _entry(where: str, line: str) -> tuple[str, str, Any]:
    """A line's file name, which field it has, and that field's value."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}; mend that line") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise DataError(f"{where} has no file_name; give the picture's path below the folder")
    found = [field for field in FIELDS if field in entry]
    if len(found) != 1:
        raise DataError(f"{where} has {' and '.join(found) or 'neither text nor label'}; give one of both")
    value = entry[found[0]]
    if found[0] == "label" and (type(value) is not int or value < 0):
        raise DataError(f"{where}: label is {value!r}, it must be a whole number from 0 on")
    if found[0] == "text" and not isinstance(value, str):
        raise DataError(f"{where}: text is {value!r}, it must be text")
    return entry["file_name"], found[0], value
