"""The machine and the software of a measurement, `environment.json`; nothing in it tells whose they are."""

import os
import platform
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any, Self

from .gpu_probe import GpuState

SCHEMA = 1
ENVIRONMENT_FILE = "environment.json"
PROJECT = "ilf-trt"
TOOLS = (PROJECT, "torch", "diffusers", "onnx", "onnxruntime", "numpy", "tensorrt-rtx-cu13", "polygraphy")
GPU_TOOLS = ("tensorrt", "tensorrt-cu13", "onnxruntime-gpu", "cuda-core", "cuda-bindings", "triton", "cache-dit")
GIT_TIMEOUT_S = 10.0
ROOT = Path("/")
MIB = 1 << 20
UNLIMITED_BYTES = 1 << 60  # version 1 of cgroups writes a number near 2^63 for no limit


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a benchmark ran."""

    command: str
    """Without the folders that its paths lie in."""
    started: str
    """UTC, ISO 8601."""
    cpu: str
    cores: int
    """Of the machine, as Linux counts them."""
    usable_cores: int
    """That this process may run on."""
    container_cores: float | None
    """How many cores' time the container may use; None without a limit."""
    memory_mib: int
    container_memory_mib: int | None
    """None without a limit below the machine's memory."""
    governor: str
    """How Linux sets the clock of the first core, such as `performance`; empty if it does not tell."""
    gpu: GpuState | None
    """At the start, without work; None on a CPU, and if it cannot be read."""
    system: str
    python: str
    versions: dict[str, str]
    """Of the packages that matter, as far as they are installed."""
    commit: str
    """Of a checkout of this project that the command ran in, with `-dirty` if it was changed; empty elsewhere."""
    schema: int = SCHEMA

    @classmethod
    def of(cls, arguments: Sequence[str], gpu: GpuState | None = None, *, root: Path = ROOT) -> Self:
        """This machine now; `arguments` are those of the command line, the program first."""
        container_bytes = container_memory_bytes(root)
        return cls(
            command=public_command(arguments),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            cpu=cpu_name(root),
            cores=os.cpu_count() or 1,
            usable_cores=usable_cores(),
            container_cores=container_cores(root),
            memory_mib=_memory_bytes(root) // MIB,
            container_memory_mib=None if container_bytes is None else container_bytes // MIB,
            governor=governor(root),
            gpu=gpu,
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            versions=versions((*TOOLS, *GPU_TOOLS)),
            commit=commit_of(Path.cwd()),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data for `environment.json`."""
        return asdict(self)


def public_command(arguments: Sequence[str]) -> str:
    """A command line to show around: of a path outside of the current folder only its last part stays."""
    if not arguments:
        return ""
    program, *rest = arguments
    return " ".join([PurePath(program).name, *map(_public, rest)])


def cpu_name(root: Path = ROOT) -> str:
    """The model of the CPU; its architecture if Linux does not tell, as on ARM."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def container_cores(root: Path = ROOT) -> float | None:
    """How many cores' time the container may use; None without a limit."""
    limits = []
    for folder in _cgroups(root):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    quota, period = (_text(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal() and int(period):  # -1 without a limit
        limits.append(int(quota) / int(period))
    return min(limits, default=None)


def container_memory_bytes(root: Path = ROOT) -> int | None:
    """How much memory the container may use; None without a limit."""
    files = [folder / "memory.max" for folder in _cgroups(root)]
    files.append(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits = [int(text) for file in files if (text := _text(file).strip()).isdecimal()]
    return min((limit for limit in limits if limit < UNLIMITED_BYTES), default=None)


def governor(root: Path = ROOT) -> str:
    """How Linux sets the clock of the first core; empty if it does not tell, as in most virtual machines."""
    return _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()


def machine_load() -> float:
    """How many processes ran or waited to run in the last minute, for each usable core."""
    return os.getloadavg()[0] / usable_cores()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {package: _version(package) for package in packages}
    return {package: number for package, number in found.items() if number}


def commit_of(folder: Path) -> str:
    """The commit of the checkout of this project that `folder` lies in; empty elsewhere, and without git."""
    for place in (folder, *folder.parents):
        if (place / ".git").exists():
            return _describe(place) if _is_project(place) else ""
    return ""


def _public(argument: str) -> str:
    """`--output=/home/me/results` -> `--output=results`; each part of a list alone."""
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if not equals and flag:
        return argument
    return flag + equals + ",".join(PurePath(part).name if _is_outside(part) else part for part in value.split(","))


def _is_outside(text: str) -> bool:
    return text.startswith(("/", "~", "file:")) or ".." in PurePath(text).parts


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's group and of those above it; each may have a limit."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            own = PurePath(line[3:].strip().lstrip("/"))
            yield from (mount / part for part in (own, *own.parents) if ".." not in part.parts and part != PurePath())
    yield mount


def _memory_bytes(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _text(path: Path) -> str:
    """What a file of Linux says; nothing if there is no such file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _is_project(folder: Path) -> bool:
    try:
        project = tomllib.loads(_text(folder / "pyproject.toml")).get("project")
    except tomllib.TOMLDecodeError:
        return False
    return isinstance(project, dict) and project.get("name") == PROJECT


def _describe(folder: Path) -> str:
    """Without the hooks of that folder's git."""
    git = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false"]
    try:
        run = subprocess.run(
            [*git, "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()
