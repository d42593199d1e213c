"""A folder of pictures: one subfolder for each class, or metadata.jsonl with captions or labels."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilf_trt.contract.document import DocumentError, parse_json
from ilf_trt.errors import DataError, InvalidRequest, told
from ilf_trt.files import is_folder

from .picture import EXTENSIONS, pixels_of
from .sample import Condition, Sample

METADATA_FILE = "metadata.jsonl"
MOST_CLASSES = 1 << 20
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))
FIELDS = {"label": Condition.LABEL, "text": Condition.CAPTION}


class ImageFolder:
    """The samples of a folder. Its class subfolders, sorted by name, are the labels 0, 1, …

    With metadata.jsonl in the folder, the lines of that file are the samples. Raises InvalidRequest if the folder is
    missing or empty, DataError for a line of metadata.jsonl that is damaged.
    """

    null = None

    def __init__(self, folder: str | Path, *, size: int, channels: int = 3) -> None:
        self.folder, self.size, self.channels = Path(folder), size, channels
        if not is_folder(self.folder):
            raise InvalidRequest(
                f"{folder} is not a folder; give one with a subfolder for every class, or {_METADATA_HINT}"
            )
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
                f"{folder} holds no picture ({', '.join(EXTENSIONS)}) in a class subfolder, and no {_METADATA_HINT}"
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
        if classes and {name.lower() for name in classes} <= SPLITS:
            raise InvalidRequest(
                f"{self.folder} holds {' and '.join(classes)}, which are parts of a data set and no classes; give one "
                f"of them, such as {self.folder / classes[-1]}"
            )
        self.classes = len(classes)
        for label, name in enumerate(classes):
            pictures = sorted(_pictures(self.folder / name, f"{name}/"))
            self.names += pictures
            self.values += [label] * len(pictures)

    def _list_lines(self, path: Path) -> None:
        fields = set()
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(_utf8_lines(path, lines), 1):
                if not line.strip():
                    continue
                name, field, value = _entry(f"{path}, line {number}", line)
                fields.add(field)
                self.names.append(name)
                self.values.append(value)
        if len(fields) > 1:
            raise DataError(f"{path} has text in some lines and label in others; keep only text or only label")
        self.condition = FIELDS[fields.pop()] if fields else Condition.LABEL
        if self.condition is Condition.LABEL and self.names:
            self.classes = 1 + max(int(value) for value in self.values)


_METADATA_HINT = f'{METADATA_FILE} with a line such as {{"file_name": "0001.png", "text": "a red bird"}} for each'


def _pictures(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _pictures(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.name.rpartition(".")[2].lower() in EXTENSIONS:
                yield prefix + entry.name


def _utf8_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}; save it as UTF-8") from error


def _entry(where: str, line: str) -> tuple[str, str, Any]:
    """The file name of a line, the field that it has, and the value of the field."""
    try:
        entry = parse_json(line)
    except DocumentError as error:
        raise DataError(f"{where} {error.reason}; correct that line") from error
    if not isinstance(entry.get("file_name"), str):
        raise DataError(f"{where} has no file_name; give the picture's path below the folder")
    fields = [field for field in FIELDS if field in entry]
    if len(fields) != 1:
        raise DataError(f"{where} has {' and '.join(fields) or 'neither text nor label'}; give text or label")
    (field,) = fields
    value = entry[field]
    found = told(value)
    if field == "label" and (type(value) is not int or not 0 <= value < MOST_CLASSES):
        raise DataError(f"{where}: label is {found}, it must be a whole number from 0 to {MOST_CLASSES - 1}")
    if field == "text" and not isinstance(value, str):
        raise DataError(f"{where}: text is {found}, it must be text")
    return entry["file_name"], field, value
