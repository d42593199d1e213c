"""The weights of a model's folder: which safetensors files hold them, and what their headers say, before any is loaded.

A header says name, dtype, shape and place of each tensor. It is held against the tensors that the model wants, so that
nothing is misread, left out, or left as it lay in memory.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ilf_trt.contract.document import DocumentError
from ilf_trt.errors import CheckpointError, one_line, shown

from .hub_folder import read_config
from .tensor_file import read_header

BITS = {"F32": 32, "F16": 16, "BF16": 16}
"""Of the numbers that are read; all others are quantised, or of no model here."""
VARIANTS = ("fp32", "fp16", "bf16")
MOST_SHARDS = 1 << 10
NAMED = 3  # tensors in a message
NAME_CHARS, FOLDER_CHARS = 80, 110

Shape = tuple[int, ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    file: Path
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a folder by name; `variant` is "fp16" for files such as `model.fp16.safetensors`, else None."""

    folder: Path
    variant: str | None
    tensors: dict[str, Stored]

    @classmethod
    def of(cls, folder: Path, stem: str) -> "Weights":
        """The files `stem`.safetensors, its shards, or else those of a variant.

        Raises CheckpointError for files that are missing or damaged, are no safetensors, or hold quantised weights.
        """
        variant, files, index = _files(folder, stem)
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, tensor in _header(file):
                if tensors.setdefault(name, tensor) is not tensor:
                    raise CheckpointError(
                        f"{file.parent}: {_shown(name)} is in {tensors[name].file.name} and in {file.name}; "
                        "remove the files of another model"
                    )
        if index is not None and tensors.keys() != index:
            raise CheckpointError(
                f"{folder}: shards and index differ in {listed(tensors.keys() ^ index)}; copy the folder again"
            )
        if variant is not None:
            _announce(folder, variant)
        return cls(folder, variant, tensors)

    @property
    def numbers(self) -> int:
        """How many numbers the tensors hold together."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def check(self, wanted: Mapping[str, Shape]) -> None:
        """Raises CheckpointError unless the tensors are those of `wanted`: names and shapes."""
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        for what, names in (
            ("lacks weights that its config.json asks for", wanted.keys() - found),
            ("holds weights that its config.json has no place for", found.keys() - wanted),
        ):
            if names:
                raise CheckpointError(
                    f"{self.folder} {what}: {listed(names)}; give weights and config.json of one model"
                )
        for name, shape in wanted.items():
            if found[name] != tuple(shape):
                raise CheckpointError(
                    f"{self.folder}: {_shown(name)} is {found[name]}, its config.json says {tuple(shape)}; "
                    "give weights and config.json of one model"
                )


def listed(names: Iterable[str]) -> str:
    """Some of the names, for a message."""
    first = sorted(names)
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return ", ".join(map(_shown, first[:NAMED])) + more


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError for NaN and infinity, by the name of the tensor."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{what} holds NaN or infinity in {name}; use weights from before training diverged")


@cache
def _announce(folder: Path, variant: str) -> None:
    log.warning("%s: its %s weights are read, there are no others", folder, variant)


def _files(folder: Path, stem: str) -> tuple[str | None, list[Path], set[str] | None]:
    """The variant, the files, and the names in the index of shards if there is one."""
    for variant in (None, *VARIANTS):
        one = folder / (f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors")
        index = folder / f"{stem}.safetensors.index{'' if variant is None else f'.{variant}'}.json"
        if index.is_file() and not one.is_file():
            shards, names = _shards(index)
            return variant, shards, names
        if one.is_file():
            return variant, [one], None
    raise _missing(folder, stem)


def _shards(index: Path) -> tuple[list[Path], set[str]]:
    names = read_config(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} holds no weight_map; copy it again")
    files = sorted({str(file) for file in names.values()})
    for file in files:
        if Path(file).name != file or file.startswith("."):
            raise CheckpointError(f"{index} names {_shown(file)!r}, outside the folder; do not use it")
    if len(files) > MOST_SHARDS:
        raise CheckpointError(f"{index} names {len(files)} shards, at most {MOST_SHARDS} are read; do not use it")
    for file in files:
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file} is missing, {index.name} names it; copy all shards again")
    return [index.parent / file for file in files], set(names)


def _missing(folder: Path, stem: str) -> CheckpointError:
    """Without safetensors: how to convert the pickles that are there."""
    pickled = "pytorch_model" if stem == "model" else stem
    for variant in ("", *(f".{each}" for each in VARIANTS)):
        for pattern in (f"{pickled}{variant}.bin", f"{pickled}{variant}-*.bin", f"{pickled}-*{variant}.bin"):
            first = next(iter(sorted(path.name for path in folder.glob(pattern))), None)
            if first is not None:
                command = convert_command(first if first == pattern else pattern, f"{stem}{variant}.safetensors")
                return CheckpointError(
                    f"{shown(str(folder), FOLDER_CHARS)} has no safetensors, and pickles are not read; "
                    f"run there once: {command}"
                )
    return CheckpointError(
        f"{folder / stem}.safetensors is missing, and no shards or {', '.join(VARIANTS)} variants of it are there; "
        "copy the weights there"
    )


def convert_command(pickled: str, target: str) -> str:
    """A command for the shell in a folder, which makes safetensors of its pickle, or of the shards of a pattern."""
    shards = "*" in pickled
    each = f"for f in glob.glob('{pickled}')for k,v in t.load(f," if shards else f"for k,v in t.load('{pickled}',"
    return (
        f'python -c "import {"glob," if shards else ""}torch as t,safetensors.torch as s;'
        f"s.save_file({{k:v.clone(){each}weights_only=True).items()}},'{target}',{{'format':'pt'}})\""
    )


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        tensors = read_header(path)
    except (OSError, ValueError, DocumentError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({one_line(error)}); copy it again") from error
    for name, facts in tensors.items():
        if facts.dtype not in BITS:
            raise CheckpointError(
                f"{path}: {_shown(name)} is {_shown(facts.dtype)}, weights are read in float32, float16 and bfloat16 "
                "alone; quantised weights are not, give those that they were made of"
            )
        begin, end = facts.data_offsets
        if end - begin != prod(facts.shape) * BITS[facts.dtype] // 8:
            raise CheckpointError(f"{path} is damaged ({_shown(name)} has {end - begin} bytes); copy it again")
        yield name, Stored(path, facts.dtype, facts.shape)


def _shown(name: str) -> str:
    return shown(name, NAME_CHARS)
