"""What becomes of a build whose worker dies, fails or is no longer wanted."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ilf_trt import child_process
from ilf_trt.contract.target import Library
from ilf_trt.engines.job import ask
from ilf_trt.errors import EngineError, InvalidRequest, MissingDependency
from tests.engines.conftest import PRODUCT, VARYING, build_graph, graph_request, workers

Failing = Callable[[str], None]

START_S = 60.0  # until a process has begun or ended its work, on a busy machine
POLL_S = 0.02
LINES = 20_000  # of progress, several times what a pipe holds
STEPS = """
import os, pathlib, time
pathlib.Path({place!r}).write_text(str(os.getpid()))
step = 0
while config.progress_monitor.step_complete("slow", step):
    time.sleep(0.02)
    step += 1
"""
NO_STEPS = """
import os, pathlib, time
pathlib.Path({place!r}).write_text(str(os.getpid()))
time.sleep(600)
"""
# Asks for one engine, as `ilf-trt` does.
ASKS = """
import json, sys
from ilf_trt.engines.job import ask
from ilf_trt.contract.target import Library
ask(Library.TENSORRT_RTX, {"do": "build", "engine": json.loads(sys.argv[1])})
"""


@pytest.fixture(autouse=True)
def _leaves_no_worker() -> Iterator[None]:
    yield
    assert workers() == []


def ended(folder: Path) -> str:
    """The one line that says how a build failed; it leaves no engine that could be taken for whole."""
    with pytest.raises(EngineError) as caught:
        build_graph(folder, PRODUCT.format(kind="float"), profile=VARYING)
    assert "\n" not in str(caught.value)
    assert not (folder / "graph.engine").exists()
    return str(caught.value)


def build(folder: Path) -> dict[str, object]:
    """What a job asks of its worker for one engine."""
    request = graph_request(folder, PRODUCT.format(kind="float"), profile=VARYING)
    return {"do": "build", "engine": request.as_json()}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(POLL_S)


def lives(number: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE


def number_in(place: Path) -> int:
    wait_for(lambda: place.exists() and place.read_text())
    return int(place.read_text())


def executable(path: Path, script: str) -> str:
    """A program that takes the place of the worker."""
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# --- workers that die


def test_a_killed_builder_speaks_of_memory(failing: Failing, tmp_path: Path) -> None:
    failing("import os; os.kill(os.getpid(), 9)")
    message = ended(tmp_path)
    assert "memory" in message
    assert "--batch" in message


def test_a_crashed_builder_is_named_by_its_signal(failing: Failing, tmp_path: Path) -> None:
    failing("import ctypes; ctypes.string_at(0)")
    assert "the builder process was ended by SIGSEGV" in ended(tmp_path)


def test_a_builder_that_exits_is_named_by_its_code(failing: Failing, tmp_path: Path) -> None:
    failing("import os; os._exit(7)")
    assert "exit code 7" in ended(tmp_path)


def test_what_a_crashed_builder_said_last_is_told(failing: Failing, tmp_path: Path) -> None:
    failing(r"import os; os.write(2, b'not UTF-8: \xff\xfe,\nlast words'); os.abort()")
    message = ended(tmp_path)
    assert "SIGABRT" in message
    assert "last words" in message


def test_a_worker_that_dies_in_the_middle_of_a_word_is_named_by_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'sys.stdout.write(\'{"progress": ["a", 0\'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)'
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "worker", script))
    assert "SIGTERM" in ended(tmp_path)


def test_a_worker_that_never_reads_its_request_is_named_by_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "worker", "sys.exit(3)"))
    assert "exit code 3" in ended(tmp_path)


# --- builders that fail


def test_memory_that_runs_out_is_called_so(failing: Failing, tmp_path: Path) -> None:
    failing("raise MemoryError")
    assert "memory ran out during the build; pass a smaller --batch or --workspace" in ended(tmp_path)


def test_a_builder_without_an_engine_or_a_word_is_an_engine_error(failing: Failing, tmp_path: Path) -> None:
    failing("return None")
    message = ended(tmp_path)
    assert "graph: tensorrt-rtx could not build the engine" in message
    assert "--workspace" in message


def test_an_error_that_nobody_foresaw_is_told_and_asked_to_be_reported(failing: Failing, tmp_path: Path) -> None:
    failing("raise KeyError('what is this')")
    message = ended(tmp_path)
    assert "what is this" in message
    assert "report this" in message


def test_a_full_disk_is_the_operating_systems_own_error(tmp_path: Path) -> None:
    (tmp_path / "graph.engine").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        build_graph(tmp_path, PRODUCT.format(kind="float"), profile=VARYING)
    assert caught.value.errno == errno.ENOSPC


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    place = tmp_path / "no such folder" / "graph.engine"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        build_graph(tmp_path, PRODUCT.format(kind="float"), profile=VARYING, engine=str(place))


def test_what_a_library_prints_is_no_answer(failing: Failing, tmp_path: Path) -> None:
    failing("""
        import os
        print('{"result": {}}', flush=True)
        os.write(1, b'{"error": {}}')
        return super().build_serialized_network(network, config)
    """)
    assert build_graph(tmp_path, PRODUCT.format(kind="float"), profile=VARYING).kernels


@pytest.mark.parametrize("kind", [InvalidRequest, MissingDependency, EngineError])
def test_an_error_of_the_tree_keeps_its_kind(kind: type[Exception], failing: Failing, tmp_path: Path) -> None:
    failing(f"from ilf_trt.errors import {kind.__name__} as kind; raise kind('as it was')")
    with pytest.raises(kind, match=r"^as it was$"):
        build_graph(tmp_path, PRODUCT.format(kind="float"), profile=VARYING)


# --- builds that are no longer wanted


def test_an_interrupt_stops_the_builder_at_its_next_step(failing: Failing, tmp_path: Path) -> None:
    place = tmp_path / "number"
    failing(STEPS.format(place=str(place)))

    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(Library.TENSORRT_RTX, build(tmp_path), interrupt)
    assert not psutil.pid_exists(number_in(place))
    assert time.monotonic() - began < child_process.GRACE_S


def test_a_worker_that_nobody_reads_is_not_waited_for(failing: Failing, tmp_path: Path) -> None:
    failing(f"""
        for step in range({LINES}):
            config.progress_monitor.step_complete("many", step)
    """)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "many":
            time.sleep(1.0)  # until the pipe is full
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(Library.TENSORRT_RTX, build(tmp_path), interrupt)
    assert time.monotonic() - began < child_process.GRACE_S


def test_a_builder_that_takes_no_step_is_killed_in_the_end(
    failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "GRACE_S", 0.1)
    place = tmp_path / "number"
    failing(NO_STEPS.format(place=str(place)))
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    waiting = threading.Timer(0, lambda: (number_in(place), os.kill(os.getpid(), signal.SIGINT)))
    waiting.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(Library.TENSORRT_RTX, build(tmp_path))
    finally:
        signal.signal(signal.SIGINT, inherited)
    waiting.join()
    assert not psutil.pid_exists(number_in(place))


@pytest.mark.parametrize("body", [STEPS, NO_STEPS], ids=["that takes steps", "that takes none"])
def test_a_builder_whose_asker_was_killed_ends_by_itself(body: str, failing: Failing, tmp_path: Path) -> None:
    place = tmp_path / "number"
    failing(body.format(place=str(place)))
    request = build(tmp_path)["engine"]
    asker = subprocess.Popen([sys.executable, "-c", ASKS, json.dumps(request)])
    worker = number_in(place)
    asker.kill()
    asker.wait()
    wait_for(lambda: not lives(worker))
