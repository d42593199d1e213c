"""The commands of the engines, as they are typed: compile, cache ls, cache prune."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ilf_trt.assembly.build_cache import DAY_S, BuildCache
from ilf_trt.cli import FAILED, INTERRUPTED, main
from ilf_trt.contract.bundle import Bundle
from ilf_trt.contract.ports import GRAPHS
from tests.engines.conftest import Worker, workers

TARGET = ("--target", "tensorrt-rtx", "--gpu", "sm89")
START_S = 60.0  # until a process has begun its work, on a busy machine
POLL_S = 0.02
# Lets the engine's file be one that the kernel finds no space for.
FULL_DISK = """
import os, sys
def full(event, arguments):
    path = str(arguments[0]) if arguments else ""
    if event == "open" and path.endswith(".engine") and not os.path.lexists(path):
        os.symlink("/dev/full", path)
sys.addaudithook(full)
return super().build_serialized_network(network, config)
"""
STEPS = """
import time
step = 0
while config.progress_monitor.step_complete("slow", step):
    time.sleep(0.02)
    step += 1
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder whose whole content a test may list."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


# --- compile


def test_engines_are_added_to_a_bundle_in_its_place(
    worker: Worker, dit_bundle: Path, place: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = place / "dit.ilf"
    Bundle.open(dit_bundle).copy(bundle)
    (bundle / "manifest.json").write_bytes((dit_bundle / "manifest.json").read_bytes())
    assert main(["compile", str(bundle), *TARGET, "--cache-dir", str(cache)]) == 0
    assert len(Bundle.open(bundle).manifest.engines) == len(GRAPHS)
    assert listing(place) == ["dit.ilf"]
    assert f"inspect {bundle} --engines" in said(capsys)


def test_an_output_that_exists_needs_force(
    worker: Worker, dit_bundle: Path, place: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", str(dit_bundle), *TARGET, "-o", str(place / "x.ilf"), "--cache-dir", str(cache)]
    assert main(command) == 0
    assert main(command) == FAILED
    assert "exists; pass --force" in refusal(capsys)
    assert main([*command, "--force"]) == 0
    assert "taken from the build cache: engine cond" in said(capsys)


def test_no_cache_builds_everything_again(worker: Worker, dit_bundle: Path, place: Path, cache: Path) -> None:
    for flags in ([], ["--no-cache"]):
        command = [
            "compile",
            str(dit_bundle),
            *TARGET,
            "-o",
            str(place / "x.ilf"),
            "--cache-dir",
            str(cache),
            "--force",
        ]
        assert main([*command, *flags]) == 0
    assert worker.built == [*GRAPHS, *GRAPHS]


def test_strip_graphs_leaves_the_engines_alone(worker: Worker, dit_bundle: Path, place: Path) -> None:
    output = place / "x.ilf"
    assert main(["compile", str(dit_bundle), *TARGET, "-o", str(output), "--no-cache", "--strip-graphs"]) == 0
    assert not (output / "graphs").exists()
    assert len(Bundle.open(output).manifest.engines) == len(GRAPHS)


def test_compile_needs_a_target(dit_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(dit_bundle)]) == FAILED
    assert "compile needs --target tensorrt, or --target tensorrt-rtx --gpu sm89,sm120" in refusal(capsys)


def test_a_full_disk_leaves_neither_a_bundle_nor_an_entry(
    failing: Callable[[str], None], dit_bundle: Path, place: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(FULL_DISK)
    output = place / "x.ilf"
    assert main(["compile", str(dit_bundle), *TARGET, "-o", str(output), "--cache-dir", str(cache)]) == FAILED
    assert refusal(capsys).startswith(f"error: cannot write '{output}': No space left on device; free some space")
    assert listing(place) == []
    assert BuildCache(cache).entries() == ()


@pytest.mark.parametrize("statements", ["import os; os.kill(os.getpid(), 9)", "return None", "raise KeyError(1)"])
def test_a_build_that_fails_ends_in_one_line_and_leaves_the_old_bundle(
    statements: str,
    failing: Callable[[str], None],
    dit_bundle: Path,
    place: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(statements)
    before = Bundle.open(dit_bundle).manifest
    assert main(["compile", str(dit_bundle), *TARGET, "--cache-dir", str(cache)]) == FAILED
    assert refusal(capsys)
    assert Bundle.open(dit_bundle).manifest == before
    assert [name for name in listing(dit_bundle.parent) if name.startswith(".")] == []
    assert BuildCache(cache).entries() == ()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)], ids=["^C", "TERM"])
def test_a_stopped_build_leaves_no_process_and_no_draft(
    number: int, code: int, failing: Callable[[str], None], dit_bundle: Path, place: Path, cache: Path
) -> None:
    failing(STEPS)
    command = ["compile", str(dit_bundle), *TARGET, "-o", str(place / "x.ilf"), "--cache-dir", str(cache)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ilf_trt.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + START_S
        while not (children := psutil.Process(process.pid).children()) or not list(place.glob(".x.ilf*/engines/*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "the build did not begin"
            time.sleep(POLL_S)
        process.send_signal(number)
        _, errors = process.communicate(timeout=START_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert listing(place) == []
    assert psutil.wait_procs(children, timeout=START_S)[1] == []
    assert workers() == []


# --- the build cache's own


@pytest.fixture
def filled(cache: Path, tmp_path: Path) -> BuildCache:
    """Three engines of one MiB, last used 1, 10 and 100 days ago."""
    store = BuildCache(cache)
    (tmp_path / "engine").write_bytes(b"x" * (1 << 20))
    for days in (1, 10, 100):
        note = {"graph": "pre", "model": "dit 4x64", "precision": "fp16", "target": "tensorrt-rtx", "gpus": ["sm89"]}
        store.put(f"{days:064}", {"engine": tmp_path / "engine"}, {**note, "version": "1.7.1"})
        used_s = time.time() - days * DAY_S
        os.utime(cache / "entries" / f"{days:064}" / "entry.json", (used_s, used_s))
    return store


def test_the_cache_is_listed_last_used_first(
    filled: BuildCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["cache", "ls", "--cache-dir", str(filled.folder)]) == 0
    out = capsys.readouterr().out
    days = [float(line.split("│")[-2]) for line in out.splitlines() if line.startswith("│")]
    assert days == [1.0, 10.0, 100.0]
    for word in ("dit 4x64", "fp16", "tensorrt-rtx 1.7.1", "sm89"):
        assert word in " ".join(out.split())
    assert out.splitlines()[-1] == f"{filled.folder}: 3 builds, 3.0 MiB"


def test_a_cache_that_is_not_there_is_empty(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", "--cache-dir", str(cache)]) == 0
    assert said(capsys) == f"{cache}: 0 builds, 0.0 MiB"
    assert not cache.exists()


def test_the_folder_of_the_cache_may_come_from_the_environment(
    filled: BuildCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ILF_TRT_CACHE", str(filled.folder))
    assert main(["cache", "ls"]) == 0
    assert "3 builds" in said(capsys)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--days", "30"], 2),
        (["--max-gib", str(1.5 / 1024)], 1),
        (["--days", "5", "--max-gib", "1"], 1),
        (["--max-gib", "0"], 0),
        (["--all"], 0),
    ],
    ids=["days", "size", "days and size", "no size", "all"],
)
def test_prune_removes_what_was_asked(
    flags: list[str], kept: int, filled: BuildCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "prune", *flags, "--cache-dir", str(filled.folder)]) == 0
    assert len(filled.entries()) == kept
    assert said(capsys) == f"{filled.folder}: removed {3 - kept} builds, {3 - kept}.0 MiB"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to remove"),
        (["--all", "--days", "1"], "say what to remove"),
        (["--days", "-1"], "--days is -1"),
        (["--max-gib", "nan"], "--max-gib"),
        (["--max-gib", "inf"], "--max-gib"),
    ],
    ids=["nothing", "all and some", "negative days", "no number", "infinite"],
)
def test_prune_refuses_what_it_cannot_mean(
    flags: list[str], message: str, filled: BuildCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "prune", *flags, "--cache-dir", str(filled.folder)]) == FAILED
    assert message in refusal(capsys)
    assert len(filled.entries()) == 3
