"""The bundle: a folder with graphs, a reference to check them by, and a manifest that says what they are."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from ilf_trt.errors import BundleError

from .arrays import read_arrays
from .manifest import FileFacts, Manifest

MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.npz"
CONSTANTS_FILE = "constants.npz"
TOKENIZER_FILE = "tokenizer.json"
GRAPH_FOLDER = "graphs"
WEIGHTS_SUFFIX = ".data"
ENGINE_FOLDER = "engines"
MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, check_hashes: bool = True) -> "Bundle":
        """Read and check a bundle before anything in it is deserialised; raises BundleError.

        Names and sizes are always checked; `check_hashes=False` skips reading every file.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a bundle: no such folder; make one with ilf-trt build --output {path}")
        manifest_path = path / MANIFEST_FILE
        if not manifest_path.is_file():
            raise BundleError(f"{path} holds no {MANIFEST_FILE}: half-written or not a bundle; build it again")
        try:
            data = json.loads(manifest_path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{manifest_path} is not readable JSON ({error}); build the bundle again") from error
        if not isinstance(data, dict):
            kind = type(data).__name__
            raise BundleError(f"{manifest_path} holds {kind}, expected an object; build the bundle again")
        manifest = Manifest.from_json(data)
        for name, facts in manifest.files.items():
            _check_file(path, name, facts, check_hashes=check_hashes)
        compiled = {facts.graph for facts in manifest.engines}
        names = [graph.name for graph in manifest.graphs if graph.name not in compiled]
        missing = [name for name in names if graph_file(name) not in manifest.files]
        if missing:
            raise BundleError(f"{path} lists no file for graph {missing[0]!r}; build the bundle again")
        if manifest.spec.constants and CONSTANTS_FILE not in manifest.files:
            raise BundleError(f"{path} lists no {CONSTANTS_FILE}; build the bundle again")
        return cls(path, manifest)

    def graph_path(self, graph: str) -> Path:
        """The ONNX file of a graph; raises BundleError when the bundle was stripped to its engines."""
        if graph_file(graph) not in self.manifest.files:
            targets = ", ".join(dict.fromkeys(facts.target for facts in self.manifest.engines))
            raise BundleError(
                f"{self.path} was stripped to its {targets} engines and holds no graphs; load it on such a GPU, or "
                "build it without --strip-graphs"
            )
        return self.path / graph_file(graph)

    def constants(self) -> dict[str, NDArray[Any]]:
        """The tensors of the feedback block that `cond` takes, under their ports' names; raises BundleError."""
        ports = self.manifest.spec.constants
        arrays = read_arrays(self.path / CONSTANTS_FILE) if ports else {}
        for port in ports:
            array = arrays.get(port.name)
            if array is None or array.shape != port.shape or str(array.dtype) != port.dtype:
                raise BundleError(
                    f"{self.path / CONSTANTS_FILE} lacks {port.name} as {port.dtype}; build the bundle again"
                )
        return {port.name: arrays[port.name] for port in ports}

    def copy(self, folder: Path) -> None:
        """Put every file of the bundle into `folder`, by hard link where that can be."""
        for name in self.manifest.files:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(self.path / name, place)

    @property
    def size_bytes(self) -> int:
        return sum(facts.size_bytes for facts in self.manifest.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the facts of every file in `folder`, and return it."""
    files = {
        path.relative_to(folder).as_posix(): FileFacts(sha256_of(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    manifest = Manifest(**{**{name: getattr(manifest, name) for name in Manifest.__slots__}, "files": files})
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest.as_json(), indent=2) + "\n")
    return manifest


def strip_graphs(folder: Path, manifest: Manifest) -> Manifest:
    """Leave only the engines of a bundle, for machines that need nothing else; writes the manifest again."""
    shutil.rmtree(folder / GRAPH_FOLDER)
    return write_manifest(folder, manifest)


def link_or_copy(source: Path, place: Path) -> None:
    """`place` with the content of `source`: the same file where the file system allows.

    A graph's weights are always copied: onnx and onnx_ir refuse a file that bears a second name.
    """
    if WEIGHTS_SUFFIX not in (source.suffix, place.suffix):
        with suppress(OSError):
            os.link(source, place)
            return
    shutil.copyfile(source, place)


def graph_file(graph: str) -> str:
    """Where a graph's ONNX file lies in a bundle; its weights lie beside it, as `….data`."""
    return f"{GRAPH_FOLDER}/{graph}.onnx"


def weights_file(graph: Path) -> Path:
    """The file of the weights of the ONNX file `graph`."""
    return graph.with_name(graph.name + WEIGHTS_SUFFIX)


def _check_file(folder: Path, name: str, facts: FileFacts, *, check_hashes: bool) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise BundleError(f"{folder}: manifest names {name!r}, outside the bundle; do not use this bundle")
    path = folder / relative
    if len(name) > MAX_NAME or not path.is_file():
        raise BundleError(f"{path} is missing; copy the whole bundle again, or build it again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leaves the bundle; do not use this bundle")
    size_bytes = path.stat().st_size
    if size_bytes != facts.size_bytes:
        raise BundleError(f"{path} has {size_bytes} bytes, the manifest says {facts.size_bytes}; copy the bundle again")
    if check_hashes and (sha256 := sha256_of(path)) != facts.sha256:
        raise BundleError(
            f"{path} has sha256 {sha256[:12]}…, the manifest says {facts.sha256[:12]}…; copy the bundle again"
        )


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
