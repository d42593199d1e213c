"""Webdataset shards: tar files; members with the same base name are one sample, and offsets give random access."""

import glob
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ilf_trt.contract.arrays import is_digits
from ilf_trt.contract.document import DocumentError, parse_json
from ilf_trt.errors import BrokenSample, DataError, InvalidRequest, one_line
from ilf_trt.files import is_file, is_folder, open_regular

from .images import MOST_CLASSES
from .picture import EXTENSIONS, pixels_of
from .sample import Condition, Sample

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
LABEL, CAPTIONS = "cls", ("txt", "json")
CAPTION_FIELDS = ("caption", "text")
PICKLED = ("pyd", "pickle", "pkl")
MEMBERS = (*EXTENSIONS, LABEL, *CAPTIONS)
BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one sample: the first byte and the length of each, by extension."""

    shard: Path
    name: str
    members: dict[str, tuple[int, int]]

    @property
    def key(self) -> str:
        return f"{self.shard.name}:{self.name}"

    def bytes_of(self, extension: str) -> bytes:
        """The content of a member; raises BrokenSample."""
        start, length = self.members[extension]
        try:
            with self.shard.open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise BrokenSample(self.key, one_line(error)) from error
        if len(data) != length:
            raise BrokenSample(self.key, f".{extension} is cut short: {len(data)} of {length} bytes")
        return data

    def text_of(self, extension: str) -> str:
        """The text of a member; raises BrokenSample."""
        try:
            return self.bytes_of(extension).decode()
        except UnicodeDecodeError as error:
            raise BrokenSample(self.key, f".{extension} is not UTF-8") from error


class TarShards:
    """The samples of all shards. The constructor lists every shard once; nothing is ever unpickled.

    The first sample decides between labels (.cls) and captions (.txt, .json). Raises InvalidRequest if there is no
    shard, DataError with the name of a shard that is damaged, cut short or holds pickled members.
    """

    null = None
    classes = None

    def __init__(self, path: str, *, size: int, channels: int = 3) -> None:
        self.size, self.channels = size, channels
        self.groups = [group for shard in shards_of(path) for group in _read_groups(shard)]
        if not self.groups:
            raise InvalidRequest(f"{path} holds no sample; a shard needs members such as 0001.jpg and 0001.cls")
        first = self.groups[0].members
        self.condition = Condition.LABEL if LABEL in first else Condition.CAPTION
        if self.condition is Condition.CAPTION and not any(name in first for name in CAPTIONS):
            raise DataError(
                f"{self.groups[0].key} has neither a label (.cls) nor a caption (.txt, .json); add one to every sample"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.groups)

    def key(self, index: int) -> str:
        return self.groups[index].key

    def read(self, index: int) -> Sample:
        group = self.groups[index]
        picture = next((name for name in EXTENSIONS if name in group.members), None)
        if picture is None:
            raise BrokenSample(group.key, f"has no picture ({', '.join(EXTENSIONS)})")
        size = (self.size, self.size)
        if self.condition is Condition.LABEL:
            label = _label(group)
            return Sample(group.key, self._pixels(group, picture), size, label=label)
        caption = _caption(group)
        return Sample(group.key, self._pixels(group, picture), size, caption=caption)

    def _pixels(self, group: Group, picture: str) -> Tensor:
        return pixels_of(group.key, group.bytes_of(picture), size=self.size, channels=self.channels)


def shards_of(path: str) -> list[Path]:
    """The shards of a path: one file, all .tar of a folder, a glob, or `{000..009}`; raises InvalidRequest."""
    shards: list[Path] = []
    for name in _expand_braces(path):
        if is_folder(name):
            shards += sorted(Path(name).glob("*.tar"))
        elif is_file(name):
            shards.append(Path(name))
        elif glob.has_magic(name):
            shards += sorted(Path(each) for each in glob.glob(name))  # noqa: PTH207
        else:
            raise InvalidRequest(f"shard {name} is missing; copy it there, or correct the path")
    if not shards:
        raise InvalidRequest(f"{path} holds no .tar; give a shard, a folder, a glob, or braces such as {{000..009}}")
    return shards


def _expand_braces(path: str) -> Iterator[str]:
    braces = BRACES.search(path)
    if braces is None:
        yield path
        return
    first, last = braces.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand_braces(f"{path[: braces.start()]}{number:0{len(first)}}{path[braces.end() :]}")


def _read_groups(shard: Path) -> list[Group]:
    groups: dict[str, Group] = {}
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as members:
            for member in members:
                if member.isreg():
                    _add(groups, shard, member)
            file.seek(members.offset)
            end = file.read(BLOCK_BYTES)
            if end != bytes(BLOCK_BYTES):
                raise tarfile.ReadError(f"no end mark at byte {members.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"shard {shard} is damaged or cut short ({one_line(error)}); copy it again") from error
    return list(groups.values())


def _add(groups: dict[str, Group], shard: Path, member: tarfile.TarInfo) -> None:
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    base, _, extension = name.partition(".")
    extension = extension.lower()
    if extension.rpartition(".")[2] in PICKLED:
        raise DataError(
            f"shard {shard} holds {member.name}, a pickle, and unpickling can run any code; write labels as .cls and "
            "captions as .txt or .json"
        )
    if extension not in MEMBERS or not base:
        return
    group = groups.setdefault(folder + slash + base, Group(shard, folder + slash + base, {}))
    if extension in group.members:
        raise DataError(f"shard {shard} holds {member.name} twice; give every sample its own name")
    group.members[extension] = (member.offset_data, member.size)


def _label(group: Group) -> int:
    if LABEL not in group.members:
        raise BrokenSample(group.key, "has no label (.cls)")
    text = group.text_of(LABEL).strip()
    if not is_digits(text) or int(text) >= MOST_CLASSES:
        raise BrokenSample(group.key, f"its label is {text[:20]!r}, it must be a whole number")
    return int(text)


def _caption(group: Group) -> str:
    if "txt" in group.members:
        return group.text_of("txt").strip()
    if "json" not in group.members:
        raise BrokenSample(group.key, "has no caption (.txt, .json)")
    try:
        entry = parse_json(group.text_of("json"))
    except DocumentError as error:
        raise BrokenSample(group.key, f".json {error.reason}") from error
    for field in CAPTION_FIELDS:
        if isinstance(entry.get(field), str):
            return str(entry[field])
    raise BrokenSample(group.key, f".json has no text under {' or '.join(CAPTION_FIELDS)}")
