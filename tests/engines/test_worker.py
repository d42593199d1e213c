"""The worker process alone: what it writes, and what becomes of it when nobody reads or asks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ilf_trt.engines.job import SWITCH
from tests.engines.conftest import PRODUCT, VARYING, graph_request

END_S = 60.0  # a worker ends within a second; a hang must not take the suite with it
Process = subprocess.Popen[str]


# Takes steps until it is told to stop.
PATIENT = """
import time
step = 0
while config.progress_monitor.step_complete("slow", step):
    time.sleep(0.02)
    step += 1
"""


@pytest.fixture
def start() -> Iterator[Callable[[], Process]]:
    with ExitStack() as stack:

        def worker() -> Process:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ilf_trt.engines.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, SWITCH: "1"},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield worker


def ask(process: Process, request: dict[str, object]) -> None:
    assert process.stdin
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()


def build(folder: Path) -> dict[str, object]:
    request = graph_request(folder, PRODUCT.format(kind="float"), profile=VARYING)
    return {"do": "build", "engine": request.as_json()}


def test_it_writes_one_object_a_line_and_the_result_last(start: Callable[[], Process], tmp_path: Path) -> None:
    worker = start()
    ask(worker, build(tmp_path))
    assert worker.stdout
    answers = [json.loads(line) for line in worker.stdout]
    assert {tuple(answer) for answer in answers[:-1]} == {("progress",)}
    assert answers[-1]["result"]["graph"] == "graph"
    assert worker.wait(END_S) == 0


def test_a_builder_whose_progress_nobody_reads_goes_on(start: Callable[[], Process], tmp_path: Path) -> None:
    worker = start()
    ask(worker, build(tmp_path))
    assert worker.stdout
    worker.stdout.readline()
    worker.stdout.close()
    assert worker.wait(END_S) == 0
    assert (tmp_path / "graph.engine").stat().st_size > 0


def test_a_builder_whose_input_closes_is_cancelled(
    start: Callable[[], Process], failing: Callable[[str], None], tmp_path: Path
) -> None:
    failing(PATIENT)
    worker = start()
    ask(worker, build(tmp_path))
    assert worker.stdin
    assert worker.stdout
    worker.stdout.readline()
    worker.stdin.close()
    answers = [json.loads(line) for line in worker.stdout]
    assert answers[-1] == {"error": {"kind": "EngineError", "message": "graph: the build was cancelled"}}
    assert worker.wait(END_S) == 0
    assert not (tmp_path / "graph.engine").exists()


@pytest.mark.parametrize("text", ["", "no JSON\n"])
def test_a_worker_without_a_request_ends_with_an_error(text: str, start: Callable[[], Process]) -> None:
    worker = start()
    out, _ = worker.communicate(text, timeout=END_S)
    assert out == ""
    assert worker.returncode == 1
