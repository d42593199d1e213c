"""Commands that get a signal at any moment: the documented exit code, and never a traceback.

Until its handlers stand, some 25 ms of Python's own start, a process ends as Python lets it. Linux says in
`/proc/PID/status` that they stand: Python by itself never catches SIGTERM.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "ilf_trt.cli")
PLAN = ("plan", "--blocks", "28", "--loop", "8:19", "--steps", "10")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
FAILED = 2
SAID = "interrupted; nothing half-written was left behind\n"
LAST_WORDS = b"block forwards:"
TIMEOUT_S = 60
AT_ONCE = 3

EVERY_LINE = """
import json, os, signal, sys, traceback
from ilf_trt import cli, interrupts
import ilf_trt.commands.app, ilf_trt.commands.plan, rich.table

FILES = (cli.__file__, interrupts.__file__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)

def run(at):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename not in FILES:
                return None
            if event == "line":
                lines += 1
                if lines == at and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
                    os.kill(os.getpid(), SIGNALS[at % 2])
            return trace

        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.settrace(trace)
        try:
            code = cli.main()
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.settrace(None)
        if not at:
            print(lines, file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as errors:
        said = errors.read()
    return [SIGNALS[at % 2], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]

lines = int(run(0)[2].split()[-1])
json.dump([run(at) for at in range(1, lines + 1)], sys.stdout)
"""
"""Runs a command in one fork for every line of the command line's own code; that line sends a signal."""


@contextmanager
def started(tokens: Iterable[object]) -> Iterator[subprocess.Popen[bytes]]:
    """A command whose handlers stand."""
    command = [*COMMAND, *map(str, tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while not catches(process.pid, signal.SIGTERM):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    handled = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(handled, 16) >> (number - 1) & 1)


def swept(
    run: Callable[[signal.Signals, float], tuple[int, str]], delays_s: Iterable[float]
) -> list[tuple[signal.Signals, int, str]]:
    """The signal, the exit code and the standard error of one run for each delay, with either signal in turn."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        runs = [(sent, threads.submit(run, sent, delay_s)) for delay_s, sent in zip(delays_s, cycle(CODES))]
        return [(sent, *each.result()) for sent, each in runs]


def sent_after(tokens: Iterable[object]) -> Callable[[signal.Signals, float], tuple[int, str]]:
    """A run that gets its signal some time after the handlers stand."""

    def run(sent: signal.Signals, delay_s: float) -> tuple[int, str]:
        with started(tokens) as process:
            time.sleep(delay_s)
            process.send_signal(sent)
            errors = process.communicate(timeout=TIMEOUT_S)[1].decode()
            return process.returncode, errors

    return run


def check(ends: list[tuple[signal.Signals, int, str]], *, unsent: int = 0) -> None:
    """Each run ended as the documents say: by the signal's code, or as it would have without a signal."""
    odd = [end for end in ends if end[1] not in (CODES[end[0]], unsent) or "Traceback" in end[2]]
    assert odd == []


def test_the_handlers_stand_before_anything_large_is_loaded() -> None:
    probe = "import sys, ilf_trt.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    assert "ilf_trt" in loaded
    assert {"numpy", "cyclopts", "rich", "asyncio", "logging", "torch", "onnxruntime"}.isdisjoint(loaded)


def test_a_signal_while_a_command_loads_and_runs_ends_it_by_its_code() -> None:
    ends = swept(sent_after(PLAN), np.linspace(0, 0.24, 20))
    check(ends)
    assert [(code, errors) for sent, code, errors in ends[:2]] == [(CODES[sent], SAID) for sent, *_ in ends[:2]]


def test_a_signal_while_a_command_ends_does_not_change_its_kind_of_end() -> None:
    def run(sent: signal.Signals, delay_s: float) -> tuple[int, str]:
        with started(PLAN) as process:
            assert process.stdout is not None
            while LAST_WORDS not in (line := process.stdout.readline()):
                assert line
            time.sleep(delay_s)
            process.send_signal(sent)
            errors = process.communicate(timeout=TIMEOUT_S)[1].decode()
            return process.returncode, errors

    check(swept(run, np.linspace(0, 0.02, 8)))


@pytest.mark.parametrize(("tokens", "unsent"), [(PLAN, 0), (("plan", "--blocks", "x"), FAILED)], ids=["well", "badly"])
def test_a_signal_at_any_line_of_the_command_line_is_an_exit_code(tokens: tuple[str, ...], unsent: int) -> None:
    ran = subprocess.run([sys.executable, "-c", EVERY_LINE, *tokens], capture_output=True, text=True, check=True)
    ends = [(signal.Signals(sent), code, errors) for sent, code, errors in json.loads(ran.stdout)]
    check(ends, unsent=unsent)
    in_vain = [code == unsent for _, code, _ in ends]
    assert in_vain == sorted(in_vain, reverse=True)  # none after the handlers stand
    assert in_vain.count(False) > len(in_vain) // 2


def test_a_signal_during_a_build_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "demo.ilf"
    ends = swept(sent_after(("build", "--checkpoint", "demo", "-o", output, "--no-cache")), (0.02, 0.2, 0.5))
    check(ends)
    assert [code for sent, code, _ in ends] == [CODES[sent] for sent, *_ in ends]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_during_a_generation_leaves_the_old_picture_or_a_whole_one(dit_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "latents.npy"
    np.save(output, np.zeros(1))
    command = ("generate", dit_bundle, "--labels", "1", "--threads", "1", "--latents-out", output)
    check(swept(sent_after(command), np.linspace(0.05, 0.5, 6)))
    assert np.load(output).shape in ((1,), (1, 1, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
