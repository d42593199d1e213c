"""The bundle: a folder with graphs, a reference to check them by, and a manifest that says what they are."""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ilf_trt.contract import Batch, Calibrator, Graph, Loop, ModelSpec, Port, Precision, graphs_of
from ilf_trt.errors import BundleError, InvalidRequest
from ilf_trt.schedule import StepPlan

SCHEMA = 2
MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.npz"
CONSTANTS_FILE = "constants.npz"
GRAPH_FOLDER = "graphs"
ENGINE_FOLDER = "engines"
MAX_NAME = 200
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
UNREADABLE_NPZ = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise for a file that is no whole .npz."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file of the bundle must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What FP8's scales come from: the largest |input| of each Linear that runs in FP8, by its name in the model.

    `calibrator` measured it while `pictures` were sampled.
    """

    calibrator: Calibrator
    pictures: int
    amax: dict[str, float]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One graph's engine: where it lies, what built it, and what it runs on.

    `gpus` are architectures (`sm90`); `gpu_name` and `driver` are those of the machine that built it, empty where it
    was built ahead of time. `any_gpu_of_architecture` lets other cards of the same architecture run it. `key` names its
    content in the build cache.
    """

    graph: str
    target: str
    file: str
    report: str
    library_version: str
    gpus: tuple[str, ...]
    gpu_name: str
    driver: str
    any_gpu_of_architecture: bool
    key: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything the runtime needs to know before it opens a graph; `scales` (m,) are the learned feedback scales."""

    spec: ModelSpec
    precision: Precision
    batch: Batch
    graphs: tuple[Graph, ...]
    scales: tuple[float, ...]
    plan: StepPlan
    scheduler: dict[str, Any]
    guidance_scale: float
    base_sha256: str
    tools: dict[str, str]
    fp8: Calibration | None
    engines: tuple[EngineFacts, ...]
    files: dict[str, FileFacts]

    def as_json(self) -> dict[str, Any]:
        """Plain data; `Manifest.from_json` reads it back."""
        return {"schema": SCHEMA, **asdict(self), "plan": self.plan.as_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """Raises BundleError for a newer schema or a field that is missing or wrong."""
        schema = data.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            hint = "upgrade ilf-trt" if newer else "build the bundle anew"
            raise BundleError(f"manifest schema is {schema!r}, this version reads {SCHEMA}; {hint}")
        try:
            spec = data["spec"]
            manifest = cls(
                spec=ModelSpec(
                    **{
                        **spec,
                        "latent": tuple(spec["latent"]),
                        "loop": Loop(**spec["loop"]),
                        "conditions": _ports(spec["conditions"]),
                        **{name: _ports(spec[name]) for name in ("context", "per_block", "constants")},
                    }
                ),
                precision=Precision(data["precision"]),
                batch=Batch(**data["batch"]),
                graphs=tuple(
                    Graph(graph["name"], _ports(graph["inputs"]), _ports(graph["outputs"])) for graph in data["graphs"]
                ),
                scales=tuple(float(value) for value in data["scales"]),
                plan=StepPlan.from_json(data["plan"]),
                scheduler=dict(data["scheduler"]),
                guidance_scale=float(data["guidance_scale"]),
                base_sha256=str(data["base_sha256"]),
                tools=dict(data["tools"]),
                fp8=None if data["fp8"] is None else _calibration(data["fp8"]),
                engines=tuple(EngineFacts(**{**facts, "gpus": tuple(facts["gpus"])}) for facts in data["engines"]),
                files={
                    str(name): FileFacts(str(facts["sha256"]), int(facts["size_bytes"]))
                    for name, facts in data["files"].items()
                },
            )
            manifest.check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(f"manifest field missing or wrong ({error!r}); build the bundle anew") from error
        return manifest

    def check(self) -> None:
        """Raise InvalidRequest when parts of the manifest contradict one another."""
        spec, plan = self.spec, self.plan
        sizes = (spec.blocks, spec.width, spec.tokens, *spec.latent, spec.train_timesteps, *asdict(spec.loop).values())
        if not all(isinstance(size, int) for size in sizes):
            raise InvalidRequest("the model's dimensions are not whole numbers")
        spec.loop.check(spec.blocks)
        if not all(isinstance(n, int) for n in asdict(self.batch).values()):
            raise InvalidRequest("the batch is not in whole numbers")
        Batch.parse(f"{self.batch.min}:{self.batch.opt}:{self.batch.max}")
        if self.graphs != graphs_of(spec, self.precision):
            raise InvalidRequest("the graphs' ports are not those of the model")
        if (plan.blocks, plan.loop) != (spec.blocks, spec.loop):
            raise InvalidRequest("the plan is for another model or loop")
        names = {graph.name for graph in self.graphs}
        for facts in self.engines:
            if facts.graph not in names or not {facts.file, facts.report} <= self.files.keys():
                raise InvalidRequest(f"an engine of graph {facts.graph!r} is not among the files")
        if (self.fp8 is not None) != (self.precision is Precision.FP8):
            raise InvalidRequest("the FP8 facts do not go with the precision")
        if len(self.scales) != spec.loop.size or not all(map(isfinite, (*self.scales, self.guidance_scale))):
            raise InvalidRequest(f"{len(self.scales)} scales for {spec.loop.size} loop blocks, or one is not finite")


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
            raise BundleError(f"{path} holds no {MANIFEST_FILE}: half-written or not a bundle; build it anew")
        try:
            data = json.loads(manifest_path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{manifest_path} is not readable JSON ({error}); build the bundle anew") from error
        if not isinstance(data, dict):
            raise BundleError(f"{manifest_path} holds {type(data).__name__}, expected an object; build the bundle anew")
        manifest = Manifest.from_json(data)
        for name, facts in manifest.files.items():
            _check_file(path, name, facts, check_hashes=check_hashes)
        compiled = {facts.graph for facts in manifest.engines}
        names = [graph.name for graph in manifest.graphs if graph.name not in compiled]
        missing = [name for name in names if graph_file(name) not in manifest.files]
        if missing:
            raise BundleError(f"{path} lists no file for graph {missing[0]!r}; build the bundle anew")
        if manifest.spec.constants and CONSTANTS_FILE not in manifest.files:
            raise BundleError(f"{path} lists no {CONSTANTS_FILE}; build the bundle anew")
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
                    f"{self.path / CONSTANTS_FILE} lacks {port.name} as {port.dtype}; build the bundle anew"
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


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz of a bundle; raises BundleError."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except UNREADABLE_NPZ as error:
        raise BundleError(f"{path} cannot be read ({error}); build the bundle anew") from error


@contextmanager
def drafted(output: str | Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    An old bundle at `output` stays whole until it is exchanged. Raises BundleError when `output` exists and `force` is
    not set, when it is no bundle, or when the disk is full or not writable.
    """
    try:
        output = Path(os.path.realpath(output))
        _check_place(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output)
        draft = output.parent / f".{output.name}.partial-{uuid4().hex[:8]}-{os.getpid()}"
        draft.mkdir()
        lock = os.open(draft, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, ValueError) as error:
        raise _unwritable(Path(output), error) from error
    try:
        try:
            yield draft
        except OSError as error:
            if error.errno in UNWRITABLE:
                raise _unwritable(output, error) from error
            raise
        try:
            _check_place(output, force=force)
            _replace(output, draft)
        except OSError as error:
            raise _unwritable(output, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


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
    """Leave only the engines of a bundle, for machines that need nothing else; writes the manifest anew."""
    shutil.rmtree(folder / GRAPH_FOLDER)
    return write_manifest(folder, manifest)


def link_or_copy(source: Path, place: Path) -> None:
    """`place` with the content of `source`: the same file where the file system allows."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _calibration(data: Mapping[str, Any]) -> Calibration:
    amax = {str(name): float(value) for name, value in data["amax"].items()}
    return Calibration(Calibrator(data["calibrator"]), int(data["pictures"]), amax)


def _ports(data: list[dict[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(**{**port, "shape": tuple(port["shape"])}) for port in data)


def graph_file(graph: str) -> str:
    """Where a graph's ONNX file lies in a bundle; its weights lie beside it, as `….data`."""
    return f"{GRAPH_FOLDER}/{graph}.onnx"


def _check_file(folder: Path, name: str, facts: FileFacts, *, check_hashes: bool) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise BundleError(f"{folder}: manifest names {name!r}, outside the bundle; do not use this bundle")
    path = folder / relative
    if len(name) > MAX_NAME or not path.is_file():
        raise BundleError(f"{path} is missing; copy the whole bundle again, or build it anew")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leaves the bundle; do not use this bundle")
    size_bytes = path.stat().st_size
    if size_bytes != facts.size_bytes:
        raise BundleError(f"{path} has {size_bytes} bytes, the manifest says {facts.size_bytes}; copy the bundle again")
    if check_hashes and (found := sha256_of(path)) != facts.sha256:
        raise BundleError(
            f"{path} has sha256 {found[:12]}…, the manifest says {facts.sha256[:12]}…; copy the bundle again"
        )


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_place(output: Path, *, force: bool) -> None:
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise BundleError(f"{output} exists and is not a bundle; it is left alone, pass another --output")
    if output.exists() and not force:
        raise BundleError(f"{output} exists; pass --force to replace it, or another --output")


def _unwritable(output: Path, error: Exception) -> BundleError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    hint = "free some space or choose another --output" if full else "choose a writable --output"
    return BundleError(f"cannot write {str(output)!r}: {reason}; {hint}")


def _sweep(output: Path) -> None:
    """Remove drafts of builds that were killed: their process is gone, or bears our number now, and holds no lock."""
    for stale in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if not pid.isdecimal() or (Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()):
            continue
        handle = os.open(stale, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def _replace(output: Path, draft: Path) -> None:
    """Put `draft` in place of `output` in one step; the old bundle, if any, ends where the draft was."""
    if not output.exists():
        draft.rename(output)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(draft), os.fsencode(output)
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number), str(draft))
    old = output.parent / f".{output.name}.old-{os.getpid()}"  # a file system that cannot exchange, as NFS
    output.rename(old)
    try:
        draft.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)
