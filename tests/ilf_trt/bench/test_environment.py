"""The environment tells the machine and the software, and nobody's name; Linux is a folder of files here."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ilf_trt.bench import environment
from ilf_trt.bench.environment import (
    MIB,
    Environment,
    commit_of,
    container_cores,
    container_memory_bytes,
    cpu_name,
    governor,
    public_command,
    versions,
)
from ilf_trt.contract.document import as_type

GIB = 1 << 30


@pytest.fixture
def linux(tmp_path: Path) -> Any:
    """Writes the files of a Linux; gives its root."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / NAMES[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


NAMES = {
    "cpuinfo": "proc/cpuinfo",
    "meminfo": "proc/meminfo",
    "group": "proc/self/cgroup",
    "cpu_max": "sys/fs/cgroup/cpu.max",
    "memory_max": "sys/fs/cgroup/memory.max",
    "slice_cpu_max": "sys/fs/cgroup/user.slice/cpu.max",
    "job_memory_max": "sys/fs/cgroup/user.slice/job/memory.max",
    "old_quota": "sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "old_period": "sys/fs/cgroup/cpu/cpu.cfs_period_us",
    "old_memory": "sys/fs/cgroup/memory/memory.limit_in_bytes",
    "governor": "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
}


def test_linux_tells_the_cpu_its_memory_and_its_governor(linux: Any) -> None:
    root = linux(
        cpuinfo="processor\t: 0\nmodel name\t: Fast CPU: 9000\n",
        meminfo="MemTotal:  2097152 kB\n",
        governor="powersave\n",
    )
    there = Environment.of(["ilf-trt", "bench"], root=root)
    assert (there.cpu, there.memory_mib, there.governor) == ("Fast CPU: 9000", 2048, "powersave")
    assert (there.container_cores, there.container_memory_mib, there.gpu) == (None, None, None)


def test_without_these_files_the_cpu_is_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert (cpu_name(tmp_path), governor(tmp_path)) == ("aarch64", "")
    assert Environment.of([], root=tmp_path).memory_mib == 0


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu_max": "150000 100000\n", "memory_max": f"{GIB}\n"}, 1.5, GIB),
        ({"cpu_max": "max 100000\n", "memory_max": "max\n"}, None, None),
        (
            {"group": "0::/user.slice/job\n", "slice_cpu_max": "400000 100000\n", "job_memory_max": str(2 * GIB)},
            4,
            2 * GIB,
        ),
        ({"group": "0::/../other\n", "cpu_max": "200000 100000"}, 2, None),
        ({"old_quota": "50000\n", "old_period": "100000\n", "old_memory": str(GIB)}, 0.5, GIB),
        ({"old_quota": "-1\n", "old_period": "100000\n", "old_memory": "9223372036854771712\n"}, None, None),
        ({"cpu_max": "100000 0\n"}, None, None),
    ],
)
def test_a_container_is_told_with_its_narrowest_limit(
    linux: Any, files: dict[str, str], cores: float | None, memory: int | None
) -> None:
    root = linux(**files)
    assert (container_cores(root), container_memory_bytes(root)) == (cores, memory)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/home/ann/bin/ilf-trt", "bench", "/home/ann/my model.ilf"], "ilf-trt bench my model.ilf"),
        (["ilf-trt", "bench", "--output=/home/ann/r", "-o", "~/r"], "ilf-trt bench --output=r -o r"),
        (["ilf-trt", "bench", "--compare", "../ann/a.json,/home/ann/b.json"], "ilf-trt bench --compare a.json,b.json"),
        (["ilf-trt", "bench", "results/a.ilf", "--batch", "1,4"], "ilf-trt bench results/a.ilf --batch 1,4"),
        (["ilf-trt", "bench", "--rate", "5"], "ilf-trt bench --rate 5"),
    ],
)
def test_a_command_is_shown_without_the_folders_of_its_user(arguments: list[str], shown: str) -> None:
    assert public_command(arguments) == shown


def test_an_environment_is_strict_plain_data_without_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment.platform, "node", lambda: pytest.fail("the name of the host was read"))
    monkeypatch.chdir(tmp_path)
    there = Environment.of(["ilf-trt", "bench", str(tmp_path / "a.ilf")])
    text = json.dumps(there.as_json(), allow_nan=False)
    assert as_type(json.loads(text), Environment) == there
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert there.memory_mib * MIB > GIB // 8
    assert there.usable_cores >= 1


def test_versions_leave_out_what_is_not_installed() -> None:
    found = versions(("numpy", "no-package-has-this-name"))
    assert list(found) == ["numpy"]
    assert found["numpy"][0].isdigit()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a project of this name, with one commit."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "ilf-trt"\n')
    (tmp_path / "docs").mkdir()
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_commit_is_that_of_a_checkout_of_this_project(checkout: Path) -> None:
    commit = commit_of(checkout / "docs")
    assert len(commit) >= 7
    assert int(commit, 16) > 0
    (checkout / "pyproject.toml").write_text('[project]\nname = "ilf-trt"\n\n')
    assert commit_of(checkout) == f"{commit}-dirty"


@pytest.mark.parametrize("project", ['[project]\nname = "another"\n', 'project = "ilf-trt"\n', "[project\n", ""])
def test_of_another_checkout_no_commit_is_told(checkout: Path, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "pyproject.toml").write_text(project)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git ran in a foreign folder"))
    assert commit_of(checkout) == ""


def test_reading_the_commit_runs_no_program_that_the_folder_names(checkout: Path) -> None:
    program, trace = checkout / "program.sh", checkout / "ran"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    git(checkout, "config", "core.fsmonitor", str(program))
    assert commit_of(checkout)
    assert not trace.exists()


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit_of(checkout) == ""
