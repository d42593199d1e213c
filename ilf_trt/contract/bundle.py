"""The bundle: a folder with graphs, a reference to check them by, and a manifest that says what they are."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from mmap import mmap
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from ilf_trt.errors import BundleError, one_line, shown
from ilf_trt.files import is_folder, open_regular, sha256_of_open

from .arrays import UNREADABLE, is_finite, mismatch, read_npz
from .document import DocumentError, read_json
from .held_file import HeldFile
from .manifest import FileFacts, Manifest

MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.npz"
CONSTANTS_FILE = "constants.npz"
TOKENIZER_FILE = "tokenizer.json"
GRAPH_FOLDER = "graphs"
WEIGHTS_SUFFIX = ".data"
ENGINE_FOLDER = "engines"
MAX_NAME = 200
MOST_ENTRIES = 10_000
BYSTANDERS = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE")
"""Files that a manifest need not list, as hidden ones; they are never read."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle on disk."""

    path: Path
    manifest: Manifest
    _held: dict[str, HeldFile] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, check_hashes: bool = True, max_bytes: int | None = None) -> "Bundle":
        """Read and check a bundle before anything in it is deserialised; raises BundleError.

        Names and sizes are always checked; `check_hashes=False` skips reading every file, and then refuses links that
        leave the bundle. Every file stays open: what is loaded later is what was checked now. `max_bytes` bounds the
        files together, before any is read.
        """
        path = Path(path)
        if not is_folder(path):
            raise BundleError(f"{path} is not a bundle: no such folder; make one with ilf-trt build --output {path}")
        manifest_path = path / MANIFEST_FILE
        if not os.path.lexists(manifest_path):
            raise BundleError(f"{path} holds no {MANIFEST_FILE}: half-written or not a bundle; build it again")
        try:
            data = read_json(manifest_path)
        except DocumentError as error:
            raise BundleError(f"{error}; build the bundle again") from error
        manifest = Manifest.from_json(data)
        _check_names(path, manifest)
        total_bytes = sum(facts.size_bytes for facts in manifest.files.values())
        if max_bytes is not None and total_bytes > max_bytes:
            raise BundleError(
                f"{path} has files of {total_bytes} bytes, more than the limit of {max_bytes}; load it on a larger "
                "machine, or pass a larger max_memory"
            )
        compiled = {facts.graph for facts in manifest.engines}
        names = [graph.name for graph in manifest.graphs if graph.name not in compiled]
        missing = [name for name in names if graph_file(name) not in manifest.files]
        if missing:
            raise BundleError(f"{path} lists no file for graph {missing[0]!r}; build the bundle again")
        if manifest.spec.constants and CONSTANTS_FILE not in manifest.files:
            raise BundleError(f"{path} lists no {CONSTANTS_FILE}; build the bundle again")
        _check_listed(path, manifest)
        bundle = cls(path, manifest)
        for name in manifest.files:
            if not check_hashes and not (path / name).resolve().is_relative_to(path.resolve()):
                raise BundleError(f"{path / name} is a link that leaves the bundle; load it with its hashes checked")
            bundle._hold(name, check_hash=check_hashes)
        return bundle

    def file(self, name: str) -> HeldFile:
        """A file of the manifest, checked; raises BundleError when the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} lists no {shown(name, MAX_NAME)}; build the bundle again")
        return self._held[name] if name in self._held else self._hold(name)

    def graph(self, graph: str) -> HeldFile:
        """The ONNX file of a graph; raises BundleError when the bundle was stripped to its engines."""
        if graph_file(graph) not in self.manifest.files:
            targets = ", ".join(dict.fromkeys(facts.target for facts in self.manifest.engines))
            raise BundleError(
                f"{self.path} was stripped to its {targets} engines and holds no graphs; load it on such a GPU, or "
                "build it without --strip-graphs"
            )
        return self.file(graph_file(graph))

    def weights(self, graph: str) -> mmap | bytes:
        """The content of a graph's own file of weights; nothing if it has none. Raises BundleError."""
        name = graph_file(graph) + WEIGHTS_SUFFIX
        return self.file(name).map() if name in self.manifest.files else b""

    def constants(self) -> dict[str, NDArray[Any]]:
        """The tensors of the feedback block that `cond` takes, under their ports' names; raises BundleError."""
        ports = self.manifest.spec.constants
        arrays = self.arrays(CONSTANTS_FILE) if ports else {}
        wanted = {port.name: (port.resolve({}), port.dtype) for port in ports}
        name = mismatch(arrays, wanted)
        if name is not None:
            raise BundleError(
                f"{self.path / CONSTANTS_FILE} lacks {name} as {wanted[name][1]} {wanted[name][0]}, finite; build the "
                "bundle again"
            )
        return {port.name: arrays[port.name] for port in ports}

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The finite arrays of an .npz of the bundle; raises BundleError."""
        held = self.file(name)
        try:
            with held.open() as file:
                arrays = read_npz(file, most=held.size_bytes)
        except UNREADABLE as error:
            raise BundleError(f"{held.path} cannot be read ({one_line(error)}); build the bundle again") from error
        for each, array in arrays.items():
            if not is_finite(array):
                raise BundleError(f"{held.path}: {shown(each, 60)} holds NaN or infinity; build the bundle again")
        return arrays

    def copy(self, folder: Path) -> None:
        """Write every file of the bundle into `folder`; raises BundleError, OSError."""
        for name in self.manifest.files:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            self.file(name).copy(place)

    @property
    def size_bytes(self) -> int:
        return sum(facts.size_bytes for facts in self.manifest.files.values())

    def _hold(self, name: str, *, check_hash: bool = True) -> HeldFile:
        facts = self.manifest.files[name]
        held = HeldFile(self.path / name, sha256=facts.sha256, size_bytes=facts.size_bytes, check_hash=check_hash)
        self._held[name] = held
        return held


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the facts of every file in `folder`, and return it."""
    files = {
        name: FileFacts(sha256_of(folder / name), (folder / name).stat().st_size)
        for name in sorted(_names(folder))
        if name != MANIFEST_FILE and name not in BYSTANDERS
    }
    manifest = Manifest(**{**{name: getattr(manifest, name) for name in Manifest.__slots__}, "files": files})
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.as_json(), indent=2) + "\n")
    return manifest


def strip_graphs(folder: Path, manifest: Manifest) -> Manifest:
    """Leave only the engines of a bundle, for machines that need nothing else; writes the manifest again."""
    shutil.rmtree(folder / GRAPH_FOLDER)
    return write_manifest(folder, manifest)


def graph_file(graph: str) -> str:
    """Where a graph's ONNX file lies in a bundle; its weights lie beside it, as `….data`."""
    return f"{GRAPH_FOLDER}/{graph}.onnx"


def weights_file(graph: Path) -> Path:
    """The file of the weights of the ONNX file `graph`."""
    return graph.with_name(graph.name + WEIGHTS_SUFFIX)


def _check_names(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError for a name that is no place in the bundle."""
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or name.startswith("/") or ".." in parts or not name.isprintable():
            raise BundleError(
                f"{folder}: manifest names {shown(name, 80)!r}, outside the bundle; do not use this bundle"
            )
        if "\\" in name or len(name) > MAX_NAME:
            raise BundleError(
                f"{folder}: manifest names {shown(name, 80)!r}, outside the bundle; do not use this bundle"
            )


def _check_listed(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError for a file in the folder that the manifest leaves out."""
    for name in _names(folder):
        if name not in manifest.files and name != MANIFEST_FILE and name not in BYSTANDERS:
            raise BundleError(
                f"{folder / name} is not in the manifest; remove it if it is yours, or copy the whole bundle again"
            )


def _names(folder: Path) -> Iterator[str]:
    """The files of a bundle, without hidden ones; raises BundleError when there are too many."""
    left, count = [""], 0
    while left:
        below = left.pop()
        try:
            with os.scandir(folder / below) as opened:
                entries = [(entry.name, entry.is_dir()) for entry in islice(opened, MOST_ENTRIES)]
        except OSError as error:
            raise BundleError(f"{folder / below} cannot be read ({one_line(error)}); copy the bundle again") from error
        count += len(entries)
        if count >= MOST_ENTRIES:
            raise BundleError(f"{folder} holds {MOST_ENTRIES} files or more; it is no bundle of ilf-trt")
        for name, deeper in entries:
            if name.startswith("."):
                continue
            if deeper:
                left.append(f"{below}{name}/")
            else:
                yield f"{below}{name}"


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open_regular(path) as file:
        return sha256_of_open(file)
