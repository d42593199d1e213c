"""The folder of one run of the tests, and what its workers make there once for all of them."""

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from ilf_trt.assembly.conductor import BuildResult
from ilf_trt.contract.bundle import Bundle
from ilf_trt.runtime.verify import Difference

WORKER = "PYTEST_XDIST_WORKER"  # what pytest-xdist calls a process of a run that has several


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the whole run: a worker's own lies in it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER in os.environ else own


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made by the worker that comes first; the others wait.

    A `make` that fails leaves no mark, so the next worker tries again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = path.with_suffix(".made")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.is_file():
            make(path)
            mark.touch()
    return path


def built_once(output: Path, build: Callable[[Path], BuildResult]) -> BuildResult:
    """The result of a build without engines, built by the worker that comes first."""
    note = output.with_suffix(".json")

    def make(path: Path) -> None:
        result = build(path)
        assert (result.reports, result.reused) == ((), ())
        note.write_text(json.dumps([result.stage_s, [asdict(row) for row in result.differences]]))

    made_once(output, make)
    stage_s, differences = json.loads(note.read_text())
    return BuildResult(Bundle.open(output), stage_s, tuple(Difference(**row) for row in differences), (), ())
