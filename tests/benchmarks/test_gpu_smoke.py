"""The smoke test of a GPU host without a GPU: every check on stand-ins, and what becomes of a process that ends."""

import csv
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import gpu_smoke, smoke_checks
from benchmarks.speed.gpu_smoke import END, rows_of_child, tried
from benchmarks.speed.smoke_checks import CHECKS, Check
from benchmarks.speed.smoke_table import NEVER_TRIED
from benchmarks.speed.smoke_table import gpu_smoke as table
from benchmarks.speed.stand_ins import StandInGround, stand_in_ground
from ilf_trt.contract.target import Library
from tests.runtime.conftest import Compiled, Machine, compiled, machine

__all__ = ["compiled", "machine"]

BY_NAME = {check.name: check for check in CHECKS}
OF_LIBRARIES = {
    "capture-engines": Library.TENSORRT,
    "scratch": Library.TENSORRT,
    "addresses": Library.TENSORRT,
    "compiled-kernels": Library.TENSORRT_RTX,
    "onnxruntime": None,
}
LIMIT_S = 20.0


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_on_stand_ins_every_check_holds_or_says_which_library_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert gpu_smoke.main(["--dry-run", "--output", str(folder), "--work", str(tmp_path)]) == 0
    rows = rows_of(folder / "gpu-smoke.csv")
    assert [row["check"] for row in rows] == list(BY_NAME)
    for row in rows:
        if row["check"] in OF_LIBRARIES:
            assert row["outcome"].startswith("not tried: "), row
        else:
            assert (row["outcome"], bool(row["facts"])) == ("holds", True), row
        assert row["gpu"] == "none, a dry run on the CPU"
        assert float(row["seconds"]) >= 0
    assert capsys.readouterr().out.endswith("10 assumptions hold, 5 were not tried, 0 do not hold\n")


class Ground(StandInGround):
    """One where work on a stream takes no time."""

    def spin(self, stream: Any) -> None:
        pass


@pytest.fixture
def ground(dit_bundle: Path, machine: Machine, compiled: Compiled, tmp_path: Path) -> StandInGround:
    """Stand-ins with the engine libraries, and a bundle for each."""
    made = Ground(machine.cuda, tmp_path)
    made.bundles = {library: compiled(dit_bundle, library.value) for library in Library}
    made.bundles[None] = dit_bundle
    return made


def outcome(name: str, ground: StandInGround) -> str:
    return tried(BY_NAME[name], lambda: nullcontext(ground))[0]["outcome"]


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_with_engine_libraries_their_checks_hold(name: str, ground: StandInGround) -> None:
    assert outcome(name, ground) == "holds"


@pytest.mark.parametrize("name", ["capture-engines", "addresses", "scratch"])
def test_an_engine_that_cannot_be_captured_is_found(name: str, ground: StandInGround, machine: Machine) -> None:
    machine.tensorrt.uncapturable = True
    assert outcome(name, ground) == "captured is False, expected True"


@pytest.mark.parametrize(
    ("name", "module", "attribute", "value", "words"),
    [
        ("memory", smoke_checks, "ALIGNMENT", 1 << 40, "are not aligned to 1099511627776 bytes"),
        ("full", smoke_checks, "TOO_MUCH_BYTES", 1 << 10, "0 TiB could be allocated"),
        ("captured-equals-eager", smoke_checks, "FAR", -1.0, "latents differ by"),
        ("dlpack", smoke_checks, "FAR", -1.0, "latents differ by"),
        ("threads", smoke_checks, "FAR", -1.0, "latents differ by"),
    ],
)
def test_what_does_not_hold_is_told(
    name: str, module: Any, attribute: str, value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, attribute, value)
    row, usable = tried(BY_NAME[name], lambda: stand_in_ground(tmp_path))
    assert words in row["outcome"]
    assert usable


def test_a_capture_that_is_refused_under_load_is_told(tmp_path: Path) -> None:
    def run(ground: Any) -> str:
        ground._cuda.fail("begin_building", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", times=100)
        return smoke_checks.capture_under_load(ground)

    row, _ = tried(Check("load", "", run), lambda: stand_in_ground(tmp_path))
    assert row["outcome"] == "5 of 5 plans were not captured at the first attempt"


def test_a_broken_rule_of_a_stand_in_is_no_success(tmp_path: Path) -> None:
    def run(ground: Any) -> str:
        ground._cuda.broken.append("two streams race")
        return "all well"

    row, _ = tried(Check("x", "", run), lambda: stand_in_ground(tmp_path))
    assert "two streams race" in row["outcome"]


# --- processes


def test_a_process_ends_after_the_check_that_loses_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in_ground(tmp_path) as ground:
        monkeypatch.setattr(gpu_smoke, "CudaGround", lambda work: ground)
        assert gpu_smoke.inside([BY_NAME[name] for name in ("memory", "lost", "full")], tmp_path) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("check") for line in lines] == ["memory", "lost", None]
    assert [line.get("outcome") for line in lines] == ["holds", "holds", None]
    assert lines[-1] == END


def child(*lines: Any, then: str = "") -> list[str]:
    """A process that prints these rows between other words."""
    prints = "".join(f"print({json.dumps(json.dumps(line))}, flush=True);print('words', flush=True);" for line in lines)
    return [sys.executable, "-c", f"{prints}{then}"]


def told(check: Check) -> dict[str, Any]:
    return {"check": check.name, "outcome": "holds"}


FIRST, SECOND, THIRD = CHECKS[:3]


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("import os; os.abort()", "its process ended with exit code -6"),
        ("raise SystemExit(3)", "its process ended with exit code 3"),
        ("import time; time.sleep(60)", "hung for 1 s, so its process was ended"),
    ],
    ids=["crash", "exit", "hang"],
)
def test_a_check_that_ends_its_process_is_blamed_and_the_next_remain(then: str, words: str) -> None:
    left = [FIRST, SECOND, THIRD]
    rows = list(rows_of_child(child(told(FIRST), then=then), left, 1.0 if "sleep" in then else LIMIT_S))
    assert [(row["check"], row["outcome"]) for row in rows] == [(FIRST.name, "holds"), (SECOND.name, words)]
    assert left == [THIRD]


def test_a_process_that_says_that_it_ends_is_not_blamed() -> None:
    left = [FIRST, SECOND]
    rows = list(rows_of_child(child(told(FIRST), END, then="raise SystemExit(1)"), left, LIMIT_S))
    assert [row["check"] for row in rows] == [FIRST.name]
    assert left == [SECOND]


def test_without_time_the_rest_is_not_tried() -> None:
    options = gpu_smoke._options(["--minutes", "0"])
    options.command = child()
    options.minutes = -1
    rows = list(gpu_smoke.rows_of_children([FIRST, SECOND], options))
    assert [row["outcome"] for row in rows] == ["not tried: no time was left"] * 2


# --- the table


def test_the_table_has_a_line_for_each_assumption_or_says_that_nothing_was_tried() -> None:
    assert table([]) == NEVER_TRIED
    row = {"gpu": "NVIDIA H200", "assumption": "a | b", "outcome": "holds", "facts": "", "seconds": "0.1"}
    lines = table([{**row, "device": "NVIDIA H200; host", "versions": "torch=2"}]).splitlines()
    assert lines[2] == "| NVIDIA H200 | a / b | holds | – | 0.1 |"
    assert lines[-1] == "Tried on NVIDIA H200; host; torch=2."
